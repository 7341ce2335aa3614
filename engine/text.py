"""The text of one sequence as it grows: detokenised, searched for stop strings, released piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.detokenizer import Decoder, IncrementalDetokenizer
from engine.forbidden import Encoder
from engine.outputs import Logprobs, PromptLogprob
from engine.sampling import SamplingParams
from engine.sequence import TokenLogprob
from engine.stop import StopMatcher


class TokenTexts(Decoder, Encoder, Protocol):
    """What is needed of a tokenizer here."""

    def id_to_token_text(self, token_id: int) -> str: ...


class SequenceText:
    """Text of a prompt's continuation.

    Attributes:
        offsets: Per pushed token, the characters of text there were before it.
    """

    __slots__ = ("_detokenizer", "_length", "_matcher", "_min_tokens", "_pieces", "offsets")

    def __init__(self, texts: Decoder, params: SamplingParams, context: Sequence[int], echoed: str) -> None:
        """`context`: the prompt's token ids; `echoed`: what the text starts with."""
        self._detokenizer = IncrementalDetokenizer(
            texts, context, skip_special_tokens=params.skip_special_tokens
        )
        self._min_tokens = params.min_tokens
        self._matcher = StopMatcher(params.stop, keep_match=params.include_stop_str_in_output)
        self._pieces = [echoed] if echoed else []
        self._length = len(echoed)
        self.offsets: list[int] = []

    @property
    def text(self) -> str:
        """All text released so far, the echoed prompt included."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> tuple[str, str | None]:
        """Add a token. Returns the text released by it, and the stop string it completed, if any."""
        self.offsets.append(self._length)
        new = self._detokenizer.push(token_id)
        self._length += len(new)
        if len(self.offsets) <= self._min_tokens:
            self._release(new)
            return new, None
        scan = self._matcher.feed(new)
        self._release(scan.text)
        return scan.text, scan.matched

    def skip(self) -> None:
        """Count a token whose text is left out: the one that ended the sequence."""
        self.offsets.append(self._length)

    def flush(self) -> str:
        """Release what was held back, for no more text comes."""
        rest = self._matcher.flush() + self._detokenizer.flush()
        self._release(rest)
        return rest

    def _release(self, text: str) -> None:
        if text:
            self._pieces.append(text)


def render_logprobs(
    texts: TokenTexts,
    entries: Sequence[TokenLogprob | None],
    token_ids: Sequence[int],
    offsets: Sequence[int],
) -> Logprobs:
    """OpenAI's four lists; `entries` has `None` for a prompt's first token."""
    return Logprobs(
        tokens=tuple(texts.id_to_token_text(token_id) for token_id in token_ids),
        token_logprobs=tuple(None if entry is None else entry.logprob for entry in entries),
        top_logprobs=tuple(None if entry is None else _render_top(texts, entry) for entry in entries),
        text_offset=tuple(offsets),
    )


def _render_top(texts: TokenTexts, entry: TokenLogprob) -> dict[str, float]:
    rendered: dict[str, float] = {}
    for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
        # Two tokens can have one text (parts of characters do): the more probable one keeps it.
        rendered.setdefault(texts.id_to_token_text(token_id), logprob)
    return rendered


def render_prompt_logprob(
    texts: TokenTexts, entry: TokenLogprob, rank: int, num_tops: int
) -> dict[int, PromptLogprob]:
    """The token itself first, then the most probable ones."""
    ranked = [(entry.token_id, entry.logprob, rank)]
    tops = enumerate(entry.top[:num_tops], start=1)
    ranked += [
        (token_id, logprob, place) for place, (token_id, logprob) in tops if token_id != entry.token_id
    ]
    return {
        token_id: PromptLogprob(logprob, place, texts.id_to_token_text(token_id))
        for token_id, logprob, place in ranked
    }
