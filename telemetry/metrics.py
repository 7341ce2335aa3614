"""Every metric that this project emits: name, kind, unit, bounds, and the attributes it may carry.

The `gen_ai.*` ones are the server histograms and the usage counters of the GenAI conventions, still in
development, as are the `otel.sdk.*` ones; the `http.*` one is stable. Where a duration holds waiting, the
bounds are the conventions' own with larger ones appended, for a job may have waited in a queue for an hour.
What no convention covers lies under `throughline.`.

Attributes have few values each: served models, priorities, outcomes and reasons; never an id, never text.
`METRICS` is the same as data: `README.md` shows it and tests hold the two, and what is emitted, together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

from opentelemetry.metrics import CallbackOptions, Counter, Histogram, Meter, Observation

from telemetry import names

METER: Final = "throughline"

MODEL: Final = names.GEN_AI_REQUEST_MODEL
PRIORITY: Final = "throughline.priority"
OUTCOME: Final = "throughline.outcome"
MODALITY: Final = "gen_ai.token.modality"
COMPONENT: Final = "otel.component.type"
HTTP_METHOD: Final = "http.request.method"
HTTP_SCHEME: Final = "url.scheme"
HTTP_ROUTE: Final = "http.route"
HTTP_STATUS: Final = "http.response.status_code"

REQUEST_DURATION: Final = "gen_ai.server.request.duration"
TIME_TO_FIRST_TOKEN: Final = "gen_ai.server.time_to_first_token"
TIME_PER_OUTPUT_TOKEN: Final = "gen_ai.server.time_per_output_token"
INPUT_TOKENS: Final = "gen_ai.client.inference.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.client.inference.usage.output_tokens"
CACHED_TOKENS: Final = "gen_ai.client.inference.usage.cache_read.input_tokens"
QUEUE_WAIT: Final = "throughline.queue.wait"
QUEUE_DEPTH: Final = "throughline.queue.depth"
QUEUE_OPEN: Final = "throughline.queue.open"
QUEUE_OLDEST_AGE: Final = "throughline.queue.oldest.age"
JOBS_SUBMITTED: Final = "throughline.jobs.submitted"
JOBS_REPUBLISHED: Final = "throughline.jobs.republished"
ATTEMPTS: Final = "throughline.attempts"
LEASE_RENEWALS: Final = "throughline.lease.renewals"
WORKERS: Final = "throughline.workers"
STEP_DURATION: Final = "throughline.engine.step.duration"
PREEMPTIONS: Final = "throughline.engine.preemptions"
PROPOSED_TOKENS: Final = "throughline.engine.proposed_tokens"
ACCEPTED_TOKENS: Final = "throughline.engine.accepted_tokens"
REQUESTS_RUNNING: Final = "throughline.engine.requests.running"
REQUESTS_WAITING: Final = "throughline.engine.requests.waiting"
BLOCKS_USED: Final = "throughline.engine.kv_cache.blocks.used"
BLOCKS_TOTAL: Final = "throughline.engine.kv_cache.blocks.total"
HTTP_DURATION: Final = "http.server.request.duration"
SPANS_PROCESSED: Final = "otel.sdk.processor.span.processed"
SPANS_EXPORTED: Final = "otel.sdk.exporter.span.exported"

Kind = Literal["counter", "histogram", "gauge"]


@dataclass(frozen=True, slots=True)
class MetricShape:
    """One metric; `optional` attributes stand on some of its series only.

    `bounds` are the upper edges of a histogram's buckets, in its unit.
    """

    name: str
    kind: Kind
    unit: str
    made_by: Literal["api", "worker", "api, worker"]
    description: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


# fmt: off
STANDARD_DURATION_BOUNDS: Final = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)
STANDARD_FIRST_TOKEN_BOUNDS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)
STANDARD_OUTPUT_TOKEN_BOUNDS: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
)
STANDARD_HTTP_BOUNDS: Final = (
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)
_HTTP_BOUNDS = (*STANDARD_HTTP_BOUNDS, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 2560.0, 7680.0)
_DURATION_BOUNDS = (*STANDARD_DURATION_BOUNDS, 163.84, 327.68, 655.36, 1310.72, 2621.44, 7680.0)
_WAIT_BOUNDS = (*STANDARD_FIRST_TOKEN_BOUNDS, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 2560.0, 7680.0)
_OUTPUT_TOKEN_BOUNDS = (*STANDARD_OUTPUT_TOKEN_BOUNDS, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 7680.0)
_STEP_BOUNDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)
# fmt: on

_GENERATION = (names.GEN_AI_OPERATION_NAME, names.GEN_AI_PROVIDER_NAME, MODEL)
_SERVED = (*_GENERATION, PRIORITY)
_USED = (*_GENERATION, MODALITY)
_QUEUE = (MODEL, PRIORITY)
_ERROR = (names.ERROR_TYPE,)

METRICS: Final[tuple[MetricShape, ...]] = (
    MetricShape(
        REQUEST_DURATION,
        "histogram",
        "s",
        "worker",
        "From publishing to the last token of a generation, or to the end of a job without one",
        _SERVED,
        _ERROR,
        _DURATION_BOUNDS,
    ),
    MetricShape(
        TIME_TO_FIRST_TOKEN,
        "histogram",
        "s",
        "worker",
        "From publishing to the first token: queue, engine wait and prefill",
        _SERVED,
        bounds=_WAIT_BOUNDS,
    ),
    MetricShape(
        TIME_PER_OUTPUT_TOKEN,
        "histogram",
        "s",
        "worker",
        "Mean time between the tokens of one generation, after its first",
        _SERVED,
        bounds=_OUTPUT_TOKEN_BOUNDS,
    ),
    MetricShape(INPUT_TOKENS, "counter", "{token}", "worker", "Prompt tokens of generations", _USED),
    MetricShape(OUTPUT_TOKENS, "counter", "{token}", "worker", "Tokens generated", _USED),
    MetricShape(
        CACHED_TOKENS, "counter", "{token}", "worker", "Prompt tokens found in the prefix cache", _USED
    ),
    MetricShape(
        QUEUE_WAIT, "histogram", "s", "worker", "From publishing to the claim", _QUEUE, bounds=_WAIT_BOUNDS
    ),
    MetricShape(
        ATTEMPTS,
        "counter",
        "{attempt}",
        "worker",
        "Deliveries and what became of them",
        (*_QUEUE, OUTCOME),
        _ERROR,
    ),
    MetricShape(
        LEASE_RENEWALS,
        "counter",
        "{lease}",
        "worker",
        "Leases asked to be renewed: renewed, cancelling, lost, unavailable",
        (MODEL, OUTCOME),
    ),
    MetricShape(
        JOBS_REPUBLISHED,
        "counter",
        "{job}",
        "worker",
        "Jobs that the broker had lost, published again",
        _QUEUE,
    ),
    MetricShape(
        STEP_DURATION, "histogram", "s", "worker", "One step of the engine", (MODEL,), bounds=_STEP_BOUNDS
    ),
    MetricShape(
        PREEMPTIONS, "counter", "{preemption}", "worker", "Requests put back for want of blocks", (MODEL,)
    ),
    MetricShape(PROPOSED_TOKENS, "counter", "{token}", "worker", "Tokens run ahead of their turn", (MODEL,)),
    MetricShape(ACCEPTED_TOKENS, "counter", "{token}", "worker", "Those of them that were kept", (MODEL,)),
    MetricShape(REQUESTS_RUNNING, "gauge", "{request}", "worker", "Requests in the batch", (MODEL,)),
    MetricShape(REQUESTS_WAITING, "gauge", "{request}", "worker", "Requests at the engine's door", (MODEL,)),
    MetricShape(BLOCKS_USED, "gauge", "{block}", "worker", "KV cache blocks in use", (MODEL,)),
    MetricShape(BLOCKS_TOTAL, "gauge", "{block}", "worker", "KV cache blocks", (MODEL,)),
    MetricShape(
        JOBS_SUBMITTED,
        "counter",
        "{job}",
        "api",
        "Jobs offered: accepted, replayed, refused",
        (*_QUEUE, OUTCOME),
        _ERROR,
    ),
    MetricShape(QUEUE_DEPTH, "gauge", "{job}", "api", "Messages that no worker has taken yet", _QUEUE),
    MetricShape(QUEUE_OPEN, "gauge", "{job}", "api", "Jobs of the ledger: waiting or running", _QUEUE),
    MetricShape(
        QUEUE_OLDEST_AGE, "gauge", "s", "api", "Age of the oldest job of the ledger; 0 when empty", _QUEUE
    ),
    MetricShape(WORKERS, "gauge", "{worker}", "api", "Workers heard from lately", (MODEL,)),
    MetricShape(
        HTTP_DURATION,
        "histogram",
        "s",
        "api",
        "From a request's head to the end of its reply; without a route where none matched",
        (HTTP_METHOD, HTTP_SCHEME),
        (HTTP_ROUTE, HTTP_STATUS, names.ERROR_TYPE),
        _HTTP_BOUNDS,
    ),
    MetricShape(
        SPANS_PROCESSED,
        "counter",
        "{span}",
        "api, worker",
        "Spans handed to the exporter; with an error type those dropped from a full queue",
        (COMPONENT,),
        _ERROR,
    ),
    MetricShape(
        SPANS_EXPORTED,
        "counter",
        "{span}",
        "api, worker",
        "Spans the collector took; with an error type those lost on the way",
        (COMPONENT,),
        _ERROR,
    ),
)

_BY_NAME = {shape.name: shape for shape in METRICS}

Read = Callable[[], Iterable[Observation]]


def counter(meter: Meter, name: str) -> Counter:
    shape = _BY_NAME[name]
    return meter.create_counter(name, unit=shape.unit, description=shape.description)


def histogram(meter: Meter, name: str) -> Histogram:
    shape = _BY_NAME[name]
    return meter.create_histogram(
        name,
        unit=shape.unit,
        description=shape.description,
        explicit_bucket_boundaries_advisory=shape.bounds,
    )


def watch(meter: Meter, name: str, read: Read) -> None:
    """A gauge or counter whose values are asked for at each collection; `read` must return at once."""
    shape = _BY_NAME[name]
    create = meter.create_observable_counter if shape.kind == "counter" else meter.create_observable_gauge

    def observe(_: CallbackOptions) -> Iterable[Observation]:
        return read()

    create(name, [observe], unit=shape.unit, description=shape.description)
