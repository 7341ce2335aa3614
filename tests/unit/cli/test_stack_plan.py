from __future__ import annotations

from pathlib import Path

from cli.settings import ServeOptions
from cli.stack.plan import EmbeddedRedis, StackOptions, stages
from cli.stack.policy import GiveUp, Restart, decide
from cli.stack.redis_server import ServerBinary

EMBEDDED = EmbeddedRedis(
    ServerBinary(Path("/bin/valkey-server"), "PATH", (9, 1, 2)), Path("/s/redis"), Path("/s/r.sock")
)


def options(**more: object) -> StackOptions:
    serve = ServeOptions(redis_url="unix:///s/r.sock", otlp_traces_endpoint="grpc://h:4317")
    return StackOptions(
        serve, **{"host": "0.0.0.0", "port": 8080, "num_workers": 2, "grace_seconds": 20.0, **more}
    )  # type: ignore[arg-type]


def test_stack_starts_redis_then_workers_then_the_api() -> None:
    planned = stages(options(), EMBEDDED, {"HOME": "/home/me"})

    assert [[process.name for process in stage.processes] for stage in planned] == [
        ["redis"], ["worker-1", "worker-2"], ["api"],
    ]  # fmt: skip


def test_stack_runs_no_redis_when_somebody_else_does() -> None:
    assert stages(options(), None, {})[0].processes[0].name == "worker-1"


def test_every_process_of_ours_gets_the_same_settings() -> None:
    _, workers, api = stages(options(), EMBEDDED, {"HOME": "/home/me"})

    for process in (*workers.processes, *api.processes):
        assert process.environ["THROUGHLINE_REDIS_URL"] == "unix:///s/r.sock"
        assert process.environ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] == "grpc://h:4317"
        assert process.environ["HOME"] == "/home/me"


def test_worker_hands_back_its_jobs_before_it_would_be_killed() -> None:
    worker = stages(options(), None, {})[0].processes[0]

    assert float(worker.environ["THROUGHLINE_SHUTDOWN_GRACE_SECONDS"]) < worker.grace_seconds == 20.0


def test_broken_model_stops_one_worker_and_not_the_stack() -> None:
    worker = stages(options(), None, {})[0].processes[0]

    assert isinstance(decide(worker.policy, exit_status=3, ran_seconds=5, quick_failures=0), GiveUp)
    assert isinstance(decide(worker.policy, exit_status=-9, ran_seconds=5, quick_failures=99), Restart)
    assert not worker.is_vital


def test_demo_cannot_do_without_its_worker() -> None:
    worker = stages(options(are_workers_vital=True), None, {})[0].processes[0]

    assert worker.is_vital


def test_url_is_one_that_a_client_on_this_machine_can_open() -> None:
    assert options().url == "http://127.0.0.1:8080"
    assert options(host="192.0.2.7").url == "http://192.0.2.7:8080"
