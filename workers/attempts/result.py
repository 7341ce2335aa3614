"""The engine's outputs as the stored result, and its stamps as the job's timings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.outputs import Completion, Logprobs, RequestFailure, RequestOutput
from engine.outputs import PromptLogprob as TokenScore
from engine.stats import PhaseName, RequestPhases
from jobs.model import Choice, Failure, ItemResult, PromptLogprob, Timings, TokenLogprobs, Usage
from workers.engines.protocol import Outcome, Refused

LOWEST_LOGPROB = -9999.0
"""What minus infinity is told as; JSON has no word for it. OpenAI's and vLLM's value."""


@dataclass(slots=True)
class AttemptStamps:
    """Unix seconds of the job's own clock."""

    queued_at: float
    claimed_at: float
    generated_at: float
    settled_at: float
    """When the result goes to the store: later than that cannot be stored with it."""


def item_result(outcome: Outcome) -> ItemResult:
    """The choices of one prompt, or its failure; what a failed one had generated is counted and dropped."""
    failure = failure_of(outcome)
    if isinstance(outcome, Refused):
        return ItemResult(failure=failure)
    usage = Usage(
        prompt_tokens=outcome.usage.prompt_tokens,
        completion_tokens=outcome.usage.completion_tokens,
        cached_tokens=outcome.usage.cached_tokens,
    )
    return ItemResult(usage=usage, failure=failure) if failure else _completed(outcome, usage)


def failure_of(outcome: Outcome) -> Failure | None:
    """Why the engine, which lives, did not do the request."""
    match outcome:
        case Refused(reason=reason, message=message):
            return Failure(reason=reason, message=message, retryable=False)
        case RequestOutput(failure=RequestFailure(reason, message, retryable)):
            return Failure(reason=reason, message=message, retryable=retryable)
        case RequestOutput(completions=completions):
            return _ABORTED if any(each.finish_reason == "abort" for each in completions) else None


_ABORTED = Failure(
    reason="aborted", message="the engine was told to end the request before it was done", retryable=True
)


def _completed(output: RequestOutput, usage: Usage) -> ItemResult:
    return ItemResult(
        choices=tuple(map(_choice, output.completions)),
        usage=usage,
        prompt_logprobs=None
        if output.prompt_logprobs is None
        else tuple(map(_place, output.prompt_logprobs)),
    )


def _place(tokens: dict[int, TokenScore] | None) -> dict[int, PromptLogprob] | None:
    if tokens is None:
        return None
    return {
        token_id: PromptLogprob(
            logprob=max(token.logprob, LOWEST_LOGPROB), rank=token.rank, decoded_token=token.decoded_token
        )
        for token_id, token in tokens.items()
    }


def _choice(completion: Completion) -> Choice:
    assert completion.finish_reason != "abort", "its request has failed"
    return Choice(
        index=completion.index,
        text=completion.text,
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        logprobs=_logprobs(completion.logprobs) if completion.logprobs else None,
    )


def _logprobs(logprobs: Logprobs) -> TokenLogprobs:
    return TokenLogprobs(
        tokens=logprobs.tokens,
        token_logprobs=tuple(map(_finite, logprobs.token_logprobs)),
        top_logprobs=tuple(
            top and {token: max(value, LOWEST_LOGPROB) for token, value in top.items()}
            for top in logprobs.top_logprobs
        ),
        text_offset=logprobs.text_offset,
    )


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST_LOGPROB)


def job_timings(outputs: Sequence[RequestOutput], stamps: AttemptStamps) -> Timings | None:
    """Queue, engine wait, prefill, decode and store add up to the total.

    The engine's share is read from the request that finished last, for the job ended with it. What the
    hand-over between worker and engine took counts as engine wait. None where nothing ran.
    """
    if not outputs:
        return None
    last = max(outputs, key=lambda output: output.phases.finished_at).phases
    queue = max(0.0, stamps.claimed_at - stamps.queued_at)
    inside = max(0.0, stamps.generated_at - stamps.claimed_at)
    prefill, decode = (_seconds_in(last, phase) for phase in ("prefill", "decode"))
    store = max(0.0, stamps.settled_at - stamps.generated_at)
    num_steps = sum(output.phases.num_steps for output in outputs) or 1
    batch = sum(output.phases.mean_batch_size * output.phases.num_steps for output in outputs)
    return Timings(
        queue_ms=queue * 1e3,
        engine_wait_ms=max(0.0, inside - prefill - decode) * 1e3,
        prefill_ms=prefill * 1e3,
        decode_ms=decode * 1e3,
        store_ms=store * 1e3,
        total_ms=(queue + max(inside, prefill + decode) + store) * 1e3,
        mean_batch_size=batch / num_steps,
        max_batch_size=max(output.phases.max_batch_size for output in outputs),
    )


def _seconds_in(phases: RequestPhases, name: PhaseName) -> float:
    return sum(interval.end - interval.start for interval in phases.intervals if interval.name == name)
