"""Every span name, kind and attribute key that this project emits, with its source and stability.

Two conventions name most of them: messaging (semantic-conventions v1.44, docs/messaging/messaging-spans.md)
and GenAI (semantic-conventions-genai, docs/gen-ai/client-inference.md, schema 1.42.0, all of it still in
development). The Python constants for GenAI are frozen at an older set, so the keys are spelt here. What no
convention covers lies under `job.` (what a client can look up by) and `throughline.` (what only this system
knows).

`ATTRIBUTES` and `SPANS` are the same facts as data: `SPANS.md` shows them, a test holds the two together,
and the trace tests refuse any emitted key, type or kind that is not in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal

TRACER: Final = "throughline"

# Operations and systems, as the conventions want them spelt.
PROVIDER: Final = "throughline"
MESSAGING_SYSTEM: Final = "redis"  # reviewers of the conventions want the broker, not the library (#1954)
OPERATION_SEND: Final = "send"
OPERATION_PROCESS: Final = "process"
OPERATION_TEXT_COMPLETION: Final = "text_completion"

# Span names without a variable part.
SPAN_ENGINE_WAIT: Final = "engine.wait"
SPAN_ENGINE_PREFILL: Final = "engine.prefill"
SPAN_ENGINE_DECODE: Final = "engine.decode"
SPAN_WAIT_RESULT: Final = "wait result"
SPAN_STORE_RESULT: Final = "store result"
SPAN_ACCEPT: Final = "accept"
SPAN_STORE_JOB: Final = "store job"
SPAN_FETCH_RESULT: Final = "fetch result"
SPAN_CLAIM: Final = "claim"
SPAN_ENGINE_INTERRUPTED: Final = "engine.interrupted"
SPAN_ENGINE_STEP: Final = "engine.step"
SPAN_RECEIVE_OUTPUT: Final = "receive output"
SPAN_REPORT: Final = "report"
SPAN_GIVE_BACK: Final = "give back"

# Ours: what a client can search a trace by.
JOB_ID: Final = "job.id"
JOB_ATTEMPT: Final = "job.attempt"
JOB_HANDED_BACK: Final = "job.handed_back"
JOB_STATE: Final = "job.state"
JOB_REDELIVERED: Final = "job.redelivered"

# Ours: what only this system knows.
QUEUE_WAIT: Final = "throughline.queue.wait"
CLOCK_SKEWED: Final = "throughline.clock.skewed"
TASK_NAME: Final = "throughline.task.name"
ITEM_INDEX: Final = "throughline.item.index"
LINK_ROLE: Final = "throughline.link.role"
REQUEST_PROMPT_COUNT: Final = "throughline.request.prompt_count"
REQUEST_BEAM_SEARCH: Final = "throughline.request.beam_search"
TIME_TO_FIRST_TOKEN: Final = "throughline.engine.time_to_first_token"
BATCH_SIZE_MEAN: Final = "throughline.engine.batch_size.mean"
BATCH_SIZE_MAX: Final = "throughline.engine.batch_size.max"
STEPS: Final = "throughline.engine.steps"
PREEMPTIONS: Final = "throughline.engine.preemptions"
PROPOSED_TOKENS: Final = "throughline.engine.proposed_tokens"
ACCEPTED_TOKENS: Final = "throughline.engine.accepted_tokens"
PHASE_TOKENS: Final = "throughline.engine.phase.tokens"
PHASE_STEPS: Final = "throughline.engine.phase.steps"
STEP_BATCH_SIZE: Final = "throughline.engine.step.batch_size"
STEP_PREFILL_TOKENS: Final = "throughline.engine.step.prefill_tokens"
STEP_DECODE_TOKENS: Final = "throughline.engine.step.decode_tokens"
STEP_BLOCKS_USED: Final = "throughline.engine.step.kv_blocks_used"
STEP_BLOCKS_TOTAL: Final = "throughline.engine.step.kv_blocks_total"
STEP_RUNNING: Final = "throughline.engine.step.running"
STEP_WAITING: Final = "throughline.engine.step.waiting"
STEP_PREEMPTED: Final = "throughline.engine.step.preempted"
STEP_JOINED: Final = "throughline.engine.step.joined"
STEP_LEFT: Final = "throughline.engine.step.left"
STEP_LINKS_OMITTED: Final = "throughline.engine.step.links_omitted"
STEP_SLOW: Final = "throughline.engine.step.slow"

# Messaging.
MESSAGING_SYSTEM_KEY: Final = "messaging.system"
MESSAGING_OPERATION_NAME: Final = "messaging.operation.name"
MESSAGING_OPERATION_TYPE: Final = "messaging.operation.type"
MESSAGING_DESTINATION_NAME: Final = "messaging.destination.name"
MESSAGING_MESSAGE_ID: Final = "messaging.message.id"

# GenAI.
GEN_AI_OPERATION_NAME: Final = "gen_ai.operation.name"
GEN_AI_PROVIDER_NAME: Final = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL: Final = "gen_ai.request.model"
GEN_AI_REQUEST_CHOICE_COUNT: Final = "gen_ai.request.choice.count"
GEN_AI_REQUEST_SEED: Final = "gen_ai.request.seed"
GEN_AI_REQUEST_STREAM: Final = "gen_ai.request.stream"
GEN_AI_REQUEST_TOP_K: Final = "gen_ai.request.top_k"
GEN_AI_REQUEST_TOP_P: Final = "gen_ai.request.top_p"
GEN_AI_REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
GEN_AI_REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
GEN_AI_REQUEST_FREQUENCY_PENALTY: Final = "gen_ai.request.frequency_penalty"
GEN_AI_REQUEST_PRESENCE_PENALTY: Final = "gen_ai.request.presence_penalty"
GEN_AI_REQUEST_STOP_SEQUENCES: Final = "gen_ai.request.stop_sequences"
GEN_AI_RESPONSE_ID: Final = "gen_ai.response.id"
GEN_AI_RESPONSE_MODEL: Final = "gen_ai.response.model"
GEN_AI_RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
GEN_AI_USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
GEN_AI_USAGE_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
GEN_AI_INPUT_MESSAGES: Final = "gen_ai.input.messages"
GEN_AI_OUTPUT_MESSAGES: Final = "gen_ai.output.messages"

# vLLM's own, which no convention took up; only with THROUGHLINE_TRACE_VLLM_KEYS.
VLLM_REQUEST_ID: Final = "gen_ai.request.id"
VLLM_REQUEST_N: Final = "gen_ai.request.n"
VLLM_PROMPT_TOKENS: Final = "gen_ai.usage.prompt_tokens"
VLLM_COMPLETION_TOKENS: Final = "gen_ai.usage.completion_tokens"
VLLM_TIME_IN_QUEUE: Final = "gen_ai.latency.time_in_queue"
VLLM_TIME_TO_FIRST_TOKEN: Final = "gen_ai.latency.time_to_first_token"
VLLM_E2E: Final = "gen_ai.latency.e2e"
VLLM_TIME_IN_PREFILL: Final = "gen_ai.latency.time_in_model_prefill"
VLLM_TIME_IN_DECODE: Final = "gen_ai.latency.time_in_model_decode"
VLLM_TIME_IN_INFERENCE: Final = "gen_ai.latency.time_in_model_inference"

# General.
ERROR_TYPE: Final = "error.type"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"

# Values of LINK_ROLE.
LINK_CREATION: Final = "creation"
LINK_PREVIOUS_ATTEMPT: Final = "previous_attempt"
LINK_JOINED: Final = "joined"
LINK_LEFT: Final = "left"
LINK_STEP: Final = "step"
LINK_ATTEMPT: Final = "attempt"


class Source(Enum):
    """Who defines a key, and how firmly."""

    HTTP = "http (stable)"
    GENERAL = "general (stable)"
    MESSAGING = "messaging (development)"
    GEN_AI = "gen_ai (development)"
    VLLM = "vllm (behind a switch)"
    OWN = "own"


ValueType = Literal["string", "int", "double", "boolean", "string[]"]


@dataclass(frozen=True, slots=True)
class Attribute:
    key: str
    type: ValueType
    source: Source


@dataclass(frozen=True, slots=True)
class SpanShape:
    """One kind of span: its name (`<...>` is a variable part), where it is made and what it must carry."""

    name: str
    kinds: tuple[Literal["SERVER", "PRODUCER", "CLIENT", "CONSUMER", "INTERNAL"], ...]
    made_by: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


_HTTP_REQUIRED = ("http.request.method", "url.scheme", "url.path", "http.response.status_code")
_HTTP_OPTIONAL = (
    "http.route",
    "url.full",
    "url.query",
    "network.protocol.version",
    SERVER_ADDRESS,
    SERVER_PORT,
    "client.address",
    "client.port",
    "user_agent.original",
    ERROR_TYPE,
    JOB_ID,
)
_VLLM_INTS = (VLLM_REQUEST_N, VLLM_PROMPT_TOKENS, VLLM_COMPLETION_TOKENS)
_VLLM_SECONDS = (
    VLLM_TIME_IN_QUEUE,
    VLLM_TIME_TO_FIRST_TOKEN,
    VLLM_E2E,
    VLLM_TIME_IN_PREFILL,
    VLLM_TIME_IN_DECODE,
    VLLM_TIME_IN_INFERENCE,
)
_MESSAGING = (
    MESSAGING_SYSTEM_KEY,
    MESSAGING_OPERATION_NAME,
    MESSAGING_OPERATION_TYPE,
    MESSAGING_DESTINATION_NAME,
    MESSAGING_MESSAGE_ID,
)
_STEP = (
    STEP_BATCH_SIZE,
    STEP_PREFILL_TOKENS,
    STEP_DECODE_TOKENS,
    STEP_BLOCKS_USED,
    STEP_BLOCKS_TOTAL,
    STEP_RUNNING,
    STEP_WAITING,
    STEP_PREEMPTED,
    STEP_JOINED,
    STEP_LEFT,
)

SPANS: Final[tuple[SpanShape, ...]] = (
    SpanShape("<method> <route>", ("SERVER",), "api", _HTTP_REQUIRED, _HTTP_OPTIONAL),
    SpanShape(
        "send <queue>",
        # CLIENT where the message already carried a creation context: a job put back in its queue.
        ("PRODUCER", "CLIENT"),
        "api, worker",
        _MESSAGING,
        (JOB_ID, TASK_NAME, SERVER_ADDRESS, SERVER_PORT, ERROR_TYPE),
    ),
    SpanShape("delay <queue>", ("INTERNAL",), "worker", (JOB_ID,)),
    SpanShape("queue <queue>", ("INTERNAL",), "worker", (JOB_ID, QUEUE_WAIT), (CLOCK_SKEWED,)),
    SpanShape(
        "process <queue>",
        ("CONSUMER",),
        "worker",
        _MESSAGING,
        (
            JOB_ID,
            JOB_ATTEMPT,
            JOB_REDELIVERED,
            JOB_HANDED_BACK,
            JOB_STATE,
            QUEUE_WAIT,
            CLOCK_SKEWED,
            TASK_NAME,
            ERROR_TYPE,
        ),
    ),
    # INTERNAL, not CONSUMER: nobody measured it, it is drawn from the job's record by the next delivery.
    SpanShape("lost <queue>", ("INTERNAL",), "worker", (JOB_ID, JOB_ATTEMPT, ERROR_TYPE)),
    SpanShape(SPAN_CLAIM, ("INTERNAL",), "worker", (JOB_ID,)),
    SpanShape(
        "text_completion <model>",
        ("INTERNAL",),
        "worker",
        (
            GEN_AI_OPERATION_NAME,
            GEN_AI_PROVIDER_NAME,
            GEN_AI_REQUEST_MODEL,
            GEN_AI_RESPONSE_ID,
            GEN_AI_RESPONSE_MODEL,
            GEN_AI_RESPONSE_FINISH_REASONS,
            GEN_AI_USAGE_INPUT_TOKENS,
            GEN_AI_USAGE_OUTPUT_TOKENS,
        ),
        (
            JOB_ID,
            GEN_AI_REQUEST_CHOICE_COUNT,
            GEN_AI_REQUEST_SEED,
            GEN_AI_REQUEST_STREAM,
            GEN_AI_REQUEST_TOP_K,
            GEN_AI_REQUEST_TOP_P,
            GEN_AI_REQUEST_MAX_TOKENS,
            GEN_AI_REQUEST_TEMPERATURE,
            GEN_AI_REQUEST_FREQUENCY_PENALTY,
            GEN_AI_REQUEST_PRESENCE_PENALTY,
            GEN_AI_REQUEST_STOP_SEQUENCES,
            GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS,
            GEN_AI_INPUT_MESSAGES,
            GEN_AI_OUTPUT_MESSAGES,
            ITEM_INDEX,
            REQUEST_PROMPT_COUNT,
            REQUEST_BEAM_SEARCH,
            TIME_TO_FIRST_TOKEN,
            BATCH_SIZE_MEAN,
            BATCH_SIZE_MAX,
            STEPS,
            PREEMPTIONS,
            PROPOSED_TOKENS,
            ACCEPTED_TOKENS,
            ERROR_TYPE,
            VLLM_REQUEST_ID,
            *_VLLM_INTS,
            *_VLLM_SECONDS,
        ),
    ),
    SpanShape(SPAN_ENGINE_WAIT, ("INTERNAL",), "worker", (), (PHASE_TOKENS, PHASE_STEPS)),
    SpanShape(SPAN_ENGINE_PREFILL, ("INTERNAL",), "worker", (), (PHASE_TOKENS, PHASE_STEPS)),
    SpanShape(SPAN_ENGINE_DECODE, ("INTERNAL",), "worker", (), (PHASE_TOKENS, PHASE_STEPS)),
    SpanShape(SPAN_ENGINE_INTERRUPTED, ("INTERNAL",), "worker", (JOB_ID,)),
    SpanShape(SPAN_ENGINE_STEP, ("INTERNAL",), "worker", _STEP, (STEP_LINKS_OMITTED, STEP_SLOW)),
    SpanShape(SPAN_RECEIVE_OUTPUT, ("INTERNAL",), "worker", (JOB_ID,)),
    SpanShape(SPAN_ACCEPT, ("INTERNAL",), "api", ()),
    SpanShape(SPAN_STORE_JOB, ("INTERNAL",), "api", (JOB_ID,)),
    SpanShape(SPAN_WAIT_RESULT, ("INTERNAL",), "api", (JOB_ID,)),
    SpanShape(SPAN_STORE_RESULT, ("INTERNAL",), "worker", (JOB_ID,)),
    SpanShape(SPAN_REPORT, ("INTERNAL",), "worker", (JOB_ID,)),
    SpanShape(SPAN_GIVE_BACK, ("INTERNAL",), "worker", (JOB_ID,)),
    SpanShape(SPAN_FETCH_RESULT, ("INTERNAL",), "api", (JOB_ID,)),
)


def _attributes(source: Source, value_type: ValueType, *keys: str) -> tuple[Attribute, ...]:
    return tuple(Attribute(key, value_type, source) for key in keys)


ATTRIBUTES: Final[tuple[Attribute, ...]] = (
    *_attributes(Source.OWN, "string", JOB_ID, JOB_STATE, TASK_NAME, LINK_ROLE),
    *_attributes(
        Source.OWN,
        "int",
        JOB_ATTEMPT,
        ITEM_INDEX,
        REQUEST_PROMPT_COUNT,
        BATCH_SIZE_MAX,
        STEPS,
        PREEMPTIONS,
        PROPOSED_TOKENS,
        ACCEPTED_TOKENS,
        PHASE_TOKENS,
        PHASE_STEPS,
        *_STEP,
        STEP_LINKS_OMITTED,
    ),
    *_attributes(
        Source.OWN, "boolean", JOB_REDELIVERED, JOB_HANDED_BACK, CLOCK_SKEWED, REQUEST_BEAM_SEARCH, STEP_SLOW
    ),
    *_attributes(Source.OWN, "double", QUEUE_WAIT, TIME_TO_FIRST_TOKEN, BATCH_SIZE_MEAN),
    *_attributes(Source.MESSAGING, "string", *_MESSAGING),
    *_attributes(
        Source.GEN_AI,
        "string",
        GEN_AI_OPERATION_NAME,
        GEN_AI_PROVIDER_NAME,
        GEN_AI_REQUEST_MODEL,
        GEN_AI_RESPONSE_ID,
        GEN_AI_RESPONSE_MODEL,
        GEN_AI_INPUT_MESSAGES,
        GEN_AI_OUTPUT_MESSAGES,
    ),
    *_attributes(
        Source.GEN_AI,
        "int",
        GEN_AI_REQUEST_CHOICE_COUNT,
        GEN_AI_REQUEST_SEED,
        GEN_AI_REQUEST_TOP_K,
        GEN_AI_REQUEST_MAX_TOKENS,
        GEN_AI_USAGE_INPUT_TOKENS,
        GEN_AI_USAGE_OUTPUT_TOKENS,
        GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS,
    ),
    *_attributes(
        Source.GEN_AI,
        "double",
        GEN_AI_REQUEST_TOP_P,
        GEN_AI_REQUEST_TEMPERATURE,
        GEN_AI_REQUEST_FREQUENCY_PENALTY,
        GEN_AI_REQUEST_PRESENCE_PENALTY,
    ),
    *_attributes(Source.GEN_AI, "boolean", GEN_AI_REQUEST_STREAM),
    *_attributes(Source.GEN_AI, "string[]", GEN_AI_REQUEST_STOP_SEQUENCES, GEN_AI_RESPONSE_FINISH_REASONS),
    *_attributes(Source.VLLM, "string", VLLM_REQUEST_ID),
    *_attributes(Source.VLLM, "int", *_VLLM_INTS),
    *_attributes(Source.VLLM, "double", *_VLLM_SECONDS),
    *_attributes(Source.GENERAL, "string", ERROR_TYPE, SERVER_ADDRESS),
    *_attributes(Source.GENERAL, "int", SERVER_PORT),
    *_attributes(
        Source.HTTP,
        "string",
        "http.request.method",
        "http.route",
        "url.scheme",
        "url.path",
        "url.full",
        "url.query",
        "network.protocol.version",
        "client.address",
        "user_agent.original",
    ),
    *_attributes(Source.HTTP, "int", "http.response.status_code", "client.port"),
)


def shape_of(name: str, kind: str) -> SpanShape | None:
    """The row of `SPANS` that a span belongs to. A fixed name wins over one with a variable part."""
    for shape in SPANS:
        if kind in shape.kinds and (shape.name == name or _has_prefix_of(shape, name)):
            return shape
    return None


def _has_prefix_of(shape: SpanShape, name: str) -> bool:
    """`send <queue>` fits every name that begins with `send `; `<method> <route>` fits any."""
    prefix, variable, _ = shape.name.partition("<")
    return bool(variable) and name.startswith(prefix)
