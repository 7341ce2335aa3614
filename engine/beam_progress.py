"""Beams that are ranked together at each step."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from engine.beam import BeamSearch, Candidate, Ending, FinishedBeam
from engine.outputs import Completion
from engine.progress import RequestProgress
from engine.sequence import Request, Sequence, TokenLogprob
from engine.text import SequenceText, TokenTexts


class BeamProgress(RequestProgress):
    """Nothing is shown before the end.

    Attributes:
        search: The policy; this class adds tokens and text to its numbers.
    """

    def __init__(
        self,
        request: Request,
        texts: TokenTexts,
        eos_token_ids: frozenset[int],
        *,
        prompt_text: str | None,
        arrived_at: float,
    ) -> None:
        super().__init__(request, texts, eos_token_ids, prompt_text=prompt_text, arrived_at=arrived_at)
        params = request.params
        self.search = BeamSearch(
            params.width,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            num_stop_tokens=len(self._eos_token_ids | set(params.stop_token_ids)),
        )

    def advance(self, tops: SequenceOf[SequenceOf[tuple[int, float]]]) -> tuple[Candidate, ...]:
        """Rank one step; `tops` holds for each live sequence its most probable tokens, best first.

        Returns the candidates to go on with, best first; none once the search is over.
        """
        beams = self.request.sequences
        candidates = self._candidates(beams, tops)
        num_tokens = beams[0].num_output_tokens + 1
        selection = self.search.select(candidates, lambda candidate: self._ending_of(candidate, beams))
        for candidate, ending in selection.ended:
            self._collect(beams[candidate.parent], candidate, ending)
        if self.search.is_done(selection.live, num_tokens):
            return ()
        return selection.live

    def abort(self) -> None:
        """Make results of the live beams, which rank below those that finished."""
        for beam in self.request.sequences:
            self.search.collect(
                FinishedBeam(
                    tuple(beam.output_token_ids),
                    beam.cumulative_logprob,
                    float("-inf"),
                    Ending("abort", None),
                    tuple(beam.logprobs),
                )
            )

    def completions(self) -> tuple[Completion, ...]:
        return tuple(self._render(index, beam) for index, beam in enumerate(self.search.best(self.params.n)))

    def num_completion_tokens(self) -> int:
        return sum(len(beam.token_ids) for beam in self.search.best(self.params.n))

    def _candidates(
        self, beams: SequenceOf[Sequence], tops: SequenceOf[SequenceOf[tuple[int, float]]]
    ) -> list[Candidate]:
        num_shown = self.params.logprobs or 0
        return [
            Candidate(
                parent,
                token_id,
                beam.cumulative_logprob + logprob,
                TokenLogprob(token_id, logprob, tuple(top[:num_shown])),
            )
            for parent, (beam, top) in enumerate(zip(beams, tops, strict=True))
            for token_id, logprob in top[: self.search.num_candidates]
        ]

    def _ending_of(self, candidate: Candidate, beams: SequenceOf[Sequence]) -> Ending | None:
        parent = beams[candidate.parent]
        ending = self._ending_of_token(candidate.token_id, parent.num_output_tokens + 1)
        if not self.params.stop or (ending is not None and ending.is_stop):
            return ending
        # Beams come and go, so their text is not kept: it is made again where stop strings ask for it.
        _, ending = self._replay([*parent.output_token_ids, candidate.token_id], ending)
        return ending

    def _collect(self, parent: Sequence, candidate: Candidate, ending: Ending) -> None:
        token_ids = (*parent.output_token_ids, candidate.token_id)
        self.search.collect(
            FinishedBeam(
                token_ids,
                candidate.cumulative_logprob,
                self.search.score(candidate.cumulative_logprob, len(token_ids)),
                ending,
                (*parent.logprobs, candidate.entry),
            )
        )

    def _replay(
        self, token_ids: SequenceOf[int], ending: Ending | None
    ) -> tuple[SequenceText, Ending | None]:
        text = self._new_text()
        for token_id in token_ids[:-1]:
            text.push(token_id)
        for token_id in token_ids[-1:]:
            _, ending = self._push(text, token_id, ending)
        return text, ending

    def _render(self, index: int, beam: FinishedBeam) -> Completion:
        text, _ = self._replay(beam.token_ids, beam.ending)
        ending = (beam.ending.finish_reason, beam.ending.stop_reason)
        return self._completion(index, text, beam.token_ids, beam.logprobs, beam.cumulative_logprob, ending)
