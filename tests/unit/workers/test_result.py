from __future__ import annotations

import math
from dataclasses import replace

import pytest

from engine.outputs import Completion, Logprobs, PromptLogprob, RequestOutput, Usage
from engine.stats import PhaseInterval, RequestPhases
from jobs.model import ItemResult
from workers.attempts.result import LOWEST_LOGPROB, AttemptStamps, item_result, job_timings


def output(
    *, start: float = 100.0, logprobs: Logprobs | None = None, preempted: bool = False
) -> RequestOutput:
    """One second of wait, two of prefill, four of decode; after a preemption one of each again."""
    spans = [("wait", 1.0), ("prefill", 2.0), ("decode", 4.0)]
    if preempted:
        spans += [("wait", 1.0), ("prefill", 1.0), ("decode", 1.0)]
    intervals, at = [], start
    for name, seconds in spans:
        intervals.append(PhaseInterval(name, at, at + seconds))  # type: ignore[arg-type]
        at += seconds
    phases = RequestPhases(start, start + 3, at, tuple(intervals), int(preempted), 10, 4.0, 6)
    completion = Completion(0, " text", (1, 2), "length", None, None, logprobs)
    return RequestOutput("r", (completion,), Usage(3, 2, 1), phases)


def test_timings_add_up_when_a_request_was_preempted() -> None:
    stamps = AttemptStamps(queued_at=0.0, claimed_at=5.0, generated_at=16.0, settled_at=16.5)

    timings = job_timings((output(preempted=True),), stamps)

    assert timings is not None
    assert timings.queue_ms == 5000
    assert timings.prefill_ms == 3000
    assert timings.decode_ms == 5000
    assert timings.engine_wait_ms == 3000  # 2 s in the engine, 1 s on the way to it and back
    assert timings.store_ms == 500
    assert timings.total_ms == 16500


def test_timings_follow_the_prompt_that_finished_last() -> None:
    stamps = AttemptStamps(queued_at=0.0, claimed_at=0.0, generated_at=20.0, settled_at=20.0)

    timings = job_timings((output(preempted=True, start=101.0), output()), stamps)

    assert timings.prefill_ms == 3000
    assert timings.mean_batch_size == pytest.approx(4.0)
    assert timings.max_batch_size == 6


def test_timings_are_never_negative_when_clocks_disagree() -> None:
    stamps = AttemptStamps(queued_at=10.0, claimed_at=5.0, generated_at=4.0, settled_at=3.0)

    timings = job_timings((output(),), stamps)

    assert min(timings.model_dump().values()) >= 0
    assert timings.total_ms == timings.prefill_ms + timings.decode_ms


def test_impossible_tokens_survive_storage() -> None:
    """JSON has no minus infinity; what is stored must read back."""
    logprobs = Logprobs(("a", "b"), (None, -math.inf), (None, {"b": -math.inf, "c": -0.5}), (0, 1))

    stored = item_result(output(logprobs=logprobs)).model_dump_json(exclude_none=True)

    read = ItemResult.model_validate_json(stored).choices[0].logprobs
    assert read is not None
    assert read.token_logprobs == (None, LOWEST_LOGPROB)
    assert read.top_logprobs == (None, {"b": LOWEST_LOGPROB, "c": -0.5})


def test_prompt_logprobs_survive_storage() -> None:
    places = (None, {7: PromptLogprob(-math.inf, 9, " x"), 3: PromptLogprob(-0.5, 1, "y")})

    stored = item_result(replace(output(), prompt_logprobs=places)).model_dump_json(exclude_none=True)

    read = ItemResult.model_validate_json(stored).prompt_logprobs
    assert read is not None
    assert read[0] is None
    assert read[1] is not None
    assert read[1][7].model_dump() == {"logprob": LOWEST_LOGPROB, "rank": 9, "decoded_token": " x"}
    assert list(read[1]) == [7, 3]
