"""`throughline submit`: prompts in, completions out, through the queue."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

import click

from cli import options

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli.client import ApiClient, JobView


@click.command(
    name="submit",
    short_help="Submit prompts as jobs and wait for them.",
    epilog=options.examples(
        'throughline submit "San Francisco is a" --max-tokens 20',
        "throughline submit --file prompts.txt --json > jobs.jsonl",
        "cat prompts.txt | throughline submit --temperature 0",
        'throughline submit "Once upon a time" --no-wait',
    ),
)
@click.argument("prompt", required=False)
@click.option(
    "--file",
    "-f",
    "lines",
    type=click.File(encoding="utf-8"),
    metavar="FILE",
    help="Read one prompt a line; - is standard input. Blank lines are skipped.",
)
@click.option(
    "--url",
    type=options.API_URL,
    default=options.DEFAULT_URL,
    envvar="THROUGHLINE_URL",
    show_default=True,
    help="The API.",
)
@click.option("--model", metavar="NAME", help="Model to ask for.  [default: the first that is served]")
@click.option("--max-tokens", type=click.IntRange(1), help="Tokens to generate at most.")
@click.option("--temperature", type=click.FloatRange(0.0), help="0 takes the likeliest token each time.")
@click.option("--top-p", type=click.FloatRange(0.0, 1.0, min_open=True), help="Nucleus sampling.")
@click.option("--n", type=click.IntRange(1), help="Completions for each prompt.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End a completion before this text; repeatable.")
@click.option("--no-wait", is_flag=True, help="Print the job ids and leave; the jobs run on.")
@click.option("--json", "as_json", is_flag=True, help="Print each job as one line of JSON.")
@click.option(
    "--timeout", "timeout_seconds", type=click.FloatRange(0, min_open=True), default=600.0, show_default=True,
    help="Seconds to wait for everything.",
)  # fmt: skip
def command(
    prompt: str | None,
    lines: TextIO | None,
    url: str,
    model: str | None,
    no_wait: bool,
    as_json: bool,
    timeout_seconds: float,
    **sampling: Any,
) -> None:
    """Submit PROMPT, or each line of a file or of standard input, as a job; wait and print what came of it.

    Jobs survive this command: Ctrl-C stops the waiting, not them. Exits with 1 when a job did not complete.
    """
    from cli.client import ApiClient

    prompts = _read_prompts(prompt, lines)
    deadline = time.monotonic() + timeout_seconds
    with ApiClient(url) as client:
        model = model or _first_model(client)
        bodies = [{"model": model, "prompt": text, **_given(sampling)} for text in prompts]
        job_ids = _submit_all(client, bodies, deadline)
        if no_wait:
            click.echo("\n".join(job_ids))
            return
        jobs = _wait_for_all(client, job_ids, deadline)
    _print(jobs, prompts, as_json=as_json)
    if not all(job.status == "completed" for job in jobs):
        sys.exit(1)


def _read_prompts(prompt: str | None, lines: TextIO | None) -> list[str]:
    if prompt is not None and lines is not None:
        raise click.UsageError("give PROMPT or --file, not both")
    if prompt is not None:
        return [prompt]
    if lines is None:
        if sys.stdin.isatty():
            raise click.UsageError("give a PROMPT, or --file, or prompts on standard input")
        lines = sys.stdin
    prompts = [line.rstrip("\r\n") for line in lines]
    prompts = [line for line in prompts if line.strip()]
    if not prompts:
        raise click.UsageError("there is no prompt in the input: every line is blank")
    return prompts


def _given(sampling: dict[str, Any]) -> dict[str, Any]:
    """Return what was given; the rest is the API's to default."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in sampling.items()
        if value not in (None, ())
    }


def _first_model(client: ApiClient) -> str:
    from cli.errors import CliError

    names = client.model_names()  # not patiently: that nothing listens should be said at once
    if not names:
        raise CliError(f"{client.url} serves no model yet; is a worker running?")
    return names[0]


def _submit_all(client: ApiClient, bodies: Sequence[dict[str, Any]], deadline: float) -> list[str]:
    with _progress("submitting", len(bodies)) as advance:
        job_ids = []
        for body in bodies:
            job_ids.append(client.patiently(partial(client.submit, body), deadline=deadline).id)
            advance()
    return job_ids


def _wait_for_all(client: ApiClient, job_ids: Sequence[str], deadline: float) -> list[JobView]:
    with _progress("waiting", len(job_ids)) as advance:
        jobs = []
        for job_id in job_ids:
            jobs.append(client.wait(job_id, deadline=deadline))
            advance()
    return jobs


@contextmanager
def _progress(verb: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on standard error, where that is a terminal; yield the function that moves it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(verb, total=total)
        yield lambda: progress.advance(task)


def _print(jobs: Sequence[JobView], prompts: Sequence[str], *, as_json: bool) -> None:
    for number, (job, prompt) in enumerate(zip(jobs, prompts, strict=True), 1):
        if as_json:
            click.echo(json.dumps(job.raw, ensure_ascii=False))
            continue
        if len(jobs) > 1:
            click.echo(click.style(f"[{number}] {prompt}", dim=True))
        for text in job.texts:
            click.echo(text)
        if job.status != "completed":
            trace = f"; trace: {job.trace}" if job.trace else ""
            click.echo(f"{job.id}: {job.failure}{trace}", err=True)
