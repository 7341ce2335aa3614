from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.__main__ import _throughline
from cli.client import JobView
from cli.commands.trace import command
from cli.errors import CliError, TraceViewerError
from cli.stack import state, viewer
from cli.stack.viewer import ViewerAddress
from cli.viewer_client import is_whole
from telemetry.record import SpanRecord
from telemetry.settings import TelemetrySettings

ADDRESS = ViewerAddress(
    "http://127.0.0.1:1", "grpc://127.0.0.1:2", "http://127.0.0.1:1/v1/traces", "http://127.0.0.1:3"
)
JOB_ID = "job_1"


def span(kind: str, span_id: str, parent: str | None, job_id: str = JOB_ID) -> SpanRecord:
    return SpanRecord(
        trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
        span_id=span_id,
        parent_id=parent,
        name=kind,
        kind=kind,
        service="s",
        start_ns=0,
        end_ns=1,
        attributes={"job.id": job_id},
    )


def job(*, done: bool, attempts: int) -> JobView:
    return JobView({"id": JOB_ID, "status": "completed", "done": done, "attempts": attempts})


SERVER = span("SERVER", "a", None, "other")
SENT = span("PRODUCER", "b", "a")
LOST = replace(span("INTERNAL", "e", "b"), attributes={"job.id": JOB_ID, "job.attempt": 1})
FIRST, SECOND = span("CONSUMER", "c", "b"), span("CONSUMER", "d", "b")


@pytest.mark.parametrize(
    ("spans", "is_done", "attempts", "expected"),
    [
        ([SERVER, SENT, FIRST], True, 1, True),
        ([SERVER, SENT], True, 0, True),
        ([SERVER, SENT, FIRST, SECOND], True, 2, True),
        ([SERVER, SENT, FIRST], True, 2, False),
        ([SERVER, SENT, FIRST], False, 1, False),
        ([SERVER, SENT, LOST, FIRST], True, 2, True),
        ([SENT, FIRST], True, 1, False),
        ([SERVER, FIRST], True, 1, False),
        ([], True, 0, False),
    ],
)
def test_trace_is_whole_once_the_request_the_message_and_each_attempt_have_come(
    spans: list[SpanRecord], is_done: bool, attempts: int, expected: bool
) -> None:
    assert is_whole(job(done=is_done, attempts=attempts), spans) is expected


def test_viewer_says_where_it_is_while_it_runs_and_no_longer(tmp_path: Path) -> None:
    with state.hold(tmp_path, url="http://x") as folder:
        with viewer.viewing(folder, api_url="http://x") as address:
            assert viewer.find(tmp_path) == address
            assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
        assert viewer.find(tmp_path) is None


def test_note_of_a_killed_stack_is_gone_when_the_next_takes_its_folder(tmp_path: Path) -> None:
    (tmp_path / state.VIEWER_FILE).write_text("{}")

    with state.hold(tmp_path, url="http://x"):
        assert viewer.find(tmp_path) is None


@pytest.mark.parametrize("content", ["", "[]", '"x"', '{"read_url": 1}', "nonsense"])
def test_note_is_refused_with_its_path_when_it_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / state.VIEWER_FILE).write_text(content)

    with pytest.raises(TraceViewerError, match=str(tmp_path)):
        viewer.find(tmp_path)


def test_viewer_names_the_port_when_it_is_taken(tmp_path: Path) -> None:
    with state.hold(tmp_path, url="http://x") as folder, viewer.viewing(folder, api_url="http://x") as first:
        port = int(first.read_url.rpartition(":")[2])
        with (
            pytest.raises(TraceViewerError, match=rf"--trace-viewer: .*{port}"),
            viewer.viewing(folder, api_url="http://x", http_port=port),
        ):
            pass
        assert viewer.find(tmp_path) == first


def test_stack_sends_its_spans_to_the_viewer_whatever_its_environment_says() -> None:
    base = {
        "HOME": "/h",
        "OTEL_SDK_DISABLED": "true",
        "OTEL_TRACES_EXPORTER": "none",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://elsewhere:4317",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    environ = viewer.environment(ADDRESS, base)
    settings = TelemetrySettings.from_environment(environ)

    assert environ["HOME"] == "/h"
    assert environ["THROUGHLINE_TRACE_URL_TEMPLATE"] == "http://127.0.0.1:1/trace/{trace_id}"
    assert environ["OTEL_BSP_SCHEDULE_DELAY"] == "100"
    assert not settings.is_disabled
    assert "127.0.0.1:2" in str(settings)
    assert "elsewhere" not in str(settings)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (
            ["--trace-viewer", "--otlp-traces-endpoint", "grpc://h:4317"],
            "give --trace-viewer or --otlp-traces-endpoint, not both",
        ),
        (["--trace-viewer-grpc-port", "4317"], "--trace-viewer-grpc-port needs --trace-viewer"),
        (["--trace-viewer", "--trace-viewer-http-port", "8000"], "must differ: 8000, 8000"),
    ],
)
def test_up_is_refused_when_options_of_the_viewer_contradict(arguments: list[str], rule: str) -> None:
    result = CliRunner().invoke(_throughline, ["up", *arguments])

    assert result.exit_code == 2
    assert rule in " ".join(result.output.split())


@pytest.mark.parametrize("subject", ["a/b", "../x", "job 1", "", "x" * 200])
def test_trace_refuses_what_is_no_id(subject: str) -> None:
    result = CliRunner().invoke(_throughline, ["trace", "--", subject])

    assert result.exit_code == 2
    assert "must be a job id (job_…) or a trace id (32 hex digits)" in " ".join(result.output.split())


def test_trace_names_the_ways_out_when_no_viewer_runs(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["4bf92f3577b34da6a3ce929d0e0e4736", "--state-dir", str(tmp_path)])

    assert isinstance(result.exception, CliError)
    for way in (f"--state-dir {tmp_path}", "throughline up --trace-viewer", "--otlp-traces-endpoint"):
        assert way in str(result.exception)


def test_trace_says_that_the_viewer_is_gone_when_nobody_listens_any_more(tmp_path: Path) -> None:
    with state.hold(tmp_path, url="http://x") as folder, viewer.viewing(folder, api_url="http://x"):
        note = folder.trace_viewer.read_text()
    folder.trace_viewer.write_text(note)

    result = CliRunner().invoke(command, ["4bf92f3577b34da6a3ce929d0e0e4736", "--state-dir", str(tmp_path)])

    assert isinstance(result.exception, TraceViewerError)
    assert json.loads(note)["read_url"] in str(result.exception)
    assert "has ended" in str(result.exception)
    assert os.listdir(tmp_path)
