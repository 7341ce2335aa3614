"""A trace as a tree: who called whom, how long it took, and where time went that no span names.

Building is pure (`tree`); `render` and `summarize` turn the result into something `rich` prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from telemetry import names
from telemetry.record import LinkRecord, SpanRecord

_GAP_SECONDS, _GAP_SHARE = 0.002, 0.01
_MAX_LINKS = 4  # of a line; an engine's step may have a hundred, which the page shows
_KIND_COLOURS = {"SERVER": "cyan", "CLIENT": "blue", "PRODUCER": "magenta", "CONSUMER": "magenta"}
_SHOWN = (
    names.JOB_ATTEMPT,
    names.JOB_STATE,
    names.GEN_AI_USAGE_INPUT_TOKENS,
    names.GEN_AI_USAGE_OUTPUT_TOKENS,
    names.BATCH_SIZE_MEAN,
    names.CLOCK_SKEWED,
    names.STEP_BATCH_SIZE,
    names.STEP_PREFILL_TOKENS,
    names.STEP_DECODE_TOKENS,
    names.STEP_PREEMPTED,
    names.STEP_SLOW,
    names.STEP_LINKS_OMITTED,
    "http.response.status_code",
)


@dataclass(frozen=True, slots=True)
class Node:
    span: SpanRecord
    children: tuple[Node, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Time inside `span` that none of its descendants names; `after` and `before` are what surrounds it."""

    span: SpanRecord
    start_ns: int
    end_ns: int
    after: str
    before: str

    @property
    def duration_seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


@dataclass(frozen=True, slots=True)
class TraceTree:
    """The spans of one trace, by start. A span whose parent is not among them is a root of `roots`."""

    roots: tuple[Node, ...]
    gaps: tuple[Gap, ...]

    @property
    def start_ns(self) -> int:
        return min((span.start_ns for span in _walk(self.roots)), default=0)


def tree(spans: Iterable[SpanRecord], *, min_gap_ns: int | None = None) -> TraceTree:
    """Every span stands in it once: one sent twice counts once, an orphan or one of a ring is a root.

    Gaps up to `min_gap_ns` are left out; when not given, those that are the price of doing anything.
    """
    by_id = {span.span_id: span for span in sorted(spans, key=lambda span: (span.start_ns, span.end_ns))}
    children: dict[str, list[SpanRecord]] = {}
    roots: list[SpanRecord] = []
    for span in by_id.values():
        if span.parent_id in by_id and not _is_in_ring(span, by_id):
            children.setdefault(str(span.parent_id), []).append(span)
        else:
            roots.append(span)
    nodes = tuple(_node(span, children) for span in roots)
    gaps = (_gaps(node, _threshold_ns(node) if min_gap_ns is None else min_gap_ns) for node in nodes)
    return TraceTree(nodes, tuple(gap for found in gaps for gap in found))


def render(trace: TraceTree) -> Tree:
    """One line a span: name, length, start within the trace, kind, service, and what is odd about it."""
    top = Tree(_title(trace), guide_style="dim")
    for node in trace.roots:
        _add(top, node, trace)
    for gap in trace.gaps:
        top.add(_gap_line(gap))
    return top


@dataclass(frozen=True, slots=True)
class Total:
    """All spans of one name together; `share` is of the trace's length, and above 1 where spans overlap."""

    name: str
    count: int
    length_ns: int
    share: float


def totals(trace: TraceTree) -> list[Total]:
    """Name by name, in the order of appearance."""
    whole_ns = max((span.end_ns for span in _walk(trace.roots)), default=0) - trace.start_ns
    lengths: dict[str, list[int]] = {}
    for span in _walk(trace.roots):
        lengths.setdefault(span.name, []).append(span.end_ns - span.start_ns)
    return [
        Total(name, len(parts), sum(parts), sum(parts) / whole_ns if whole_ns > 0 else 0.0)
        for name, parts in lengths.items()
    ]


def summarize(trace: TraceTree) -> Table:
    """`totals` as a table."""
    table = Table("span", "count", "total", "share", box=None, header_style="bold")
    for total in totals(trace):
        table.add_row(
            Text(total.name), str(total.count), format_duration(total.length_ns), f"{total.share:.0%}"
        )
    return table


def format_duration(length_ns: int) -> str:
    """In the unit that fits; a negative one, which clock skew makes, keeps its sign."""
    seconds = length_ns / 1e9
    if abs(seconds) < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if abs(seconds) < 1:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s"


def _is_in_ring(span: SpanRecord, by_id: dict[str, SpanRecord]) -> bool:
    seen = {span.span_id}
    parent_id = span.parent_id
    while parent_id in by_id:
        if parent_id in seen:
            return True
        seen.add(str(parent_id))
        parent_id = by_id[str(parent_id)].parent_id
    return False


def _node(span: SpanRecord, children: dict[str, list[SpanRecord]]) -> Node:
    return Node(span, tuple(_node(child, children) for child in children.get(span.span_id, [])))


def _walk(nodes: Sequence[Node]) -> Iterable[SpanRecord]:
    for node in nodes:
        yield node.span
        yield from _walk(node.children)


def _threshold_ns(root: Node) -> int:
    """Shorter gaps are the price of doing anything: 2 ms, or 1 % of the whole where that is more."""
    return max(int(_GAP_SECONDS * 1e9), int((root.span.end_ns - root.span.start_ns) * _GAP_SHARE))


def _gaps(node: Node, threshold_ns: int) -> Iterable[Gap]:
    """Gaps of a span with children, then of those.

    A span without children names its own time; so does a PRODUCER, whose children begin when it is done.
    """
    span = node.span
    if node.children and span.kind != "PRODUCER":
        position, after = span.start_ns, "its start"
        for inner in sorted(_walk(node.children), key=lambda inner: inner.start_ns):
            if inner.start_ns > span.end_ns:
                break
            if inner.start_ns - position > threshold_ns:
                yield Gap(span=span, start_ns=position, end_ns=inner.start_ns, after=after, before=inner.name)
            if inner.end_ns > position:
                position, after = inner.end_ns, inner.name
        if span.end_ns - position > threshold_ns:
            yield Gap(span=span, start_ns=position, end_ns=span.end_ns, after=after, before="its end")
    for child in node.children:
        yield from _gaps(child, threshold_ns)


def _title(trace: TraceTree) -> Text:
    spans = list(_walk(trace.roots))
    if not spans:
        return Text("no spans", style="dim")
    services = ", ".join(dict.fromkeys(span.service for span in spans))
    trace_ids = list(dict.fromkeys(span.trace_id for span in spans))
    length_ns = max(span.end_ns for span in spans) - trace.start_ns
    return Text.assemble(
        ("trace " if len(trace_ids) == 1 else "traces ", "bold"),
        ", ".join(trace_ids),
        f"  {len(spans)} spans  {format_duration(length_ns)}  ",
        (services, "dim"),
    )


def _add(above: Tree, node: Node, trace: TraceTree) -> None:
    branch = above.add(_line(node.span, trace))
    for child in node.children:
        _add(branch, child, trace)


def _line(span: SpanRecord, trace: TraceTree) -> Text:
    line = Text.assemble(
        (span.name, "bold red" if span.status == "ERROR" else "bold"),
        f"  {format_duration(span.end_ns - span.start_ns)}",
        (f"  +{format_duration(span.start_ns - trace.start_ns)}", "dim"),
        (f"  {span.kind}", _KIND_COLOURS.get(span.kind, "dim")),
        (f"  {span.service}", "dim"),
    )
    for key in _SHOWN:
        if key in span.attributes:
            line.append(f"  {key.rpartition('.')[2]}={_value(span.attributes[key])}", "green")
    if span.links:
        line.append(f"  ↗ {_links(span)}", "yellow")
    if span.status == "ERROR":
        line.append(f"  ✗ {_value(span.attributes.get(names.ERROR_TYPE, 'error'))}", "red")
    return line


def _gap_line(gap: Gap) -> Text:
    length = format_duration(gap.end_ns - gap.start_ns)
    where = f"between {gap.after} and {gap.before}"
    return Text(f"{length} of {gap.span.name} unexplained, {where}", style="yellow")


def _links(span: SpanRecord) -> str:
    shown = [_link(link, span.trace_id) for link in span.links[:_MAX_LINKS]]
    num_more = len(span.links) - len(shown)
    return ", ".join([*shown, f"and {num_more} more"] if num_more else shown)


def _link(link: LinkRecord, trace_id: str) -> str:
    """The trace is told where it is another: `throughline trace` takes it."""
    role = _value(link.attributes.get(names.LINK_ROLE, "link"))
    elsewhere = "" if link.trace_id == trace_id else f" of trace {link.trace_id}"
    return f"{role} {link.span_id[:8]}{elsewhere}"


def _value(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
