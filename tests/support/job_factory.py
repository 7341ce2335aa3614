"""Jobs, results and models' cards for tests: sensible values, each overridable."""

from __future__ import annotations

from typing import Any

from jobs.model import (
    Choice,
    Failure,
    ItemResult,
    JobRequest,
    JobResult,
    NewJob,
    Prompt,
    Timings,
    Usage,
    new_job_id,
)
from jobs.registry import ModelCard, queue_name
from jobs.states import JobState
from jobs.store import Settlement

MODEL = "test-model"
NOW = 1_800_000_000.0


def new_job(**overrides: Any) -> NewJob:
    fields: dict[str, Any] = {
        "id": new_job_id(),
        "request": JobRequest(
            model=MODEL,
            prompts=(Prompt(token_ids=(1, 2, 3), text="a b c"),),
            sampling={"max_tokens": 4},
        ),
        "queue": queue_name(MODEL, "batch"),
        "priority": "batch",
        "created_at": NOW,
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    return NewJob(**{**fields, **overrides})


def model_card(**overrides: Any) -> ModelCard:
    """Of a model that nobody serves."""
    fields: dict[str, Any] = {
        "name": MODEL,
        "vocab_size": 256,
        "max_model_len": 64,
        "max_num_sequences": 8,
        "architecture": "OPTForCausalLM",
        "dtype": "float32",
        "device": "cpu",
        "tokenizer_digest": "0" * 64,
    }
    return ModelCard(**{**fields, **overrides})


def job_result(text: str = " d e") -> JobResult:
    choice = Choice(index=0, text=text, finish_reason="length")
    return JobResult(
        items=(ItemResult(choices=(choice,), usage=Usage(prompt_tokens=3, completion_tokens=2)),)
    )


def completed(text: str = " d e") -> Settlement:
    timings = Timings(
        queue_ms=1.0,
        engine_wait_ms=2.0,
        prefill_ms=3.0,
        decode_ms=4.0,
        store_ms=0.5,
        total_ms=10.5,
        mean_batch_size=1.5,
        max_batch_size=2,
    )
    return Settlement(JobState.COMPLETED, result=job_result(text), timings=timings)


def failed(reason: str = "engine_error", *, retryable: bool = False) -> Settlement:
    failure = Failure(reason=reason, message="the engine refused the request", retryable=retryable)
    return Settlement(JobState.FAILED, failure=failure)
