"""What a request has produced so far: text, log-probabilities, phases, and at the end its output.

The scheduler never looks here, and nothing here looks at blocks. Two kinds, one for each way to decode:
`SampledProgress` takes a token for each sequence, `BeamProgress` takes candidates for all of them at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

from engine.beam import BeamSearch, Candidate, Ending, FinishedBeam
from engine.detokenizer import IncrementalDetokenizer
from engine.forbidden import ForbiddenTokens
from engine.outputs import Completion, FinishReason, Logprobs, PromptLogprob, RequestOutput, TokenDelta, Usage
from engine.sampling import SamplingParams
from engine.sequence import Request, Sequence, TokenLogprob
from engine.stats import PhaseRecorder
from engine.structured import Guide
from engine.text import SequenceText, TokenTexts, render_logprobs, render_prompt_logprob


@dataclass(frozen=True, slots=True)
class Advance:
    """What one token did to one sequence."""

    delta: TokenDelta | None
    is_finished: bool


class RequestProgress(ABC):
    """What both kinds share.

    Attributes:
        phases: The request's stamps.
        prompt_logprobs: Of the prompt's tokens from the second on, as far as they are computed.
        prompt_ranks: Of the same, where `prompt_logprobs` were asked for.
        error: Why the request as a whole has failed.
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
        self.request = request
        self.phases = PhaseRecorder(arrived_at)
        self.prompt_logprobs: list[TokenLogprob] = []
        self.prompt_ranks: list[int] = []
        self.error: str | None = None
        self._texts = texts
        root = request.sequences[0]
        self._prompt_token_ids = root.token_ids[: root.num_prompt_tokens]
        self._echoed = self._echoed_text(prompt_text)
        self._eos_token_ids = frozenset() if request.params.ignore_eos else eos_token_ids
        self._forbidden = ForbiddenTokens.of(request.params, self._eos_token_ids, texts)

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some of the prompt's log-probabilities are wanted and still missing."""
        return (
            self.params.needs_prompt_logprobs and len(self.prompt_logprobs) < len(self._prompt_token_ids) - 1
        )

    def forbidden(self, sequence: Sequence) -> frozenset[int]:
        """Tokens that the sequence must not take next."""
        if not (self.params.min_tokens or self.params.bad_words):
            return frozenset()
        return self._forbidden.after(sequence.output_token_ids)

    @abstractmethod
    def abort(self) -> None:
        """Make completions of what the unfinished sequences have."""

    @abstractmethod
    def completions(self) -> tuple[Completion, ...]: ...

    @abstractmethod
    def num_completion_tokens(self) -> int: ...

    def output(self, at: float) -> RequestOutput:
        """The request's result, once all its sequences have finished or been aborted."""
        return RequestOutput(
            request_id=self.request.request_id,
            completions=self.completions(),
            usage=Usage(
                prompt_tokens=len(self._prompt_token_ids),
                completion_tokens=self.num_completion_tokens(),
                cached_tokens=self.request.num_cached_tokens or 0,
            ),
            phases=self.phases.finish(at),
            error=self.error,
            prompt_logprobs=self._told_prompt_logprobs(),
        )

    def _told_prompt_logprobs(self) -> tuple[dict[int, PromptLogprob] | None, ...] | None:
        num_tops = self.params.prompt_logprobs
        if num_tops is None:
            return None
        pairs = zip(self.prompt_logprobs, self.prompt_ranks, strict=True)
        return (None, *(render_prompt_logprob(self._texts, *pair, num_tops) for pair in pairs))

    def _echoed_text(self, prompt_text: str | None) -> str:
        if not self.params.echo:
            return ""
        if prompt_text is not None:
            return prompt_text
        return self._texts.decode(self._prompt_token_ids, self.params.skip_special_tokens)

    def _ending_of_token(self, token_id: int, num_output_tokens: int) -> Ending | None:
        if token_id in self._eos_token_ids:
            return Ending("stop", None)
        if token_id in self.params.stop_token_ids:
            return Ending("stop", token_id)
        if num_output_tokens >= self.params.max_tokens:
            return Ending("length", None)
        return None

    def _new_text(self) -> SequenceText:
        return SequenceText(self._texts, self.params, self._prompt_token_ids, self._echoed)

    def _push(self, text: SequenceText, token_id: int, ending: Ending | None) -> tuple[str, Ending | None]:
        """Add a token to a text. Returns what is released, and the ending, which a stop string may change."""
        is_stop_token = token_id in self._eos_token_ids or token_id in self.params.stop_token_ids
        if is_stop_token and not self.params.include_stop_str_in_output:
            text.skip()
            return text.flush(), ending
        released, matched = text.push(token_id)
        if matched is not None and not is_stop_token:
            return released, Ending("stop", matched)
        return (released + text.flush() if ending is not None and matched is None else released), ending

    def _completion(
        self,
        index: int,
        text: SequenceText,
        token_ids: SequenceOf[int],
        entries: SequenceOf[TokenLogprob],
        cumulative_logprob: float | None,
        ending: tuple[FinishReason, int | str | None],
    ) -> Completion:
        return Completion(
            index=index,
            text=text.text,
            token_ids=tuple(token_ids),
            finish_reason=ending[0],
            stop_reason=ending[1],
            cumulative_logprob=cumulative_logprob,
            logprobs=None if self.params.logprobs is None else self._logprobs(text, token_ids, entries),
        )

    def _logprobs(
        self, text: SequenceText, token_ids: SequenceOf[int], entries: SequenceOf[TokenLogprob]
    ) -> Logprobs:
        if not self.params.echo:
            return render_logprobs(self._texts, entries, token_ids, text.offsets)
        # An aborted prefill leaves only part of the prompt's log-probabilities.
        num_tops = self.params.logprobs or 0
        shown = (replace(entry, top=entry.top[:num_tops]) for entry in self.prompt_logprobs)
        prompt_entries = [None, *shown]
        num_prompt = len(prompt_entries)
        return render_logprobs(
            self._texts,
            [*prompt_entries, *entries],
            [*self._prompt_token_ids[:num_prompt], *token_ids],
            [*self._prompt_offsets()[:num_prompt], *text.offsets],
        )

    def _prompt_offsets(self) -> list[int]:
        detokenizer = IncrementalDetokenizer(self._texts, skip_special_tokens=self.params.skip_special_tokens)
        offsets, length = [], 0
        for token_id in self._prompt_token_ids:
            offsets.append(length)
            length += len(detokenizer.push(token_id))
        return offsets


class SampledProgress(RequestProgress):
    """Sequences that each take one token a step, independent of each other.

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
        shown = self._echoed + released if is_first else released
        return Advance(self._delta(sequence.index, (token_id,), shown), ending is not None)

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
        deltas = [self._delta(index, (), self._echoed) for index in range(self.params.width)]
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
        self.error = self.error or guide.error
        return guide.is_over

    def _delta(self, index: int, token_ids: tuple[int, ...], text: str) -> TokenDelta | None:
        if self.params.width > self.params.n or self.params.use_beam_search:
            return None
        return TokenDelta(self.request.request_id, index, token_ids, text)

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


class BeamProgress(RequestProgress):
    """Beams that are ranked together at each step; nothing is shown before the end.

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


def _mean_logprob(completion: Completion) -> float:
    return (completion.cumulative_logprob or 0.0) / max(1, len(completion.token_ids))
