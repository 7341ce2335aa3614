"""The trace page in a real browser; needs playwright and a chromium, and is skipped without them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from telemetry.html import render_html
from telemetry.record import LinkRecord, SpanRecord

pytestmark = pytest.mark.browser

HOSTILE = (
    """<img src="http://127.0.0.1:9/x" onerror="document.title='hacked'">"""
    "<script>document.title='hacked'</script>"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on PATH")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page_url(tmp_path: Path) -> str:
    def span(span_id: str, start: int, end: int, parent: str | None, **more: Any) -> SpanRecord:
        given = {"name": span_id, "kind": "INTERNAL", "service": "api", **more}
        return SpanRecord(
            trace_id="0" * 32, span_id=span_id, parent_id=parent, start_ns=start * 10**6, end_ns=end * 10**6,
            **given,
        )  # fmt: skip

    spans = [
        span("root", 0, 100, None),
        span("half", 50, 100, "root", service="worker", links=(LinkRecord("0" * 32, "root", {}),)),
        span("hostile", 60, 70, "half", name=HOSTILE, attributes={"job.id": HOSTILE}, status="ERROR"),
        span("long", 60, 70, "half", name="a-name-without-any-space-" * 20, attributes={"k": "v" * 500}),
    ]
    path = tmp_path / "trace.html"
    path.write_text(render_html(spans, title="Job job_1"), encoding="utf-8")
    return path.as_uri()


def opened(browser: Any, page_url: str, *, width: int = 1280, scheme: str = "light") -> tuple[Any, list[str]]:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    heard: list[str] = []
    page.on("request", lambda request: heard.append(request.url))
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.goto(page_url)
    return page, heard


def test_page_asks_for_nothing_but_itself_and_runs_nobodys_script(browser: Any, page_url: str) -> None:
    page, heard = opened(browser, page_url)

    for row in page.locator("summary").all():
        row.click()

    assert heard == [page_url]
    assert page.title() == "Job job_1"


def test_page_opens_a_row_by_keyboard(browser: Any, page_url: str) -> None:
    page, _ = opened(browser, page_url)

    page.keyboard.press("Tab")
    page.keyboard.press("Enter")

    assert page.locator("details[open]").count() == 1
    assert page.get_by_role("heading", name="Span", exact=True).is_visible()


def test_page_draws_a_bar_as_long_as_its_span(browser: Any, page_url: str) -> None:
    page, _ = opened(browser, page_url)

    root, half = (page.locator(".bar").nth(index).bounding_box() for index in (0, 1))

    assert half["width"] == pytest.approx(root["width"] / 2, abs=1)
    assert half["x"] == pytest.approx(root["x"] + root["width"] / 2, abs=1)


@pytest.mark.parametrize("width", [320, 390, 736, 1280])
def test_page_never_scrolls_sideways_whatever_its_width(browser: Any, page_url: str, width: int) -> None:
    page, _ = opened(browser, page_url, width=width)

    for row in page.locator("summary").all():
        row.click()

    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_page_is_dark_when_the_reader_asks_for_it(browser: Any, page_url: str) -> None:
    def lightness(scheme: str) -> int:
        page, _ = opened(browser, page_url, scheme=scheme)
        return int(
            page.evaluate(
                "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => +a + +b)"
            )
        )

    assert lightness("light") > 700
    assert lightness("dark") < 100
