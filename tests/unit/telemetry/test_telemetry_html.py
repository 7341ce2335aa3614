from __future__ import annotations

import re
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from telemetry.html import render_html
from telemetry.record import EventRecord, LinkRecord, SpanRecord

MS = 1_000_000
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
HOSTILE = """</title></script><script>alert(1)</script><img src=x onerror="alert(1)">'"&$body${title}"""
VOID = {"meta", "br"}


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


JOB = [
    span("server", 0, 100, kind="SERVER"),
    span("send", 5, 15, "server", kind="PRODUCER"),
    span(
        "process",
        20,
        95,
        "send",
        kind="CONSUMER",
        service="worker",
        links=(LinkRecord(TRACE_ID, "send", {"throughline.link.role": "creation"}),),
        attributes={"job.attempt": 1, "tags": ("a", "b"), "raw": b"\x01", "map": {"k": 0.5}},
        events=(EventRecord("lease renewed", 50 * MS, {"left": 3}),),
    ),
    span("body", 30, 90, "process", service="worker", status="ERROR", attributes={"error.type": "timeout"}),
    span("wait", 15, 100, "server"),
]


class Page(HTMLParser):
    """The page taken apart; fails where tags do not close in their order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str, css_class: str = "") -> list[dict[str, str | None]]:
        return [
            attrs
            for name, attrs in self.tags
            if name == tag and (not css_class or css_class in str(attrs.get("class")).split())
        ]


def test_page_draws_each_bar_where_its_span_lies() -> None:
    bars = Page(render_html(JOB, title="t")).all("span", "bar")

    assert [bar["style"] for bar in bars] == [
        "left:0.000%;width:100.000%",
        "left:5.000%;width:10.000%",
        "left:20.000%;width:75.000%",
        "left:30.000%;width:60.000%",
        "left:15.000%;width:85.000%",
    ]


def test_page_indents_children_and_colours_by_service() -> None:
    rows = Page(render_html(JOB, title="t")).all("li", "s0") + Page(render_html(JOB, title="t")).all(
        "li", "s1"
    )

    assert [(row["style"], row["class"]) for row in rows] == [
        ("--depth:0", "s0"),
        ("--depth:1", "s0"),
        ("--depth:1", "s0"),
        ("--depth:2", "s1"),
        ("--depth:3", "s1 failed"),
    ]


def test_page_shows_kind_attributes_events_links_errors_and_totals() -> None:
    page = Page(render_html(JOB, title="Job job_1"))

    for shown in (
        "Job job_1", "CONSUMER", "job.attempt1", "tagsa, b", "raw0x01", "mapk: 0.5", "+50.0 ms",
        "lease renewed left=3",
        "↗ creation send", "✗ timeout", "Errors1", "CONSUMER worker", TRACE_ID,
    ):  # fmt: skip
        assert shown in page.text
    targets = {attrs.get("id") for attrs in page.all("li")}
    links = [str(attrs["href"]) for attrs in page.all("a")]
    assert links
    assert {link.removeprefix("#") for link in links} <= targets


def test_page_tells_a_link_into_another_trace_from_one_whose_span_did_not_come() -> None:
    links = (LinkRecord("8" * 32, "step-1", {}), LinkRecord(TRACE_ID, "lost-1", {}))
    page = Page(render_html([span("prefill", 0, 1, links=links)], title="t"))

    assert f"↗ link step-1 of trace {'8' * 32}" in page.text
    assert "↗ link lost-1 (not received)" in page.text


def test_page_hatches_and_lists_time_that_no_span_explains() -> None:
    page = Page(render_html(JOB, title="t"))

    assert [gap["style"] for gap in page.all("span", "unexplained")] == [
        "left:0.000%;width:5.000%",
        "left:20.000%;width:10.000%",
        "left:90.000%;width:5.000%",
    ]
    assert "5.0 ms of server, between its start and send" in page.text


def test_page_has_round_ticks_in_one_unit() -> None:
    text = Page(render_html([span("a", 0, 1400)], title="t")).text

    assert "0 s0.2 s0.4 s0.6 s0.8 s1 s1.2 s1.4 s" in text


def test_page_shows_hostile_text_as_text_wherever_it_stands() -> None:
    hostile = SpanRecord(
        trace_id=HOSTILE,
        span_id=HOSTILE,
        parent_id=HOSTILE + "x",
        name=HOSTILE,
        kind=HOSTILE,
        service=HOSTILE,
        start_ns=0,
        end_ns=MS,
        attributes={HOSTILE: HOSTILE, "error.type": HOSTILE, "map": {HOSTILE: (HOSTILE,)}},
        events=(EventRecord(HOSTILE, 1, {HOSTILE: HOSTILE}),),
        links=(LinkRecord(HOSTILE, HOSTILE + "y", {HOSTILE: HOSTILE, "throughline.link.role": HOSTILE}),),
        status="ERROR",
        status_message=HOSTILE,
        scope=HOSTILE,
    )
    gap_around = span("root", 0, 100, service=HOSTILE)
    inner = span(HOSTILE + "z", 40, 50, "root")

    page = Page(render_html([hostile, gap_around, inner], title=HOSTILE))

    assert not page.all("script")
    assert not page.all("img")
    assert page.text.count("<script>alert(1)</script>") >= 15
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_page_asks_the_network_for_nothing_and_forbids_scripts() -> None:
    html = render_html(JOB, title="t")
    page = Page(html)

    assert "default-src 'none'" in str(page.all("meta")[3]["content"])
    assert not re.search(r"https?:|url\(|@import|\bsrc=", html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"}
    assert "prefers-color-scheme: dark" in html
    assert page.all("html")[0]["lang"] == "en"


def test_page_says_so_when_there_are_no_spans() -> None:
    assert "This trace holds no spans." in Page(render_html([], title="t")).text


times = st.one_of(st.integers(0, 50), st.integers(0, 2**63))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 9), times, times)))
def test_page_holds_each_span_once_and_every_bar_inside_whatever_the_times(
    parts: list[tuple[int, int, int, int]],
) -> None:
    spans = [
        SpanRecord(
            trace_id=TRACE_ID,
            span_id=str(own),
            parent_id=str(parent),
            name="n",
            kind="INTERNAL",
            service="s",
            start_ns=start,
            end_ns=end,
        )
        for own, parent, start, end in parts
    ]

    page = Page(render_html(spans, title="t"))

    bars = page.all("span", "bar")
    assert len(bars) == len({own for own, *_ in parts})
    for bar in bars:
        left, width = map(float, re.findall(r"([\d.]+)%", str(bar["style"])))
        assert left + width <= 100.01
    assert len(page.all("span", "tick")) <= 9
