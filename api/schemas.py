"""What goes over the wire: the bodies we read and the objects we answer with.

Fields are read as leniently as pydantic's lax mode does it ("true" is true, "3" is 3, 3.0 is 3) and an
explicit null is the same as leaving the field out; unknown fields are ignored. The ranges are those of
`engine.sampling.SamplingParams`, which this package must not import: a test holds the two together.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from jobs.model import Priority, PromptLogprobs, Timings, TokenLogprobs
from jobs.states import JobState

DEFAULT_MAX_TOKENS = 16
MAX_COMPLETIONS = 128
"""n and best_of of one prompt."""
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1000
MAX_STOP_TOKEN_IDS = 1024
MAX_BAD_WORDS = 128
MAX_STRUCTURE_CHARACTERS = 65_536
MAX_CHOICE_STRINGS = 1024
MAX_EXPIRY_SECONDS = 30 * 24 * 3600
MAX_START_SECONDS = 30 * 24 * 3600
MAX_METADATA_PAIRS = 16


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _minus_one_is_off(value: object) -> object:
    return 0 if value in (-1, "-1") else value


Number = Annotated[float, Field(allow_inf_nan=False)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenId = Annotated[int, Field(ge=0)]


StructureText = Annotated[str, Field(min_length=1, max_length=MAX_STRUCTURE_CHARACTERS)]


class StructuredOutputs(BaseModel):
    """vLLM's request for structured output: exactly one of these."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_: Annotated[dict[str, Any] | StructureText | None, Field(alias="json")] = None
    """A JSON schema."""
    json_object: Literal[True] | None = None
    """Any JSON object."""
    regex: StructureText | None = None
    choice: (
        Annotated[tuple[StructureText, ...], Field(min_length=1, max_length=MAX_CHOICE_STRINGS)] | None
    ) = None
    grammar: StructureText | None = None
    """In Lark's notation or GBNF."""

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("must hold exactly one of json, json_object, regex, choice and grammar")
        if isinstance(self.schema_, dict):
            check_size(self.schema_)
        return self


class NamedSchema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_: Annotated[dict[str, Any], Field(alias="schema")]

    @model_validator(mode="after")
    def _fits(self) -> NamedSchema:
        check_size(self.schema_)
        return self


class ResponseFormat(BaseModel):
    """OpenAI's request for structured output."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("must have json_schema if and only if its type is json_schema")
        return self


def check_size(schema: dict[str, Any]) -> None:
    """Raises ValueError for a schema longer than the text of one may be."""
    if len(json.dumps(schema)) > MAX_STRUCTURE_CHARACTERS:
        raise ValueError(f"must be a schema of at most {MAX_STRUCTURE_CHARACTERS} characters")


class CompletionBody(BaseModel):
    """OpenAI's legacy completions request, and vLLM's additions to it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: Annotated[str, Field(min_length=1)]
    prompt: Any
    """A string, a list of strings, a list of token ids or a list of those; see `api.prompts`."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[Number, Field(ge=0.0)] | None = None
    top_p: Annotated[Number, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_minus_one_is_off)] | None = None
    min_p: Annotated[Number, Field(ge=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS)] | None = None
    use_beam_search: bool | None = None
    length_penalty: Number | None = None
    early_stopping: bool | None = None
    stop: (
        Annotated[tuple[StopString, ...], Field(max_length=MAX_STOP_STRINGS), BeforeValidator(_as_list)]
        | None
    ) = None
    stop_token_ids: Annotated[tuple[TokenId, ...], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: (
        Annotated[tuple[StopString, ...], Field(max_length=MAX_BAD_WORDS), BeforeValidator(_as_list)] | None
    ) = None
    presence_penalty: Annotated[Number, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2.0, le=2.0)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0.0)] | None = None
    logit_bias: dict[TokenId, Annotated[Number, Field(ge=-100.0, le=100.0)]] | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    suffix: str | None = None
    user: str | None = None
    """Taken for compatibility; nothing is done with it."""


class JobBody(CompletionBody):
    priority: Priority | None = None
    expires_after: Annotated[Number, Field(gt=0.0, le=MAX_EXPIRY_SECONDS)] | None = None
    """Seconds from now; a job not done by then expires."""
    start_after: Annotated[Number, Field(ge=0.0, le=MAX_START_SECONDS)] | None = None
    """Seconds from now; the job is kept out of its queue until then."""
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(min_length=1, max_length=64)],
                Annotated[str, Field(max_length=512)],
            ],
            Field(max_length=MAX_METADATA_PAIRS),
        ]
        | None
    ) = None


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class UsageObject(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionChoice(BaseModel):
    index: int
    """Over all prompts: those of the first prompt come first."""
    text: str
    logprobs: TokenLogprobs | None
    finish_reason: Literal["stop", "length", "error"]
    """`error` marks the place of a choice whose prompt failed; its text is empty, and `errors` says why."""
    stop_reason: int | str | None
    prompt_logprobs: PromptLogprobs | None
    """Of its prompt, where the client asked for them; vLLM's addition."""


class ItemError(BaseModel):
    """Why one prompt of several has no choices of its own; an addition to OpenAI's object."""

    prompt: int
    """Its place in the request, from 0."""
    message: str
    type: Literal["server_error"] = "server_error"
    code: str
    """Stable: the failure's reason."""
    retryable: bool
    """Whether the same prompt may succeed in another job."""


class CompletionObject(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageObject
    errors: list[ItemError]
    """Of the prompts that failed where others did not; an addition to OpenAI's object, as all below it."""
    timings: Timings | None
    """Where the time went."""
    trace_id: str | None
    """Of the request that created the job."""
    trace: str | None
    """Where that trace can be looked at; null without such a place, or when it was not sampled."""


class ErrorFields(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    trace_id: str | None = None
    trace: str | None = None
    """Where that trace can be looked at."""
    job_id: str | None = None


class ErrorObject(BaseModel):
    error: ErrorFields


class RequestCounts(BaseModel):
    """Prompts of the job, as OpenAI counts the requests of a batch; kept up while it runs."""

    total: int
    completed: int
    failed: int


class JobLinks(BaseModel):
    self: str
    result: str
    cancel: str
    trace: str | None
    """Where the job's trace can be looked at; null without such a place, or when it was not sampled."""


class JobObject(BaseModel):
    """A job for its client. Every `*_at` is in Unix seconds, null until it happens."""

    id: str
    object: Literal["job"] = "job"
    status: JobState
    done: bool
    """Whether the status is final, so that a client need not know every name."""
    model: str
    created_at: int
    queued_at: int
    in_progress_at: int | None
    completed_at: int | None
    failed_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    expired_at: int | None
    next_attempt_at: int | None
    """When the job goes into its queue, while it waits for that."""
    expires_at: int | None
    result_expires_at: int | None
    priority: Priority
    num_prompts: int
    request_counts: RequestCounts
    attempts: int
    max_attempts: int
    usage: UsageObject | None
    timings: Timings | None
    trace_id: str | None
    traceparent: str | None
    error: ErrorFields | None
    errors: list[ItemError]
    """Of a job of many prompts that has ended: each prompt that failed."""
    result: CompletionObject | None
    """Once the job has ended, if any of its prompts completed."""
    metadata: dict[str, str]
    links: JobLinks


class ModelObject(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    """When this API process started: models have no date of their own."""
    owned_by: Literal["throughline"] = "throughline"
    aliases: tuple[str, ...]
    max_model_len: int
    max_logprobs: int
    architecture: str
    dtype: str
    device: str
    num_workers: int
    """Live ones; with none the model is known, and asking it for something answers 503."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


class Readiness(BaseModel):
    status: Literal["ready", "not_ready"]
    reasons: list[str]
    """Why not; empty when ready."""
    models: dict[str, int]
    """Live workers by model."""


class Liveness(BaseModel):
    status: Literal["live"] = "live"


class VersionObject(BaseModel):
    version: str
