"""The API as a process of its own: uvicorn, real Valkey, real broker messages; the worker is played here."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest
import requests
from pydantic import SecretStr
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from jobs.model import JobId, WorkerId, new_lease_token
from jobs.redis_connection import connect
from jobs.redis_registry import RedisModelAnnouncer
from jobs.redis_store import RedisAttemptStore
from jobs.settings import JobsSettings
from jobs.store import ClaimOutcome
from telemetry.receiver import Receiver
from tests.support.job_factory import completed, model_card
from tests.support.trace_invariants import check_trace_invariants
from tests.support.trace_times import CROWDED_UNNAMED_NS
from tests.support.valkey import ValkeyServer, free_port, running_valkey

ROOT = Path(__file__).resolve().parents[2]
MODEL = "house/bytes"
BODY = {"model": MODEL, "prompt": "San Francisco is a"}
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CLIENT_SPAN = "b7ad6b7169203331"
QUEUE = "tl:celery:house/bytes.interactive"


class PlayedWorker:
    """Takes messages off the broker's list as Celery would, and settles their jobs."""

    def __init__(self, url: str) -> None:
        settings = JobsSettings(redis_url=SecretStr(url))
        self.client = connect(settings)
        self._store = RedisAttemptStore(self.client, settings)
        self._announcer = RedisModelAnnouncer(self.client, settings)

    def announce(self, *, now: float) -> None:
        vocabulary = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))}
        tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        card = model_card(name=MODEL)
        self._announcer.announce(card, tokenizer.to_str())
        self._announcer.beat(MODEL, WorkerId("played"), now=now)

    def take(self, queue: str = QUEUE) -> dict[str, Any]:
        """The next message; its job is not claimed yet."""
        taken: Any = self.client.brpop([queue], timeout=10)
        assert taken is not None, "no message came"
        message: dict[str, Any] = json.loads(taken[1])
        return message

    def settle(self, id: JobId) -> None:
        async def play() -> None:
            token = new_lease_token()
            claim = await self._store.claim(id, token, WorkerId("played"), now=1.0, lease_seconds=1e10)
            assert claim.outcome is ClaimOutcome.CLAIMED
            await self._store.settle(id, token, completed(), now=2.0)

        asyncio.run(play())


@dataclass
class Server:
    url: str
    process: subprocess.Popen[bytes]
    valkey: ValkeyServer
    worker: PlayedWorker
    collector: Receiver
    log: Path

    def post(self, path: str = "/v1/completions", **kwargs: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=kwargs.pop("json", BODY), timeout=30, **kwargs)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_valkey() as valkey:
        yield from _serve(valkey, tmp_path_factory.mktemp("api") / "api.log")


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """For tests that stop it or its Redis."""
    with running_valkey() as valkey:
        yield from _serve(valkey, tmp_path / "api.log")


def _serve(valkey: ValkeyServer, log: Path) -> Iterator[Server]:
    port, collector = free_port(), Receiver()
    collector.start()
    argv = [
        "-m",
        "uvicorn",
        "--factory",
        "api.app:create_app",
        "--port",
        str(port),
        "--timeout-graceful-shutdown",
        "1",
    ]
    environ = {
        **{
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("OTEL_", "THROUGHLINE_"))
        },
        "THROUGHLINE_REDIS_URL": valkey.url,
        "THROUGHLINE_SOCKET_TIMEOUT_SECONDS": "1",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": collector.grpc_endpoint,
    }
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, *argv], cwd=ROOT, env=environ, stdout=stream, stderr=stream
        )
    worker = PlayedWorker(valkey.url)
    worker.announce(now=1e12)  # a beat that stays fresh
    server = Server(f"http://127.0.0.1:{port}", process, valkey, worker, collector, log)
    try:
        _until_ready(server)
        yield server
        process.terminate()  # which sends the last spans
        process.wait(15)
        check_trace_invariants(
            collector.spans(),
            external=[CLIENT_SPAN],
            canaries=[BODY["prompt"]],
            unnamed_ns=CROWDED_UNNAMED_NS,  # tens of clients at once, and bodies of 20 MB
        )
    finally:
        process.kill()
        process.wait()
        worker.client.close()
        collector.stop()


def _until_ready(server: Server) -> None:
    deadline = monotonic() + 60
    while True:
        assert server.process.poll() is None, server.log.read_text()
        assert monotonic() < deadline, server.log.read_text()
        try:
            if httpx.get(f"{server.url}/health/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            threading.Event().wait(0.05)


def test_completion_travels_through_the_broker_in_the_clients_trace(server: Server) -> None:
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(server.post, headers={"traceparent": f"00-{TRACE_ID}-{CLIENT_SPAN}-01"})
        message = server.worker.take()
        server.worker.settle(JobId(message["headers"]["id"]))
        reply = call.result()

    id = message["headers"]["id"]
    assert reply.status_code == 200, reply.text
    assert reply.json()["id"] == f"cmpl-{id}"
    assert reply.headers["x-trace-id"] == TRACE_ID
    assert message["headers"]["traceparent"].split("-")[1] == TRACE_ID
    assert json.loads(base64.b64decode(message["body"]))[:2] == [[id], {}]
    assert "San Francisco" not in json.dumps(message)


def test_waiting_client_is_told_of_a_deadline_that_no_worker_meets(server: Server) -> None:
    body = {**BODY, "expires_after": 0.5}

    job = server.post("/v1/jobs", json=body, headers={"Prefer": "wait=30"}).json()

    assert job["status"] == "expired"
    assert job["attempts"] == 0
    message = server.worker.take("tl:celery:house/bytes.batch")
    assert message["headers"]["id"] == job["id"], "left to a worker, which drops it and tells the trace"
    assert server.worker.client.zcard("tl:deadlines") == 0


def test_no_span_of_a_completion_is_lost_when_the_server_stops(own_server: Server) -> None:
    server = own_server
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(server.post, headers={"traceparent": f"00-{TRACE_ID}-{CLIENT_SPAN}-01"})
        id = server.worker.take()["headers"]["id"]
        server.worker.settle(JobId(id))
        call.result()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(15)

    spans = {span.name: span for span in server.collector.trace(TRACE_ID)}
    top, send = spans["POST /v1/completions"], spans["send house/bytes.interactive"]
    steps = ["accept", "fetch result", "store job", "wait result"]
    assert sorted(spans) == sorted([top.name, send.name, *steps])
    assert (top.kind, top.parent_id) == ("SERVER", CLIENT_SPAN)
    assert send.kind == "PRODUCER"
    assert send.end_ns > send.start_ns
    assert {spans[name].parent_id for name in (send.name, *steps)} == {top.span_id}
    # What is read before there is a job cannot name it.
    assert {span.attributes.get("job.id") for span in spans.values() if span.name != "accept"} == {id}


def test_malformed_traceparent_starts_a_new_trace(server: Server) -> None:
    reply = server.post(
        "/v1/jobs", headers={"traceparent": f"00-{TRACE_ID}-nonsense-01", "Prefer": "respond-async"}
    )

    assert reply.status_code == 202
    assert reply.headers["x-trace-id"] != TRACE_ID
    assert reply.json()["trace_id"] == reply.headers["x-trace-id"]


@pytest.mark.parametrize("is_chunked", [False, True], ids=["announced", "chunked"])
def test_body_of_20_mb_is_answered_with_413(server: Server, is_chunked: bool) -> None:
    """With `requests`, the seed client's library, which sends its whole body before it reads."""
    megabyte = b"x" * 1_000_000
    body = (megabyte for _ in range(20)) if is_chunked else megabyte * 20

    reply = requests.post(
        f"{server.url}/v1/completions", data=body, headers={"Content-Type": "application/json"}, timeout=30
    )

    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "body_too_large"
    assert reply.headers["X-Trace-Id"]


def test_waiting_clients_are_answered_after_redis_was_killed_and_came_back(own_server: Server) -> None:
    server = own_server
    with ThreadPoolExecutor(20) as pool:
        calls = [pool.submit(server.post) for _ in range(20)]
        ids = [JobId(server.worker.take()["headers"]["id"]) for _ in calls]
        server.valkey.kill()
        refused = server.post("/v1/jobs")
        server.valkey.start()
        for id in ids:
            server.worker.settle(id)
        replies = [call.result() for call in calls]

    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert [reply.status_code for reply in replies] == [200] * 20
    assert server.post("/v1/jobs").status_code == 202


def test_hung_redis_is_answered_with_503_in_bounded_time_and_the_process_stays_live(
    own_server: Server,
) -> None:
    server = own_server
    server.valkey.pause()
    started = monotonic()
    with ThreadPoolExecutor(10) as pool:
        replies = list(pool.map(lambda _: server.post("/v1/jobs"), range(10)))
        live = httpx.get(f"{server.url}/health/live", timeout=1)
        ready = httpx.get(f"{server.url}/health/ready", timeout=10)
    server.valkey.resume()

    assert [reply.status_code for reply in replies] == [503] * 10
    assert monotonic() - started < 15
    assert (live.status_code, ready.status_code) == (200, 503)


def test_stop_ends_the_process_and_the_jobs_that_only_their_clients_wanted(own_server: Server) -> None:
    server = own_server
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(server.post)
        id = server.worker.take()["headers"]["id"]
        server.process.send_signal(signal.SIGTERM)
        returncode = server.process.wait(15)
        reply = call.result()

    assert returncode in (0, -signal.SIGTERM)
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "stopping"
    assert server.worker.client.hget(f"tl:job:{id}", "state") == "cancelled"
    assert server.worker.client.keys("tl:replies:*") == []
    assert "Traceback" not in server.log.read_text(), server.log.read_text()


def test_setting_that_breaks_its_rule_is_named(tmp_path: Path) -> None:
    environ = {**os.environ, "THROUGHLINE_MAX_PROMPTS": "none"}

    done = subprocess.run(
        [sys.executable, "-c", "import api.app; api.app.create_app()"],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode != 0
    assert "THROUGHLINE_MAX_PROMPTS='none'" in done.stderr


def test_redis_holds_no_connection_of_a_waiter(server: Server) -> None:
    """However many clients wait: one blocked read, and a pool for the questions."""
    with ThreadPoolExecutor(30) as pool:
        calls = [pool.submit(server.post) for _ in range(30)]
        ids = [JobId(server.worker.take()["headers"]["id"]) for _ in calls]
        clients: Any = server.worker.client.client_list()
        blocked = [client for client in clients if client["cmd"] == "xread" and "b" in client["flags"]]
        for id in ids:
            server.worker.settle(id)
        statuses = {call.result().status_code for call in calls}

    assert statuses == {200}
    assert len(blocked) == 1
