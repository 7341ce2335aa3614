"""What Prometheus reads from the API as a process of its own, over a real Valkey."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from jobs.model import WorkerId
from jobs.redis_connection import connect
from jobs.redis_registry import RedisModelAnnouncer
from jobs.settings import JobsSettings
from telemetry import metrics
from telemetry.receiver import Receiver
from tests.support.job_factory import model_card
from tests.support.processes import wait_until
from tests.support.trace_invariants import check_trace_invariants
from tests.support.valkey import ValkeyServer, free_port, running_valkey

ROOT = Path(__file__).resolve().parents[2]
MODEL = "house/bytes"
BATCH = ("gen_ai_request_model", MODEL), ("throughline_priority", "batch")
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass
class Server:
    url: str
    valkey: ValkeyServer
    collector: Receiver

    def scrape(self) -> Samples:
        # Shorter than the store's own limit of 5 s: a scrape that waits for a store that is away fails here.
        reply = httpx.get(f"{self.url}/metrics", timeout=3)
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/plain")
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(reply.text)
            for sample in family.samples
        }

    def submit(self) -> httpx.Response:
        body = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 2}
        return httpx.post(f"{self.url}/v1/jobs", json=body, timeout=10)


def announce(valkey: ValkeyServer) -> None:
    settings = JobsSettings(redis_url=SecretStr(valkey.url))
    client = connect(settings)
    card = model_card(name=MODEL)
    RedisModelAnnouncer(client, settings).announce(card, "{}")
    RedisModelAnnouncer(client, settings).beat(MODEL, WorkerId("played"), now=1e12)
    client.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    port, log, collector = free_port(), tmp_path / "api.log", Receiver()
    collector.start()
    foreign = ("OTEL_", "THROUGHLINE_")
    with running_valkey() as valkey, log.open("wb") as stream:
        announce(valkey)
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "--factory", "api.app:create_app", "--port", str(port)],
            cwd=ROOT,
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith(foreign)},
                "THROUGHLINE_REDIS_URL": valkey.url,
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": collector.grpc_endpoint,
            },
            stdout=stream,
            stderr=stream,
        )
        try:
            wait_until(lambda: b"running on" in log.read_bytes(), timeout_seconds=60, what="the API listens")
            yield Server(f"http://127.0.0.1:{port}", valkey, collector)
            process.terminate()  # which sends the last spans
            process.wait(15)
            check_trace_invariants(collector.spans())
        finally:
            process.kill()
            process.wait()
            collector.stop()


def test_api_shows_its_queues_and_workers_and_never_waits_for_redis(server: Server) -> None:
    assert server.submit().status_code == 202
    assert server.submit().status_code == 202
    depth = ("throughline_queue_depth", frozenset(BATCH))
    wait_until(lambda: server.scrape().get(depth) == 2, timeout_seconds=10, what="two jobs are seen")

    samples = server.scrape()

    accepted = frozenset({*BATCH, ("throughline_outcome", "accepted")})
    assert samples["throughline_jobs_submitted_total", accepted] == 2
    assert samples["throughline_queue_open", frozenset(BATCH)] == 2
    assert 0 < samples["throughline_queue_oldest_age_seconds", frozenset(BATCH)] < 60
    assert samples["throughline_workers", frozenset(BATCH[:1])] == 1
    created = {"http_route": "/v1/jobs", "http_request_method": "POST", "http_response_status_code": "202"}
    timed = frozenset({*created.items(), ("url_scheme", "http")})
    assert samples["http_server_request_duration_seconds_count", timed] == 2
    told = {re.sub(r"(_seconds)?(_total|_count|_sum|_bucket)?$", "", name) for name, _ in samples}
    assert told - {"target_info"} <= {shape.name.replace(".", "_") for shape in metrics.METRICS}

    server.valkey.pause()
    wait_until(lambda: depth not in server.scrape(), timeout_seconds=15, what="the gauges are gone")
    server.valkey.resume()
    wait_until(lambda: depth in server.scrape(), timeout_seconds=15, what="the gauges are back")
    assert not [span for span in server.collector.spans() if "metrics" in str(span.attributes)]
