"""What the engine tells about itself: one `StepStats` a step, one `RequestPhases` a request.

All stamps are seconds of `time.monotonic()`, of the process that runs the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

PhaseName = Literal["wait", "prefill", "decode"]


@dataclass(frozen=True, slots=True)
class PhaseInterval:
    name: PhaseName
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class RequestPhases:
    """Where one request's time went.

    Attributes:
        first_token_at: `None` if it ended before it had one.
        intervals: Contiguous from `arrived_at` to `finished_at`. After a preemption the request waits and
            prefills again.
        num_steps: Steps that ran at least one of its sequences.
        mean_batch_size, max_batch_size: Sequences, its own included, in those steps.
        num_proposed_tokens, num_accepted_tokens: Run ahead of their turn, and those of them that were kept.
    """

    arrived_at: float
    first_token_at: float | None
    finished_at: float
    intervals: tuple[PhaseInterval, ...]
    num_preemptions: int
    num_steps: int
    mean_batch_size: float
    max_batch_size: int
    num_proposed_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step.

    Attributes:
        batch_size: Sequences run in this step.
        num_decode_tokens: Run for sequences that decode, the proposed ones included.
        num_running, num_waiting: Requests, after the step.
        num_blocks_used: Blocks of the KV cache in use, after the step.
        joined: Ids of the requests that were admitted in this step, again after a preemption.
        left: Ids of the requests that finished or whose abort was settled.
        num_proposed_tokens, num_accepted_tokens: Run ahead of their turn, and those of them that were kept.
    """

    started_at: float
    duration_seconds: float
    batch_size: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_running: int
    num_waiting: int
    num_blocks_used: int
    num_blocks_total: int
    num_preempted: int
    joined: tuple[str, ...]
    left: tuple[str, ...]
    num_proposed_tokens: int = 0
    num_accepted_tokens: int = 0


class StepObserver(Protocol):
    """Told about each step, on the engine's thread: it must return at once and not raise."""

    def on_step(self, stats: StepStats) -> None: ...


class PhaseRecorder:
    """Collects one request's stamps while it lives."""

    __slots__ = (
        "_arrived_at",
        "_batch_size_sum",
        "_first_token_at",
        "_intervals",
        "_max_batch_size",
        "_num_accepted",
        "_num_preemptions",
        "_num_proposed",
        "_num_steps",
        "_phase",
        "_since",
    )

    def __init__(self, arrived_at: float) -> None:
        self._arrived_at = arrived_at
        self._first_token_at: float | None = None
        self._intervals: list[PhaseInterval] = []
        self._phase: PhaseName = "wait"
        self._since = arrived_at
        self._num_preemptions = 0
        self._num_steps = 0
        self._batch_size_sum = 0
        self._max_batch_size = 0
        self._num_proposed = 0
        self._num_accepted = 0

    def admitted(self, at: float) -> None:
        self._enter("prefill", at)

    def preempted(self, at: float) -> None:
        self._num_preemptions += 1
        self._enter("wait", at)

    def got_token(self, at: float) -> None:
        if self._first_token_at is None:
            self._first_token_at = at
        # A token may come to light when its request has just been preempted, and waits.
        if self._phase == "prefill":
            self._enter("decode", at)

    def speculated(self, num_tokens: int, num_accepted: int) -> None:
        self._num_proposed += num_tokens
        self._num_accepted += num_accepted

    def took_part(self, batch_size: int) -> None:
        self._num_steps += 1
        self._batch_size_sum += batch_size
        self._max_batch_size = max(self._max_batch_size, batch_size)

    def finish(self, at: float) -> RequestPhases:
        last = PhaseInterval(self._phase, self._since, at)
        return RequestPhases(
            arrived_at=self._arrived_at,
            first_token_at=self._first_token_at,
            finished_at=at,
            intervals=(*self._intervals, last),
            num_preemptions=self._num_preemptions,
            num_steps=self._num_steps,
            mean_batch_size=self._batch_size_sum / self._num_steps if self._num_steps else 0.0,
            max_batch_size=self._max_batch_size,
            num_proposed_tokens=self._num_proposed,
            num_accepted_tokens=self._num_accepted,
        )

    def _enter(self, phase: PhaseName, at: float) -> None:
        self._intervals.append(PhaseInterval(self._phase, self._since, at))
        self._phase = phase
        self._since = at
