from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from telemetry.record import LinkRecord, SpanRecord
from telemetry.tree import Node, render, summarize, totals, tree

MS = 1_000_000
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


def span(name: str, start: int, end: int, parent: str | None = None, **fields: object) -> SpanRecord:
    """`start` and `end` in milliseconds; the name is the id."""
    given_fields = {"kind": "INTERNAL", "service": "api", **fields}
    return SpanRecord(
        trace_id=TRACE_ID,
        span_id=name,
        parent_id=parent,
        name=name,
        start_ns=start * MS,
        end_ns=end * MS,
        **given_fields,  # type: ignore[arg-type]  # test data
    )


def shape(node: Node) -> object:
    return (node.span.name, [shape(child) for child in node.children])


def text_of(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


JOB = [
    span("body", 30, 90, "process", service="worker"),
    span("server", 0, 100, kind="SERVER"),
    span(
        "process",
        20,
        95,
        "send",
        kind="CONSUMER",
        service="worker",
        links=(LinkRecord(TRACE_ID, "send", {}),),
    ),
    span("send", 5, 15, "server", kind="PRODUCER"),
    span("wait", 15, 100, "server"),
]


def test_tree_hangs_each_span_below_its_parent_by_start() -> None:
    [root] = tree(JOB).roots

    assert shape(root) == ("server", [("send", [("process", [("body", [])])]), ("wait", [])])


def test_tree_names_time_that_no_span_explains_and_no_other() -> None:
    gaps = [(gap.span.name, gap.after, gap.before, gap.duration_seconds) for gap in tree(JOB).gaps]

    assert gaps == [
        ("server", "its start", "send", 0.005),
        ("process", "its start", "body", 0.01),
        ("process", "body", "its end", 0.005),
    ]


def test_tree_overlooks_gaps_below_two_milliseconds_and_one_percent() -> None:
    short = [span("root", 0, 100), span("inner", 2, 98, "root")]
    long = [span("root", 0, 1000), span("inner", 10, 989, "root")]

    assert tree(short).gaps == ()
    assert [gap.before for gap in tree(long).gaps] == ["its end"]


def test_tree_makes_an_orphan_a_root_when_its_parent_never_came() -> None:
    assert [node.span.name for node in tree([span("a", 0, 1), span("b", 2, 3, "lost")]).roots] == ["a", "b"]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 9), st.integers(0, 50), st.integers(0, 50))))
def test_tree_holds_every_span_once_whatever_the_parents(parts: list[tuple[int, int, int, int]]) -> None:
    spans = [span(str(own), start, end, str(parent)) for own, parent, start, end in parts]

    held: list[str] = []

    def walk(node: Node) -> None:
        held.append(node.span.span_id)
        for child in node.children:
            walk(child)

    for root in tree(spans).roots:
        walk(root)
    assert sorted(held) == sorted({item.span_id for item in spans})


def test_rendering_shows_length_offset_kind_service_links_errors_and_gaps() -> None:
    failed = span("boom", 91, 92, "process", status="ERROR", attributes={"error.type": "timeout"})
    shown = text_of(render(tree([*JOB, failed])))

    assert "process  75.0 ms  +20.0 ms  CONSUMER  worker  ↗ link send" in shown
    assert "boom  1.0 ms  +91.0 ms  INTERNAL  api  ✗ timeout" in shown
    assert "5.0 ms of server unexplained, between its start and send" in shown
    assert TRACE_ID in shown


def test_rendering_names_the_trace_of_a_link_that_leads_out_and_counts_the_links_it_leaves_out() -> None:
    elsewhere = "8" * 32
    links = tuple(
        LinkRecord(elsewhere, f"{number:016x}", {"throughline.link.role": "joined"}) for number in range(7)
    )
    step = span("engine.step", 0, 1, attributes={"throughline.engine.step.batch_size": 7}, links=links)

    shown = " ".join(text_of(render(tree([step]))).split())

    assert f"batch_size=7 ↗ joined 00000000 of trace {elsewhere}, joined" in shown
    assert "and 3 more" in shown
    assert f"of trace {TRACE_ID}" not in text_of(render(tree(JOB)))


def test_rendering_takes_names_literally_when_they_look_like_markup() -> None:
    assert "[red]x[/red]" in text_of(render(tree([span("[red]x[/red]", 0, 1)])))
    assert "[red]x[/red]" in text_of(summarize(tree([span("[red]x[/red]", 0, 1)])))


def test_summary_adds_up_spans_of_one_name() -> None:
    spans = [span("root", 0, 100), *(span(f"s{i}", i, i + 10, "root") for i in range(2))]
    renamed = [SpanRecord(**{**_fields(item), "name": "step"}) if item.parent_id else item for item in spans]  # type: ignore[arg-type]  # test data
    line = next(line for line in text_of(summarize(tree(renamed))).splitlines() if "step" in line)

    assert line.split() == ["step", "2", "20.0", "ms", "20%"]


def test_share_is_of_the_whole_trace_when_the_request_ends_before_its_job() -> None:
    shares = {
        total.name: total.share for total in totals(tree([span("post", 0, 10), span("job", 5, 100, "post")]))
    }

    assert shares == {"post": 0.1, "job": 0.95}


def _fields(item: SpanRecord) -> dict[str, object]:
    return {name: getattr(item, name) for name in SpanRecord.__slots__}


def test_rendering_says_so_when_there_are_no_spans() -> None:
    assert "no spans" in text_of(render(tree([])))
