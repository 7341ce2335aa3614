"""Beam search as a policy over numbers: which beams go on, which have finished, when to stop.

At each step the `num_candidates` most probable continuations of all live beams are ranked. One that ends
counts as finished if it ranks within the width; the best `width` that do not end go on. A beam's score is
its log-probability divided by its generated length to the power `length_penalty`. This is the search of
`transformers` (generate with num_beams, do_sample=False), which vLLM's has the parameters of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.outputs import FinishReason
from engine.sequence import TokenLogprob


@dataclass(frozen=True, slots=True)
class Candidate:
    """A live beam continued by one token.

    Attributes:
        parent: Position of the beam among the live ones.
        cumulative_logprob: Of the beam's generated tokens, this one included.
        entry: The token's own log-probability, with the alternatives if the client wants them.
    """

    parent: int
    token_id: int
    cumulative_logprob: float
    entry: TokenLogprob


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a sequence goes no further."""

    finish_reason: FinishReason
    stop_reason: int | str | None

    @property
    def is_stop(self) -> bool:
        return self.finish_reason == "stop"


@dataclass(frozen=True, slots=True)
class FinishedBeam:
    token_ids: tuple[int, ...]
    cumulative_logprob: float
    score: float
    ending: Ending
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """One step's choice: what goes on, best first, and what just ended within the width."""

    live: tuple[Candidate, ...]
    ended: tuple[tuple[Candidate, Ending], ...]


class BeamSearch:
    """State of one request's search besides its live sequences."""

    def __init__(
        self, width: int, *, length_penalty: float, early_stopping: bool, num_stop_tokens: int
    ) -> None:
        self.width = width
        # Enough that `width` are left to go on even if every beam's best continuations are all the ends.
        self.num_candidates = max(2, 1 + num_stop_tokens) * width
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._finished: list[FinishedBeam] = []

    def select(
        self, candidates: list[Candidate], ending_of: Callable[[Candidate], Ending | None]
    ) -> Selection:
        """Rank one step's candidates; `ending_of` is asked only as far down as needed."""
        ranked = sorted(candidates, key=lambda candidate: -candidate.cumulative_logprob)
        live: list[Candidate] = []
        ended: list[tuple[Candidate, Ending]] = []
        for rank, candidate in enumerate(ranked[: self.num_candidates]):
            ending = ending_of(candidate)
            if ending is None:
                live.append(candidate)
            elif rank < self.width:
                ended.append((candidate, ending))
            if len(live) == self.width:
                break
        return Selection(tuple(live), tuple(ended))

    def score(self, cumulative_logprob: float, num_tokens: int) -> float:
        return float(cumulative_logprob / num_tokens**self._length_penalty)

    def collect(self, beam: FinishedBeam) -> None:
        """Keep it if it is among the best `width` so far."""
        self._finished.append(beam)
        self._finished.sort(key=lambda finished: -finished.score)
        del self._finished[self.width :]

    def is_done(self, live: tuple[Candidate, ...], num_tokens: int) -> bool:
        """Whether the search ends after a step that left `live`, each of `num_tokens` generated tokens.

        Without early stopping it goes on while the best live beam, at its present length, beats the worst
        of a full set of finished ones.
        """
        if not live:
            return True
        if len(self._finished) < self.width:
            return False
        if self._early_stopping:
            return True
        return self.score(live[0].cumulative_logprob, num_tokens) <= self._finished[-1].score

    def best(self, num_beams: int) -> tuple[FinishedBeam, ...]:
        return tuple(self._finished[:num_beams])
