"""How much of a completion's time no span explains, by the span it lies in.

    python -m benchmarks.bench_unexplained_time [--requests 200] [--max-tokens 16]

Completions one after the other against a stack started for this run, whose spans go to a receiver here.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.measure import percentile, positive
from engine import builtin
from telemetry.record import SpanRecord
from telemetry.tree import tree
from tests.support.span_trees import Traced, traced_stack

NUM_WARM_UP = 20
SPANS_OF_A_COMPLETION = 16

Seconds = dict[str, list[float]]
"""By the name of a span, its variable part left out."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=positive, default=200)
    parser.add_argument("--max-tokens", type=positive, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, traced_stack(Path(folder), {}) as traced:
        for _ in range(NUM_WARM_UP):
            complete(traced, arguments.max_tokens)
        trace_ids = [complete(traced, arguments.max_tokens) for _ in range(arguments.requests)]
        traces = [traced.trace(id, SPANS_OF_A_COMPLETION) for id in trace_ids]
    report(unexplained(traces))


def complete(traced: Traced, max_tokens: int) -> str:
    reply: httpx.Response = traced.post("/v1/completions", model=builtin.NAME, max_tokens=max_tokens)
    return reply.headers["X-Trace-Id"]


def unexplained(traces: list[list[SpanRecord]]) -> Seconds:
    found: Seconds = defaultdict(list)
    for spans in traces:
        sums: dict[str, float] = dict.fromkeys(("POST", "process", "whole trace"), 0.0)
        for gap in tree(spans, min_gap_ns=0).gaps:
            name = gap.span.name.partition(" ")[0]
            sums[name] = sums.get(name, 0.0) + gap.duration_seconds
            sums["whole trace"] += gap.duration_seconds
        for name, seconds in sums.items():
            found[name].append(seconds)
    return found


def report(found: Seconds) -> None:
    table = Table("in", "p50 ms", "p99 ms", title="Time that no span explains, per completion")
    for name, seconds in found.items():
        table.add_row(name, f"{percentile(seconds, 0.5) * 1e3:.2f}", f"{percentile(seconds, 0.99) * 1e3:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
