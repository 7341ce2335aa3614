"""Messages through a real broker to a real worker process, and the spans that a collector gets of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from telemetry import names
from telemetry.receiver import Receiver, SpanRecord
from tests.support.trace_invariants import check_trace_invariants
from tests.support.valkey import running_valkey

ROOT = Path(__file__).parents[2]
QUEUE = "models.tiny"
SECRET = "San Francisco is a"
# plain 1, retry 3, failure 1, rejected 2, again 2, twice 2
NUM_DELIVERIES = 11
OWN_SPANS = {"body", "meet first", "meet second", "afterwards"}


@dataclass
class Drill:
    """All spans of one run, by scenario."""

    spans: list[SpanRecord]
    trace_ids: Mapping[str, str]

    def of(self, scenario: str, kind: str | None = None) -> list[SpanRecord]:
        trace_id = self.trace_ids[scenario]
        found = [s for s in self.spans if s.trace_id == trace_id and kind in (None, s.kind)]
        return sorted(found, key=lambda span: span.start_ns)

    def named(self, scenario: str, name: str) -> SpanRecord:
        [span] = [span for span in self.of(scenario) if span.name == name]
        return span


@pytest.fixture(scope="module", params=["plain", "wrapped"])
def drill(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Drill:
    """Publisher and worker are processes, with and without `opentelemetry-instrument` around them."""
    launcher = str(Path(sys.executable).with_name("opentelemetry-instrument"))
    wrapper = [launcher] if request.param == "wrapped" else []
    return _run_drill(wrapper, {}, tmp_path_factory.mktemp("worker") / "worker.log")


def _run_drill(wrapper: list[str], more_environ: dict[str, str], log: Path) -> Drill:
    with Receiver() as receiver, running_valkey(tcp=True) as broker:
        environ = {
            **os.environ,
            "TEST_BROKER_URL": broker.url,
            "PYTHONPATH": str(ROOT),
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": receiver.grpc_endpoint,
            "OTEL_EXPORTER_OTLP_TRACES_INSECURE": "true",
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_LOGS_EXPORTER": "none",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
            **more_environ,
        }
        worker = _start_worker(wrapper, environ, log)
        try:
            trace_ids = _publish(wrapper, environ)
            finished = receiver.wait_for(lambda spans: _num_deliveries(spans) >= NUM_DELIVERIES, 40)
        finally:
            worker.send_signal(signal.SIGTERM)
            worker.wait(20)
        assert finished, log.read_text()
        return Drill(receiver.spans(), trace_ids)


def _start_worker(wrapper: list[str], environ: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    argv = "celery -A tests.support.telemetry_celery_app worker -P threads -c 4 --without-mingle"
    with log.open("wb") as output:
        return subprocess.Popen(
            [*wrapper, sys.executable, "-m", *argv.split()],
            env=environ,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _publish(wrapper: list[str], environ: dict[str, str]) -> dict[str, str]:
    done = subprocess.run(
        [*wrapper, sys.executable, "-m", "tests.support.telemetry_publisher"],
        env=environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    trace_ids: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return trace_ids


def _num_deliveries(spans: list[SpanRecord]) -> int:
    return sum(span.kind == "CONSUMER" for span in spans)


def test_every_trace_keeps_the_rules_but_of_ids_that_no_job_would_have(drill: Drill) -> None:
    """`twice` sends two messages of one id, `again` one job's second message under an id of its own."""
    unlike = {drill.trace_ids["twice"], drill.trace_ids["again"]}
    check_trace_invariants(
        [span for span in drill.spans if span.trace_id not in unlike],
        foreign_names={*drill.trace_ids, *OWN_SPANS},
        canaries=[SECRET],
        failed_job_ids=["failure"],
    )


def test_message_is_one_trace_with_a_linked_process_below_its_send_when_it_is_run(drill: Drill) -> None:
    [send] = drill.of("plain", "PRODUCER")
    [process] = drill.of("plain", "CONSUMER")
    body = drill.named("plain", "body")

    assert [span.name for span in drill.of("plain")] == ["plain", f"send {QUEUE}", f"process {QUEUE}", "body"]
    assert send.parent_id == drill.named("plain", "plain").span_id
    assert process.parent_id == send.span_id
    assert [link.span_id for link in process.links] == [send.span_id]
    assert body.parent_id == process.span_id
    assert body.attributes["tenant"] == "acme"
    assert (send.status, process.status) == ("UNSET", "UNSET")


def test_message_spans_carry_the_attributes_of_the_table_and_no_others_when_it_is_run(drill: Drill) -> None:
    for kind, operation in (("PRODUCER", "send"), ("CONSUMER", "process")):
        [span] = drill.of("plain", kind)
        attributes = dict(span.attributes)
        if kind == "PRODUCER":
            assert attributes.pop(names.SERVER_ADDRESS) == "127.0.0.1"
            assert isinstance(attributes.pop(names.SERVER_PORT), int)
        assert attributes == {
            "messaging.system": "redis",
            "messaging.operation.name": operation,
            "messaging.operation.type": operation,
            "messaging.destination.name": QUEUE,
            "messaging.message.id": "plain",
            "job.id": "plain",
            "throughline.task.name": "test.body",
        }


def test_attempts_are_siblings_below_the_first_send_when_a_task_is_retried(drill: Drill) -> None:
    [send] = drill.of("retry", "PRODUCER")
    attempts = drill.of("retry", "CONSUMER")
    resent = drill.of("retry", "CLIENT")

    assert [span.parent_id for span in attempts] == [send.span_id] * 3
    assert [span.status for span in attempts] == ["ERROR", "ERROR", "UNSET"]
    assert [span.attributes.get(names.ERROR_TYPE) for span in attempts[:2]] == ["ConnectionError"] * 2
    assert [span.parent_id for span in resent] == [span.span_id for span in attempts[:2]]
    assert {link.span_id for span in resent for link in span.links} == {send.span_id}


def test_redelivery_is_a_sibling_below_the_same_send_when_a_message_is_given_back(drill: Drill) -> None:
    [send] = drill.of("rejected", "PRODUCER")
    deliveries = drill.of("rejected", "CONSUMER")

    assert [span.parent_id for span in deliveries] == [send.span_id] * 2
    assert [span.status for span in deliveries] == ["UNSET", "UNSET"]
    assert drill.of("rejected", "CLIENT") == []


def test_process_span_is_an_error_without_the_message_when_a_task_raises(drill: Drill) -> None:
    [process] = drill.of("failure", "CONSUMER")

    assert (process.status, process.attributes[names.ERROR_TYPE]) == ("ERROR", "ValueError")
    assert [event.name for event in process.events] == ["exception"]
    assert "telemetry_celery_app.py" in str(process.events[0].attributes["exception.stacktrace"])
    assert SECRET not in str(drill.spans)


def test_send_span_has_its_real_length_when_the_task_is_only_known_by_name(drill: Drill) -> None:
    [send] = drill.of("by_name", "PRODUCER")
    outer = drill.named("by_name", "by_name")

    assert send.name == "send nobody"
    assert send.end_ns - send.start_ns > (outer.end_ns - outer.start_ns) / 2


def test_message_joins_the_trace_of_its_job_when_it_is_published_again(drill: Drill) -> None:
    outer = drill.named("again", "again")
    [resent] = drill.of("again", "CLIENT")
    [process] = [s for s in drill.of("again", "CONSUMER") if s.attributes[names.JOB_ID] == "again-2"]

    assert resent.parent_id == outer.span_id
    assert process.parent_id == outer.span_id
    assert len(drill.of("again", "PRODUCER")) == 1


def test_process_spans_stay_apart_when_one_message_is_delivered_twice_at_once(drill: Drill) -> None:
    processes = {span.span_id: span for span in drill.of("twice", "CONSUMER")}
    first, second = drill.named("twice", "meet first"), drill.named("twice", "meet second")

    assert len(processes) == 2
    assert {first.parent_id, second.parent_id} == set(processes)
    for span in (first, second):
        process = processes[str(span.parent_id)]
        assert process.start_ns <= span.start_ns <= span.end_ns <= process.end_ns


def test_send_span_ends_in_error_and_leaves_nothing_behind_when_the_broker_is_gone(drill: Drill) -> None:
    outer = drill.named("dead_broker", "dead_broker")
    [send] = drill.of("dead_broker", "PRODUCER")

    assert (send.status, send.attributes[names.ERROR_TYPE]) == ("ERROR", "OperationalError")
    assert drill.named("dead_broker", "afterwards").parent_id == outer.span_id


def test_no_span_or_attribute_of_the_package_is_left_when_corrected(drill: Drill) -> None:
    assert not [span.name for span in drill.spans if span.name.startswith(("apply_async/", "run/"))]
    keys = {key for span in drill.spans for key in span.attributes}
    assert not [key for key in keys if key.startswith("celery.")]
    assert not keys & {"messaging.destination", "messaging.destination_kind", "messaging.conversation_id"}


def test_process_is_the_root_of_its_own_trace_when_only_links_are_wanted(tmp_path: Path) -> None:
    drill = _run_drill([], {"THROUGHLINE_TRACE_LINKS_ONLY": "true"}, tmp_path / "worker.log")
    [send] = drill.of("plain", "PRODUCER")
    [process] = [s for s in drill.spans if s.kind == "CONSUMER" and s.attributes[names.JOB_ID] == "plain"]
    [body] = [s for s in drill.spans if s.name == "body" and s.parent_id == process.span_id]

    assert process.parent_id is None
    assert process.trace_id != send.trace_id
    assert [(link.trace_id, link.span_id) for link in process.links] == [(send.trace_id, send.span_id)]
    assert body.attributes["tenant"] == "acme"
