"""What a request has produced so far: text, log-probabilities, phases, and at the end its output.

The scheduler never looks here, and nothing here looks at blocks. Two kinds, one for each way to decode:
`SampledProgress` takes tokens for each sequence, `BeamProgress` takes candidates for all of them at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from engine.beam import Ending
from engine.detokenizer import IncrementalDetokenizer
from engine.forbidden import ForbiddenTokens
from engine.outputs import (
    Completion,
    FinishReason,
    Logprobs,
    PromptLogprob,
    RequestFailure,
    RequestOutput,
    Usage,
)
from engine.sampling import SamplingParams
from engine.sequence import Request, Sequence, TokenLogprob
from engine.stats import PhaseRecorder
from engine.text import SequenceText, TokenTexts, render_logprobs, render_prompt_logprob


class RequestProgress(ABC):
    """What both kinds share.

    Attributes:
        phases: The request's stamps.
        prompt_logprobs: Of the prompt's tokens from the second on, as far as they are computed.
        prompt_ranks: Of the same, where `prompt_logprobs` were asked for.
        failure: Why the request as a whole has failed.
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
        self.failure: RequestFailure | None = None
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

    def forbidden(self, sequence: Sequence, ahead: SequenceOf[int] = ()) -> frozenset[int]:
        """Tokens that the sequence must not take after the tokens `ahead`, which it does not have yet."""
        if not (self.params.min_tokens or self.params.bad_words):
            return frozenset()
        return self._forbidden.after([*sequence.output_token_ids, *ahead])

    @abstractmethod
    def abort(self) -> None:
        """Make completions of what the unfinished sequences have."""

    @abstractmethod
    def completions(self) -> tuple[Completion, ...]: ...

    @abstractmethod
    def num_completion_tokens(self) -> int: ...

    def output(self, at: float) -> RequestOutput:
        """The request's result, once all its sequences have finished, been aborted or failed."""
        try:
            completions, prompt_logprobs = self.completions(), self._told_prompt_logprobs()
        except Exception as error:  # whatever a tokenizer may raise
            self.failure = self.failure or RequestFailure.of(error)
            completions, prompt_logprobs = (), None
        return RequestOutput(
            request_id=self.request.request_id,
            completions=completions,
            usage=Usage(
                prompt_tokens=len(self._prompt_token_ids),
                completion_tokens=self.num_completion_tokens(),
                cached_tokens=self.request.num_cached_tokens or 0,
            ),
            phases=self.phases.finish(at),
            failure=self.failure,
            prompt_logprobs=prompt_logprobs,
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
