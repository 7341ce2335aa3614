"""A trace as one page: a waterfall that needs no server, no script and no network.

    spans ──▶ tree.tree ──▶ _Scale (time to per cent) ──▶ rows ──▶ templates/trace.html

Every string of a span is a stranger's: all of it is escaped here, and the page forbids itself scripts
and requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template

from telemetry import names
from telemetry.record import LinkRecord, SpanRecord, Value
from telemetry.tree import Gap, Node, TraceTree, format_duration, totals, tree

_NUM_COLOURS = 6
_MAX_TICKS = 8
_UNITS = (("s", 10**9), ("ms", 10**6), ("µs", 10**3), ("ns", 1))


def render_html(spans: Iterable[SpanRecord], *, title: str) -> str:
    """Return the page of one trace, or of a few that belong together, as it is to be stored in UTF-8."""
    trace = tree(spans)
    flat = list(_flatten(trace.roots, 0))
    page = _Page(
        scale=_Scale.of([row.span for row in flat]),
        anchors={row.span.span_id: f"span-{number}" for number, row in enumerate(flat)},
        trace_ids=frozenset(row.span.trace_id for row in flat),
        colours=_colours(row.span.service for row in flat),
        gaps=trace.gaps,
    )
    body = [
        f"<h1>{escape(title)}</h1>",
        _facts(flat, page),
        _services(page),
        _waterfall(flat, page),
        _gaps(page),
        _totals(trace),
    ]
    template = (resources.files("telemetry") / "templates" / "trace.html").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(title), body="\n".join(filter(None, body)))


@dataclass(frozen=True, slots=True)
class _Row:
    span: SpanRecord
    depth: int


@dataclass(frozen=True, slots=True)
class _Scale:
    """Where a moment stands on the time axis, in per cent of its width."""

    start_ns: int
    length_ns: int

    @classmethod
    def of(cls, spans: Sequence[SpanRecord]) -> _Scale:
        start_ns = min((span.start_ns for span in spans), default=0)
        end_ns = max((span.end_ns for span in spans), default=0)
        return cls(start_ns, max(1, end_ns - start_ns))

    def position(self, at_ns: int) -> float:
        return min(100.0, max(0.0, (at_ns - self.start_ns) / self.length_ns * 100))

    def style(self, start_ns: int, end_ns: int) -> str:
        left, right = self.position(start_ns), self.position(end_ns)
        return f"left:{left:.3f}%;width:{max(0.0, right - left):.3f}%"

    @property
    def step_ns(self) -> int:
        """The round distance (1, 2 or 5 times a power of ten) that gives at most `_MAX_TICKS` ticks."""
        power = int(10 ** max(0, math.floor(math.log10(self.length_ns / _MAX_TICKS))))
        steps = (power, 2 * power, 5 * power, 10 * power)
        return next(step for step in steps if self.length_ns / step <= _MAX_TICKS)

    @property
    def ticks_ns(self) -> range:
        return range(0, self.length_ns + 1, self.step_ns)

    def label(self, tick_ns: int) -> str:
        """Return a tick's time, in one unit for the whole axis."""
        unit, unit_ns = next((unit, ns) for unit, ns in _UNITS if self.length_ns >= ns)
        return f"{tick_ns / unit_ns:g} {unit}"


@dataclass(frozen=True, slots=True)
class _Page:
    """What each row needs to know of the whole."""

    scale: _Scale
    anchors: Mapping[str, str]
    trace_ids: frozenset[str]
    colours: Mapping[str, str]
    gaps: Sequence[Gap]


def _flatten(nodes: Iterable[Node], depth: int) -> Iterator[_Row]:
    for node in nodes:
        yield _Row(node.span, depth)
        yield from _flatten(node.children, depth + 1)


def _colours(services: Iterable[str]) -> dict[str, str]:
    """Service to class, in the order of appearance; with many services colours repeat, names never do."""
    return {service: f"s{index % _NUM_COLOURS}" for index, service in enumerate(dict.fromkeys(services))}


def _facts(rows: Sequence[_Row], page: _Page) -> str:
    trace_ids = dict.fromkeys(row.span.trace_id for row in rows)
    facts = {
        "Trace": "<br>".join(f"<code>{escape(trace_id)}</code>" for trace_id in trace_ids) or "none",
        "Length": format_duration(page.scale.length_ns) if rows else "–",
        "Spans": str(len(rows)),
        "Errors": str(sum(row.span.status == "ERROR" for row in rows)),
        "Unexplained": format_duration(sum(gap.end_ns - gap.start_ns for gap in page.gaps)),
    }
    return (
        '<dl class="facts">'
        + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
        + "</dl>"
    )


def _services(page: _Page) -> str:
    items = (
        f'<li><span class="swatch {colour}" aria-hidden="true"></span>{escape(service or "no name")}</li>'
        for service, colour in page.colours.items()
    )
    return f'<ul class="services" aria-label="Services">{"".join(items)}</ul>'


def _waterfall(rows: Sequence[_Row], page: _Page) -> str:
    if not rows:
        return '<p class="soft">This trace holds no spans.</p>'
    step = page.scale.step_ns / page.scale.length_ns * 100
    ticks = "".join(
        f'<span class="tick" style="left:{page.scale.position(page.scale.start_ns + at_ns):.3f}%">'
        f"{page.scale.label(at_ns)}</span>"
        for at_ns in page.scale.ticks_ns
    )
    return "\n".join(
        [
            f'<section class="waterfall" aria-label="Waterfall" style="--step:{step:.4f}%">',
            f'<div class="axis" aria-hidden="true"><span>span</span><span class="length">length</span>'
            f'<div class="ticks">{ticks}</div></div>',
            "<ol>",
            *(_row(row, page) for row in rows),
            "</ol>",
            "</section>",
        ]
    )


def _row(row: _Row, page: _Page) -> str:
    span = row.span
    classes = page.colours[span.service] + (" failed" if span.status == "ERROR" else "")
    name = f'<span class="name"><b>{escape(span.name)}</b><span>{_badges(span)}</span></span>'
    length = f'<span class="length">{format_duration(span.end_ns - span.start_ns)}</span>'
    style = f"--depth:{min(row.depth, 20)}"
    return (
        f'<li id="{page.anchors[span.span_id]}" class="{classes}" style="{style}"><details>'
        f'<summary class="row">{name}{length}{_track(span, page)}</summary>'
        f'<div class="more">{_details(span, page)}</div></details></li>'
    )


def _badges(span: SpanRecord) -> str:
    kind = f'<span class="kind">{escape(span.kind)} {escape(span.service)}</span>'
    if span.status != "ERROR":
        return kind
    reason = _text(span.attributes.get(names.ERROR_TYPE, "error"))
    return f'{kind}<span class="kind error">✗ {escape(reason)}</span>'


def _track(span: SpanRecord, page: _Page) -> str:
    scale = page.scale
    unexplained = "".join(
        f'<span class="unexplained" style="{scale.style(gap.start_ns, gap.end_ns)}"></span>'
        for gap in page.gaps
        if gap.span is span
    )
    events = "".join(
        f'<span class="event" style="left:{scale.position(event.at_ns):.3f}%"></span>'
        for event in span.events
    )
    bar = f'<span class="bar" style="{scale.style(span.start_ns, span.end_ns)}"></span>'
    return f'<span class="track" aria-hidden="true">{bar}{unexplained}{events}</span>'


def _details(span: SpanRecord, page: _Page) -> str:
    return "".join(
        [
            "<h3>Span</h3>",
            _table(_own_fields(span, page)),
            _section("Attributes", _table((key, _value(value)) for key, value in span.attributes.items())),
            _section("Links", "".join(_link(link, page) for link in span.links)),
            _section("Events", _table(_event_rows(span, page))),
        ]
    )


def _own_fields(span: SpanRecord, page: _Page) -> Iterator[tuple[str, str]]:
    yield "service", escape(span.service)
    yield "starts", f"+{format_duration(span.start_ns - page.scale.start_ns)}"
    yield "status", escape(f"{span.status} {span.status_message}".strip())
    yield "span id", escape(span.span_id)
    if span.parent_id is not None:
        yield "parent", _reference(span.parent_id, page)
    if span.scope:
        yield "recorded by", escape(span.scope)
    if span.num_dropped:
        yield "cut off", f"{span.num_dropped} attributes, events or links, by the sender's limits"


def _event_rows(span: SpanRecord, page: _Page) -> Iterator[tuple[str, str]]:
    for event in span.events:
        pairs = ", ".join(f"{escape(key)}={_value(value)}" for key, value in event.attributes.items())
        yield (
            f"+{format_duration(event.at_ns - page.scale.start_ns)}",
            f"{escape(event.name)} {pairs}".strip(),
        )


def _link(link: LinkRecord, page: _Page) -> str:
    role = escape(_text(link.attributes.get(names.LINK_ROLE, "link")))
    rest = {key: value for key, value in link.attributes.items() if key != names.LINK_ROLE}
    return (
        f"<div>↗ {role} {_target(link, page)}"
        + "".join(f" {escape(key)}={_value(value)}" for key, value in rest.items())
        + "</div>"
    )


def _target(link: LinkRecord, page: _Page) -> str:
    if link.trace_id in page.trace_ids:
        return _reference(link.span_id, page)
    return f"<code>{escape(link.span_id)}</code> of trace <code>{escape(link.trace_id)}</code>"


def _reference(span_id: str, page: _Page) -> str:
    """Return a span's id, as a link where the span is on the page."""
    shown = f"<code>{escape(span_id)}</code>"
    anchor = page.anchors.get(span_id)
    return f'<a href="#{anchor}">{shown}</a>' if anchor else f"{shown} (not received)"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    """A head that is escaped here, and a cell that is HTML already."""
    lines = "".join(f'<tr><th scope="row">{escape(head)}</th><td>{cell}</td></tr>' for head, cell in rows)
    return f"<table>{lines}</table>" if lines else ""


def _section(title: str, content: str) -> str:
    return f"<h3>{title}</h3>{content}" if content else ""


def _gaps(page: _Page) -> str:
    if not page.gaps:
        return ""
    items = (
        f"<li><strong>{format_duration(gap.end_ns - gap.start_ns)}</strong> of "
        f'<a href="#{page.anchors[gap.span.span_id]}">{escape(gap.span.name)}</a>, '
        f"between {escape(gap.after)} and {escape(gap.before)}</li>"
        for gap in page.gaps
    )
    return f'<h2>Time that no span explains</h2><ul class="gaps">{"".join(items)}</ul>'


def _totals(trace: TraceTree) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(total.name)}</th><td>{total.count}</td>'
        f"<td>{format_duration(total.length_ns)}</td><td>{total.share:.0%}</td></tr>"
        for total in totals(trace)
    )
    if not rows:
        return ""
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("span", "count", "total", "share"))
    return (
        f'<h2>By name</h2><div class="wide"><table class="totals"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _value(value: Value) -> str:
    return escape(_text(value))


def _text(value: Value) -> str:
    match value:
        case str():
            return value
        case bytes():
            return f"0x{value.hex()}"
        case tuple():
            return ", ".join(map(_text, value))
        case Mapping():
            return ", ".join(f"{key}: {_text(inner)}" for key, inner in value.items())
    return str(value)
