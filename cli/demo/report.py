"""How the demo's outcome looks in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cli.demo.scenario import SYNCHRONOUS_PROMPT, Exchange, Outcome
from telemetry import tree

# Key of the job's timings, and head of its column.
_TIMINGS = {
    "queue_ms": "queue",
    "engine_wait_ms": "wait",
    "prefill_ms": "prefill",
    "decode_ms": "decode",
    "store_ms": "store",
    "total_ms": "total",
    "mean_batch_size": "batch",
}
_MAX_PROMPT = 26


def show(outcome: Outcome, console: Console) -> None:
    """Print completions, timings and the trace."""
    console.rule("[bold]What the model said")
    console.print(_completions(outcome))
    console.rule("[bold]Where the time went (milliseconds; batch: sequences that shared a step)")
    console.print(_timings(outcome))
    console.rule("[bold]One trace, from the seed's client to the generation")
    console.print(tree.render(tree.tree(outcome.seed_trace)))


def _completions(outcome: Outcome) -> RenderableType:
    answers = [(outcome.seed, "seed's client"), *((job, "job") for job in outcome.jobs)]
    answers.append((outcome.listed, "job with a list"))
    lines = [_line(how, prompt, text) for exchange, how in answers for prompt, text in _pairs(exchange)]
    lines += [_line("synchronous", SYNCHRONOUS_PROMPT, text) for text in outcome.completion.texts]
    return Group(*lines)


def _pairs(exchange: Exchange) -> Iterator[tuple[str, str]]:
    """Yield each completion with its prompt; the choices are numbered through all prompts."""
    texts = exchange.job.texts
    per_prompt = max(1, len(texts) // len(exchange.prompts))
    for index, text in enumerate(texts):
        yield exchange.prompts[index // per_prompt], text


def _line(how: str, prompt: str, text: str) -> Text:
    shown = " ".join(text.split("\n"))
    return Text.from_markup(f"[dim]{how:>15}[/]  [bold]{escape(prompt)}[/]{escape(shown)}")


def _timings(outcome: Outcome) -> RenderableType:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("prompt", no_wrap=True)
    for head in _TIMINGS.values():
        table.add_column(head, justify="right", no_wrap=True)
    for exchange in (outcome.seed, *outcome.jobs, outcome.listed):
        table.add_row(Text(_prompts(exchange)), *_figures(exchange.job.timings))
    seen = f"the synchronous completion took {outcome.completion_seconds * 1000:.1f} as its client saw it"
    return Group(table, Text(seen, style="dim"))


def _prompts(exchange: Exchange) -> str:
    text = " | ".join(exchange.prompts)
    return text if len(text) <= _MAX_PROMPT else text[: _MAX_PROMPT - 1] + "…"


def _figures(timings: Mapping[str, Any]) -> Iterator[str]:
    for key in _TIMINGS:
        value = timings.get(key)
        yield "–" if value is None else f"{value:.1f}"
