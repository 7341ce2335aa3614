"""Sequences that each take their own tokens, greedy or sampled."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

from engine.beam import Ending
from engine.outputs import Completion, FinishReason, TokenDelta
from engine.progress import RequestProgress
from engine.sequence import Request, Sequence, TokenLogprob
from engine.structured import Guide
from engine.text import SequenceText, TokenTexts


@dataclass(frozen=True, slots=True)
class Advance:
    """What one token did to one sequence.

    Attributes:
        text: What it released, after the echoed prompt where it is the first.
    """

    text: str
    is_finished: bool


class SampledProgress(RequestProgress):
    """Sequences that take tokens one by one, independent of each other.

    Each has a guide of its own where the output must follow a structure.
    """

    def __init__(
        self,
        request: Request,
        texts: TokenTexts,
        eos_token_ids: frozenset[int],
        *,
        prompt_text: str | None,
        arrived_at: float,
        guide: Guide | None = None,
    ) -> None:
        super().__init__(request, texts, eos_token_ids, prompt_text=prompt_text, arrived_at=arrived_at)
        self._guide = guide
        self._guides: dict[int, Guide] = {}
        self._sequence_texts: dict[int, SequenceText] = {}
        self._completions: list[Completion] = []

    def accept(self, sequence: Sequence, token_id: int, entry: TokenLogprob | None) -> Advance:
        """Append a token to the sequence."""
        sequence.token_ids.append(token_id)
        if entry is not None:
            sequence.cumulative_logprob += entry.logprob
            if self.params.logprobs is not None:
                sequence.logprobs.append(entry)
        text = self._sequence_texts.get(sequence.index)
        is_first = text is None
        if text is None:
            text = self._sequence_texts[sequence.index] = self._new_text()
        ending = self._ending_of_token(token_id, sequence.num_output_tokens)
        if self._completes_structure(sequence, token_id) and (ending is None or not ending.is_stop):
            ending = Ending("stop", None)
        released, ending = self._push(text, token_id, ending)
        if ending is not None:
            self._finish(sequence, ending.finish_reason, ending.stop_reason)
        return Advance(self._echoed + released if is_first else released, ending is not None)

    def allowed(self, sequence: Sequence) -> bytes | None:
        """A bit for each token that the sequence may take next; `None` for any."""
        guide = self._guide_of(sequence)
        return None if guide is None else guide.allowed()

    def accept_nothing(self) -> list[TokenDelta]:
        """Finish a request of `max_tokens` 0, once its prompt is computed; returns the echoed prompt."""
        root = self.request.sequences[0]
        for index in range(self.params.width):
            self._sequence_texts[index] = self._new_text()
            self._finish(replace(root, index=index), "length", None)
        deltas = [self.delta(index, (), self._echoed) for index in range(self.params.width)]
        return [delta for delta in deltas if delta is not None]

    def abort(self) -> None:
        for sequence in self.request.sequences:
            text = self._sequence_texts.setdefault(sequence.index, self._new_text())
            text.flush()
            self._finish(sequence, "abort", None)

    def completions(self) -> tuple[Completion, ...]:
        if self.params.width == self.params.n:
            return tuple(sorted(self._completions, key=lambda completion: completion.index))
        best = sorted(self._completions, key=_mean_logprob, reverse=True)[: self.params.n]
        return tuple(replace(completion, index=index) for index, completion in enumerate(best))

    def num_completion_tokens(self) -> int:
        return sum(len(completion.token_ids) for completion in self._completions)

    def _guide_of(self, sequence: Sequence) -> Guide | None:
        if self._guide is not None and sequence.index not in self._guides:
            self._guides[sequence.index] = self._guide.fork()
        return self._guides.get(sequence.index)

    def _completes_structure(self, sequence: Sequence, token_id: int) -> bool:
        guide = self._guide_of(sequence)
        if guide is None:
            return False
        guide.accept(token_id)
        self.failure = self.failure or guide.failure
        return guide.is_over

    def delta(self, index: int, token_ids: SequenceOf[int], text: str) -> TokenDelta | None:
        """What is told of tokens that a sequence took; nothing where it may yet be discarded."""
        if self.params.width > self.params.n or self.params.use_beam_search:
            return None
        return TokenDelta(self.request.request_id, index, tuple(token_ids), text)

    def _finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None) -> None:
        self._completions.append(
            self._completion(
                sequence.index,
                self._sequence_texts[sequence.index],
                sequence.output_token_ids,
                sequence.logprobs,
                sequence.cumulative_logprob if self.params.needs_logprobs else None,
                (reason, stop_reason),
            )
        )


def _mean_logprob(completion: Completion) -> float:
    return (completion.cumulative_logprob or 0.0) / max(1, len(completion.token_ids))
