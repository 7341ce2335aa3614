"""`throughline trace`: where the time of a job went."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from cli.client import JobView
    from cli.stack.viewer import ViewerAddress
    from cli.viewer_client import Found

_TRACE_ID = re.compile(r"[0-9a-fA-F]{32}")
_JOB_ID = re.compile(r"[\w\-]{1,128}")
_PIPE_WIDTH = 240  # of a file or a pipe, which has no edge to wrap at


def _job_or_trace_id(ctx: click.Context, parameter: click.Parameter, text: str) -> str:
    if not _JOB_ID.fullmatch(text):
        raise click.BadParameter(f"{text!r} must be a job id (job_…) or a trace id (32 hex digits)")
    return text


@click.command(
    name="trace",
    short_help="Show where the time of a job went.",
    epilog=options.examples(
        "throughline trace job_0193f2a4c7d0",
        "throughline trace job_0193f2a4c7d0 --html trace.html",
        "throughline trace 4bf92f3577b34da6a3ce929d0e0e4736 --state-dir /srv/throughline",
    ),
)
@click.argument("subject", metavar="JOB_ID|TRACE_ID", callback=_job_or_trace_id)
@click.option(
    "--url",
    type=options.API_URL,
    envvar="THROUGHLINE_URL",
    help=f"The API.  [default: the one of the stack in the state folder, else {options.DEFAULT_URL}]",
)
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".throughline"),
    show_default=True,
    envvar="THROUGHLINE_STATE_DIR",
    help="The folder of the stack that runs with --trace-viewer.",
)
@click.option(
    "--html",
    "page",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write the trace as one page that works offline.",
)
@click.option(
    "--wait", "wait_seconds", type=click.FloatRange(0, 3600), default=5.0, show_default=True,
    help="Seconds to wait for the job to end and for its spans to come.",
)  # fmt: skip
def command(subject: str, url: str | None, state_dir: Path, page: Path | None, wait_seconds: float) -> None:
    """Show the trace of a job as a tree: each span, its length, its start, and time that no span explains.

    Spans are kept by `throughline up --trace-viewer`, the newest ones, as long as it runs.
    """
    from rich.console import Console

    from cli.stack import viewer

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    address = viewer.find(state_dir)
    deadline = time.monotonic() + wait_seconds
    if _TRACE_ID.fullmatch(subject):
        job, title = None, f"Trace {subject.lower()}"
        found = _find_trace(subject, _required(address, state_dir, None), deadline)
    else:
        job = _read_job(subject, url or (address.api_url if address else options.DEFAULT_URL), deadline)
        title = f"Job {job.id}: {job.status}"
        found = _find_job(job, _required(address, state_dir, job), deadline)
    _show(found, job, console)
    if page is not None:
        _write(page, found, title)
        console.print(f"Written to {page}", markup=False, soft_wrap=True)


def _required(address: ViewerAddress | None, state_dir: Path, job: JobView | None) -> ViewerAddress:
    from cli.errors import TraceViewerError

    if address is not None:
        return address
    known = f"; the job's trace is {job.trace_id}" if job and job.trace_id else ""
    raise TraceViewerError(
        f"no trace viewer runs for --state-dir {state_dir}. Three ways out: "
        "(1) start the stack with `throughline up --trace-viewer`; "
        "(2) name the folder of the stack that has one with --state-dir; "
        f"(3) look where the stack sends its spans (--otlp-traces-endpoint){known}"
    )


def _read_job(job_id: str, url: str, deadline: float) -> JobView:
    """Return the job, ended if that happens before the deadline; unknown or unreachable is said at once."""
    from cli.client import ApiClient
    from cli.errors import ApiError, TraceNotFoundError

    with ApiClient(url) as client:
        try:
            job = client.read(job_id)
        except ApiError as error:
            if error.status != 404:
                raise
            raise TraceNotFoundError(f"{job_id}: {url} knows no such job; it may have expired") from error
        return job if job.is_done else client.wait(job_id, deadline=deadline)


def _find_trace(trace_id: str, address: ViewerAddress, deadline: float) -> Found:
    from cli.errors import TraceNotFoundError
    from cli.viewer_client import ViewerClient

    with ViewerClient(address.read_url) as client:
        found = client.of_trace(trace_id.lower(), deadline=deadline)
    if not found.spans:
        raise TraceNotFoundError(
            f"{trace_id}: the trace viewer holds no span of this trace{_forgotten(found)}"
        )
    return found


def _find_job(job: JobView, address: ViewerAddress, deadline: float) -> Found:
    from cli.errors import TraceNotFoundError
    from cli.viewer_client import ViewerClient

    with ViewerClient(address.read_url) as client:
        found = client.of_job(job, deadline=deadline)
    if not found.spans:
        why = "it was submitted without tracing" if not job.trace_id else f"its trace is {job.trace_id}"
        raise TraceNotFoundError(
            f"{job.id} is {job.status}, and the trace viewer holds no span of it: {why}{_forgotten(found)}. "
            "Spans come about a second after they end (--wait waits longer); a trace that was not sampled, "
            "or ended before the viewer started, never does"
        )
    return found


def _forgotten(found: Found) -> str:
    return f"; it has forgotten {found.num_forgotten} older spans" if found.num_forgotten else ""


def _show(found: Found, job: JobView | None, console: Console) -> None:
    from telemetry import tree

    if job is not None:
        console.print(f"job {job.id}  {job.status}", style="bold", markup=False)
    console.print(tree.render(tree.tree(found.spans)))
    if found.is_whole:
        return
    reason = "not all of its spans have come" if job is None or job.is_done else f"the job is {job.status}"
    console.print(f"This is the trace so far: {reason}.", style="yellow", markup=False)


def _write(page: Path, found: Found, title: str) -> None:
    from cli.errors import CliError
    from telemetry.html import render_html

    try:
        page.write_text(render_html(found.spans, title=title), encoding="utf-8")
    except OSError as error:
        raise CliError(f"--html {page}: cannot be written: {error.strerror or error}") from error
