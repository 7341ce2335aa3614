"""What a step gives back: plain frozen data that pickles, holds no tensor and imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.stats import RequestPhases, StepStats

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """What one sequence gained in one step.

    The texts of all deltas of a sequence, joined, are its completion's text: a stop string that is only
    half there, or half a character, is held back. A request with beam search, or with `best_of` above n,
    sends none, for nothing is settled before its end.

    Attributes:
        index: Of the completion within the request.
        token_ids: Generated tokens, the stop token included; empty for an echoed prompt without any.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Logprobs:
    """OpenAI's legacy shape: four lists of equal length, the prompt's tokens first where it is echoed.

    Attributes:
        token_logprobs: `None` for the first token of a prompt.
        top_logprobs: The most probable tokens and the chosen one, by their text; `None` as above.
        text_offset: Characters of the completion's text before the token.
    """

    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    top_logprobs: tuple[dict[str, float] | None, ...]
    text_offset: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PromptLogprob:
    """Of one token in the place of a prompt's, as vLLM tells it.

    Attributes:
        rank: 1 for the most probable token of the vocabulary there.
        decoded_token: Its text.
    """

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished sequence.

    Attributes:
        token_ids: Generated tokens, the stop token included.
        stop_reason: The stop string or stop token id that ended it; `None` for the model's own end.
        cumulative_logprob: Of the generated tokens; `None` unless log-probabilities were computed.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None
    cumulative_logprob: float | None
    logprobs: Logprobs | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Attributes:
    completion_tokens: Generated for all sequences, those `best_of` discards included; with beam search
        those of the returned beams.
    cached_tokens: Prompt tokens found in the cache at admission.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """Why one request failed in an engine that goes on.

    Attributes:
        reason: Stable and machine-readable, like that of an `EngineError`.
        retryable: Whether the same request may succeed when it is run again.
    """

    reason: str
    message: str
    retryable: bool

    @classmethod
    def of(cls, error: Exception) -> RequestFailure:
        """Of what was raised while the request's own tokens or text were at hand; its text may hold them."""
        return cls("request_failed", f"{type(error).__name__} was raised over its output", retryable=True)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """Attributes:
    failure: Set when the request failed; its completions are those that had finished by then.
    prompt_logprobs: For each token of the prompt, the token itself and the most probable ones by their
        ids; `None` for the first, which nothing stands before, and where they were not asked for. Of an
        aborted request those that were computed.
    """

    request_id: str
    completions: tuple[Completion, ...]
    usage: Usage
    phases: RequestPhases
    failure: RequestFailure | None = None
    prompt_logprobs: tuple[dict[int, PromptLogprob] | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class StepOutput:
    deltas: tuple[TokenDelta, ...]
    finished: tuple[RequestOutput, ...]
    stats: StepStats
