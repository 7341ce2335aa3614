"""What Prometheus reads from a real worker."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.model_folders import make_model_folder
from tests.support.processes import wait_until
from tests.support.queue_lab import MODEL, QueueLab, queue_lab
from tests.support.valkey import free_port


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[QueueLab]:
    folder = tmp_path / "llama"
    make_model_folder("llama", folder)
    with queue_lab(folder, tmp_path) as lab:
        yield lab


def scrape(port: int) -> dict[str, float]:
    """Values by sample name, summed over labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        text = reply.read().decode()
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
            assert sample.labels.get("gen_ai_request_model", MODEL) == MODEL
    return values


def test_worker_tells_of_generations_steps_and_attempts_on_its_port(lab: QueueLab) -> None:
    port = free_port()
    worker = lab.start_worker(THROUGHLINE_METRICS_PORT=str(port))
    lab.wait_final([lab.submit(max_tokens=8, prompt_length=10) for _ in range(3)])
    wait_until(
        lambda: scrape(port).get("throughline_attempts_total") == 3,
        timeout_seconds=5,
        what="three attempts are counted",
    )

    values = scrape(port)

    for name in ("server_request_duration", "server_time_to_first_token", "server_time_per_output_token"):
        assert values[f"gen_ai_{name}_seconds_count"] == 3
    assert values["gen_ai_client_inference_usage_input_tokens_total"] == 30
    assert values["gen_ai_client_inference_usage_output_tokens_total"] == 24
    assert values["throughline_queue_wait_seconds_count"] == 3
    assert values["throughline_engine_step_duration_seconds_count"] >= 8
    assert values["throughline_engine_kv_cache_blocks_total"] > 0
    assert values["throughline_engine_requests_running"] == 0

    neighbour = lab.start_worker(THROUGHLINE_METRICS_PORT=str(port))
    assert neighbour.log().count("no metrics on 127.0.0.1") == 1
    assert worker.stop() == 0
    assert neighbour.stop() == 0
