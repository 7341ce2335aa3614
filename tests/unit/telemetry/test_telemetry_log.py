from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest
from opentelemetry import context, trace

from telemetry.errors import SettingsError
from telemetry.log import LogFormat, configure_logging, logged_job
from telemetry.spans import extract

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
logger = logging.getLogger("test.telemetry")


@pytest.fixture(autouse=True)
def _root_logger_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []  # pytest's own must not be closed by a forced configuration
    yield
    root.handlers, root.level = handlers, level


@pytest.fixture
def _inside_a_span() -> Iterator[None]:
    token = context.attach(extract({"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}))
    assert trace.get_current_span().get_span_context().is_valid
    yield
    context.detach(token)


def lines(log_format: LogFormat, level: int = logging.INFO) -> io.StringIO:
    stream = io.StringIO()
    configure_logging("throughline-api", log_format, level=level, stream=stream)
    return stream


@pytest.mark.usefixtures("_inside_a_span")
def test_json_record_carries_the_ids_when_logged_inside_a_job_and_a_span() -> None:
    stream = lines(LogFormat.JSON)
    with logged_job("job-1"):
        logger.info("took %d ms", 5)

    entry = json.loads(stream.getvalue())
    assert entry.pop("time").endswith("Z")
    assert entry == {
        "level": "INFO",
        "service": "throughline-api",
        "logger": "test.telemetry",
        "job_id": "job-1",
        "trace_id": TRACE_ID,
        "span_id": SPAN_ID,
        "message": "took 5 ms",
    }


def test_json_record_is_one_line_with_its_exception_when_one_is_logged() -> None:
    stream = lines(LogFormat.JSON)
    try:
        raise ValueError("bad")
    except ValueError:
        logger.exception("failed")

    [line] = stream.getvalue().splitlines()
    assert "ValueError: bad" in json.loads(line)["exception"]


@pytest.mark.usefixtures("_inside_a_span")
def test_line_shows_time_level_service_job_trace_and_message() -> None:
    stream = lines(LogFormat.LINE)
    logger.warning("slow", extra={"job_id": "job-2"})

    _, rest = stream.getvalue().rstrip().split(" ", 1)
    assert rest == f"WARNING throughline-api job=job-2 trace={TRACE_ID} slow"


def test_line_has_no_ids_outside_a_job_and_a_span() -> None:
    stream = lines(LogFormat.LINE)
    logger.info("ready")

    assert stream.getvalue().rstrip().endswith("INFO    throughline-api ready")


def test_line_stays_one_line_when_the_message_has_breaks() -> None:
    stream = lines(LogFormat.LINE)
    logger.info("%s", "first\nERROR forged")

    assert len(stream.getvalue().splitlines()) == 1


def test_records_below_the_level_are_dropped() -> None:
    stream = lines(LogFormat.LINE, level=logging.WARNING)
    logger.info("quiet")

    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("value", "expected"), [("", LogFormat.LINE), ("line", LogFormat.LINE), ("JSON", LogFormat.JSON)]
)
def test_log_format_is_read_from_the_environment(value: str, expected: LogFormat) -> None:
    assert LogFormat.from_environment({"THROUGHLINE_LOG_FORMAT": value}) is expected


def test_log_format_names_variable_value_and_rule_when_refused() -> None:
    with pytest.raises(SettingsError, match=r"THROUGHLINE_LOG_FORMAT='xml': must be line or json"):
        LogFormat.from_environment({"THROUGHLINE_LOG_FORMAT": "xml"})


async def test_records_of_one_turn_are_written_together_when_it_ends_and_errors_at_once() -> None:
    stream = lines(LogFormat.LINE)

    logger.info("first")
    logger.info("second")
    before = stream.getvalue()
    await asyncio.sleep(0)
    written = stream.getvalue()
    logger.info("third")
    logger.error("fourth")

    assert before == ""
    assert [line.split()[-1] for line in written.splitlines()] == ["first", "second"]
    assert [line.split()[-1] for line in stream.getvalue().splitlines()] == [
        "first",
        "second",
        "third",
        "fourth",
    ]


async def test_record_of_another_thread_takes_those_before_it_along() -> None:
    stream = lines(LogFormat.LINE)

    logger.info("first")
    await asyncio.to_thread(logger.info, "second")

    assert [line.split()[-1] for line in stream.getvalue().splitlines()] == ["first", "second"]
