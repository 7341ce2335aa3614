from __future__ import annotations

import ast
from dataclasses import replace

import pytest

from cli.commands.demo import own_environment
from cli.demo import seed_client
from cli.demo.scenario import is_whole, job_id_of, seed_spans
from cli.errors import DemoError
from telemetry import names
from telemetry.record import SpanRecord

TRACE, OTHER_TRACE = "a" * 32, "b" * 32


def span(name: str, kind: str, *, id: str, parent: str | None, **attributes: str | int) -> SpanRecord:
    return SpanRecord(
        trace_id=TRACE, span_id=id, parent_id=parent, name=name, kind=kind, service="throughline-api",
        start_ns=0, end_ns=1, attributes={key.replace("_", "."): value for key, value in attributes.items()},
    )  # fmt: skip


CLIENT = replace(span(seed_client.SPAN, "CLIENT", id="1", parent=None), service=seed_client.SERVICE)
GENERATION = replace(
    span("text_completion", "INTERNAL", id="5", parent="4"), attributes={names.GEN_AI_USAGE_OUTPUT_TOKENS: 3}
)
SPANS = [
    CLIENT,
    span("POST /v1/completions", "SERVER", id="2", parent="1", job_id="job_7"),
    span("send", "PRODUCER", id="3", parent="2"),
    span("process", "CONSUMER", id="4", parent="3"),
    GENERATION,
]


def test_trace_is_whole_only_with_every_span_of_the_chain() -> None:
    assert is_whole(SPANS)
    for missing in range(len(SPANS)):
        assert not is_whole(SPANS[:missing] + SPANS[missing + 1 :])


def test_seed_spans_are_those_of_the_clients_own_trace() -> None:
    foreign = replace(CLIENT, trace_id=OTHER_TRACE, service="somebody-else")

    assert seed_spans([foreign, *SPANS]) == SPANS
    assert seed_spans([foreign]) == []


def test_job_is_found_by_the_span_that_names_it() -> None:
    assert job_id_of(SPANS) == "job_7"
    with pytest.raises(DemoError, match="names its job"):
        job_id_of([CLIENT])


def test_seed_client_differs_in_its_url_only_when_the_port_is_another() -> None:
    original = seed_client.source(seed_client.URL)
    moved = seed_client.source("http://127.0.0.1:8123")

    assert original == seed_client.PATH.read_text()
    assert moved.replace("http://127.0.0.1:8123", seed_client.URL) == original
    ast.parse(moved)


def test_demo_is_not_aimed_at_somebody_elses_parts_by_the_environment() -> None:
    base = {
        "PATH": "/bin",
        "REDIS_URL": "redis://prod/0",
        "THROUGHLINE_MODEL": "/models/big",
        "OTEL_SDK_DISABLED": "true",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "grpc://prod:4317",
    }

    own = own_environment(base)

    assert own.pop("THROUGHLINE_KEY_PREFIX").startswith("tl-demo-")
    assert own == {"PATH": "/bin"}
