"""Which tokens a sequence must not take next: those that would end it too soon, or complete a bad word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.sampling import SamplingParams


class Encoder(Protocol):
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class ForbiddenTokens:
    """The rules of one request.

    Attributes:
        min_tokens: While a sequence has generated fewer, none of `ending` may come.
        ending: Tokens that would end it.
        bad_words: No output holds one of these runs of tokens.
    """

    min_tokens: int = 0
    ending: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, params: SamplingParams, eos_token_ids: frozenset[int], encoder: Encoder) -> ForbiddenTokens:
        """`eos_token_ids`: those that end this request."""
        return cls(
            min_tokens=params.min_tokens,
            ending=eos_token_ids | frozenset(params.stop_token_ids),
            bad_words=tuple(dict.fromkeys(_spellings(params.bad_words, encoder))),
        )

    def after(self, output_token_ids: Sequence[int]) -> frozenset[int]:
        """What must not follow these generated tokens."""
        ending = self.ending if len(output_token_ids) < self.min_tokens else frozenset[int]()
        return ending | {word[-1] for word in self.bad_words if _ends_with(output_token_ids, word[:-1])}


def _spellings(words: Sequence[str], encoder: Encoder) -> list[tuple[int, ...]]:
    """Each word at the beginning of a text and after a space, which most vocabularies spell differently."""
    texts = [text for word in words for text in (word, f" {word.lstrip()}")]
    return [tuple(ids) for text in texts if (ids := encoder.encode(text, add_special_tokens=False))]


def _ends_with(token_ids: Sequence[int], tail: tuple[int, ...]) -> bool:
    return not tail or tuple(token_ids[-len(tail) :]) == tail
