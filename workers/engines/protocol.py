"""What crosses between a worker and its engine process.

    worker ──Start──▶ engine          ◀──Ready | StartFailed──
           ──Add, Abort──▶            ◀──Progress (finished requests, statistics, sampled steps)──
           ──(connection closed)──▶   ends

Both ends are ours and of one version, on one machine, over a socket pair that nobody else can open;
hence pickled dataclasses through `multiprocessing.connection`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

from engine.config import EngineConfig
from engine.outputs import RequestOutput
from engine.sampling import SamplingParams
from engine.stats import StepStats


@dataclass(frozen=True, slots=True)
class StepSampling:
    """Which steps are told of one by one, to be drawn as spans.

    Attributes:
        ratio: From 0 to 1; of the first N steps `floor(N * ratio)` are chosen, evenly spaced.
        slow_seconds: A step that took longer is chosen too; None chooses none for its length.
    """

    ratio: float = 0.0
    slow_seconds: float | None = None

    def chooses(self, number: int, duration_seconds: float) -> bool:
        """`number` counts the engine's steps from 1."""
        is_due = floor(number * self.ratio) > floor((number - 1) * self.ratio)
        return is_due or self.is_slow(duration_seconds)

    def is_slow(self, duration_seconds: float) -> bool:
        return self.slow_seconds is not None and duration_seconds > self.slow_seconds


@dataclass(frozen=True, slots=True)
class Start:
    config: EngineConfig
    sampling: StepSampling | None = None
    """None where no step is to be told of by itself."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the worker must know of the loaded model to announce it."""

    architecture: str
    vocab_size: int
    device: str
    """Where it runs: what `auto` came to."""
    max_model_len: int
    num_parameters: int
    num_blocks: int
    tokenizer_json: str


@dataclass(frozen=True, slots=True)
class Ready:
    facts: ModelFacts


@dataclass(frozen=True, slots=True)
class StartFailed:
    message: str
    """One line."""


@dataclass(slots=True)
class EngineRequest:
    """One prompt, as the engine takes it."""

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    prompt_text: str | None = None


@dataclass(frozen=True, slots=True)
class Add:
    requests: tuple[EngineRequest, ...]


@dataclass(frozen=True, slots=True)
class Abort:
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """The engine would not take a request, and never will."""

    request_id: str
    reason: str
    message: str


Outcome = RequestOutput | Refused
"""What became of one request in an engine that lives."""


@dataclass(frozen=True, slots=True)
class StepTally:
    """The steps since the Progress before, for the metrics."""

    durations_seconds: tuple[float, ...]
    num_preempted: int
    num_proposed_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """Sent after a step in which a request finished, and at least every BEAT_SECONDS."""

    finished: tuple[RequestOutput, ...]
    refused: tuple[Refused, ...] = ()
    stats: StepStats | None = None
    """Of the last step; None while there is nothing to do."""
    tally: StepTally | None = None
    """None where no step was made."""
    steps: tuple[StepStats, ...] = ()
    """Those that were sampled since the Progress before, in order; of a request among `finished` the step
    that admitted it has been told by now."""


Command = Start | Add | Abort
Event = Ready | StartFailed | Progress

BEAT_SECONDS = 0.5
"""The engine says at least so often that it lives, with or without work."""
