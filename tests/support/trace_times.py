"""Where the time of a trace went: the rules of `trace_invariants` about time.

Spans that share a stamp must touch: those are held to what two readings of a clock differ by, and hold on any
machine. Between the others a thread does a little unnamed work, or waits for a core; how long is the
machine's affair, and its bound tells a forgotten step of seconds, not a slow one of milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from telemetry import names
from telemetry.record import SpanRecord

STAMP_NS = 1_000_000
"""One stamp may come by two ways: the engine's clock is turned into wall-clock time for each span anew."""

UNNAMED_NS = 250_000_000
"""In one span, together, beside 1 %. Of 100 completions 99 have less than 22 ms at a load of 14 on two cores;
a suite on a shared machine has been seen to stand still for ten times that."""

_WAITS = ("delay ", "queue ", "lost ")
"""What an accepted job's time is before its first attempt, and between two."""

CROWDED_UNNAMED_NS = 2_000_000_000
"""For a run that fills one event loop on purpose, whose requests wait for each other (307 ms seen).
`python -m benchmarks unexplained_time` measures what a completion really has."""


def time_breaches(spans: Sequence[SpanRecord], *, unnamed_ns: int) -> Iterator[str]:
    trees = _Trees(spans)
    for span in spans:
        if span.name.startswith(f"{names.OPERATION_TEXT_COMPLETION} "):
            yield from _phases_fill(span, trees)
        elif span.name == names.SPAN_RECEIVE_OUTPUT:
            yield from _follows_generation(span, trees)
        elif span.kind == "CONSUMER":
            yield from _follows_wait(span, trees)
            yield from _is_named(span, trees.below(span), unnamed_ns)
        elif span.kind == "SERVER":
            yield from _is_named(span, trees.below(span), unnamed_ns)
            yield from _waits_for_work(span, trees, unnamed_ns)


class _Trees:
    def __init__(self, spans: Sequence[SpanRecord]) -> None:
        self.spans = spans
        self._children: dict[str, list[SpanRecord]] = {}
        for span in spans:
            self._children.setdefault(str(span.parent_id), []).append(span)

    def children(self, span: SpanRecord) -> list[SpanRecord]:
        return sorted(self._children.get(span.span_id, []), key=lambda child: child.start_ns)

    def below(self, span: SpanRecord) -> list[SpanRecord]:
        direct = self.children(span)
        return [*direct, *(deeper for child in direct for deeper in self.below(child))]


def _phases_fill(generation: SpanRecord, trees: _Trees) -> Iterator[str]:
    """Its phases follow each other from its start to its end; an item apart has none."""
    phases = trees.children(generation)
    if not phases:
        return
    ends = [generation.start_ns, *(phase.end_ns for phase in phases)]
    starts = [*(phase.start_ns for phase in phases), generation.end_ns]
    for end_ns, start_ns in zip(ends, starts, strict=True):
        if abs(start_ns - end_ns) > STAMP_NS:
            yield f"phases fill their generation: {generation.name} has {_ms(start_ns - end_ns)} between two"


def _follows_generation(received: SpanRecord, trees: _Trees) -> Iterator[str]:
    """The way back begins when the job's last generation ends."""
    ends = [
        span.end_ns
        for span in trees.spans
        if span.name.startswith(f"{names.OPERATION_TEXT_COMPLETION} ")
        and received.parent_id in {span.parent_id, *(link.span_id for link in span.links)}
    ]
    if not ends or abs(max(ends) - received.start_ns) > STAMP_NS:
        yield f"an output is received from the last token on: {received.name} of {received.parent_id} is not"


def _follows_wait(process: SpanRecord, trees: _Trees) -> Iterator[str]:
    """An attempt's claim begins where its time in the queue, or of the attempt lost before it, ends."""
    claims = [child for child in trees.children(process) if child.name == names.SPAN_CLAIM]
    if names.JOB_ATTEMPT not in process.attributes or not claims:
        return
    waits = [
        span.end_ns
        for span in trees.spans
        if span.name.startswith(("queue ", "lost "))
        and span.attributes.get(names.JOB_ID) == process.attributes.get(names.JOB_ID)
    ]
    if not any(abs(end_ns - claims[0].start_ns) <= STAMP_NS for end_ns in waits):
        yield f"an attempt begins where its wait ends: {process.name} has no wait that ends with it"


def _is_named(span: SpanRecord, inside: list[SpanRecord], allowed_ns: int) -> Iterator[str]:
    """A span without children names its own time."""
    unnamed_ns = _uncovered_ns(span, inside)
    if inside and unnamed_ns > _bound_ns(span, allowed_ns):
        yield f"all time has a name: {span.name} has {_ms(unnamed_ns)} that none of its children covers"


def _waits_for_work(server: SpanRecord, trees: _Trees, allowed_ns: int) -> Iterator[str]:
    """What a client waits for is queue and process, and the word that the job has ended.

    Not asked where the wait was given up, and in link-only mode, where the work is in traces of its own.
    """
    by_name = {child.name: child for child in trees.children(server)}
    wait, below = by_name.get(names.SPAN_WAIT_RESULT), trees.below(server)
    work = [span for span in below if span.kind == "CONSUMER" or span.name.startswith(_WAITS)]
    if wait is None or names.SPAN_FETCH_RESULT not in by_name or not work:
        return
    idle_ns = _uncovered_ns(wait, [*work, *(span for span in below if span.kind == "PRODUCER")])
    if idle_ns > _bound_ns(wait, allowed_ns):
        yield f"queue, process and wait add up: {_ms(idle_ns)} of a wait were neither"


def _uncovered_ns(span: SpanRecord, inside: list[SpanRecord]) -> int:
    uncovered_ns, position_ns = 0, span.start_ns
    for inner in sorted(inside, key=lambda inner: inner.start_ns):
        uncovered_ns += max(0, min(inner.start_ns, span.end_ns) - position_ns)
        position_ns = max(position_ns, inner.end_ns)
    return uncovered_ns + max(0, span.end_ns - position_ns)


def _bound_ns(span: SpanRecord, allowed_ns: int) -> int:
    return allowed_ns + (span.end_ns - span.start_ns) // 100


def _ms(length_ns: int) -> str:
    return f"{length_ns / 1e6:.1f} ms"
