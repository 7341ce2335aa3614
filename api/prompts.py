"""Prompts: which forms are taken, and how text becomes token ids before anything is queued."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any

from tokenizers import Tokenizer

from api.errors import InvalidRequest, NoWorker, PromptTooLong
from api.single_flight import SingleFlight
from jobs.model import Prompt
from jobs.registry import ModelCard, ModelDirectory

MAX_TOKENIZERS = 8
INLINE_SIZE = 4000
"""Prompts of up to so many characters (or ids) together are dealt with on the event loop: about 1 ms."""

RawPrompt = str | list[int]


def read_prompts(raw: Any, *, max_prompts: int) -> list[RawPrompt]:
    """The prompts in any of the four forms, as a list.

    Raises:
        InvalidRequest: it has another form, or one of the prompts is empty.
    """
    rule = "must be a string, a list of strings, a list of token ids or a list of such lists"
    if not isinstance(raw, str | list):
        raise InvalidRequest("prompt", raw, rule)
    if not raw:
        raise InvalidRequest("prompt", raw, "must not be empty")
    prompts: list[RawPrompt] = [raw] if isinstance(raw, str) or _is_token(raw[0]) else raw
    if len(prompts) > max_prompts:
        raise InvalidRequest("prompt", raw, f"must have at most {max_prompts} prompts")
    form = type(prompts[0])
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str | list) or not isinstance(prompt, form):
            raise InvalidRequest(_where(index, prompts), prompt, rule)
        if not prompt:
            raise InvalidRequest(_where(index, prompts), prompt, "must not be empty")
    return prompts


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    tokenizer: Tokenizer
    max_token_characters: int
    """The longest token of the vocabulary: a text of n characters has at least n / this many tokens."""

    @classmethod
    def from_json(cls, text: str) -> LoadedTokenizer:
        tokenizer = Tokenizer.from_str(text)
        # A tokenizer file may have been saved with either, and would then cut prompts in silence.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        return cls(tokenizer, max((len(token) for token in vocabulary), default=1))

    def encode(self, texts: list[str]) -> list[list[int]]:
        """With the model's special tokens. The batch call is the one that gives up the GIL."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts)]


class Prompts:
    """Checks and tokenizes; keeps the tokenizers of the models asked for last.

    No model folder is needed: workers announce their tokenizer, and a digest names it for ever.
    """

    def __init__(self, directory: ModelDirectory) -> None:
        self._directory = directory
        self._loaded: OrderedDict[str, LoadedTokenizer] = OrderedDict()
        self._loading: SingleFlight[LoadedTokenizer] = SingleFlight()

    async def prepare(self, raw: list[RawPrompt], card: ModelCard, *, keep_text: bool) -> tuple[Prompt, ...]:
        """Token ids for each prompt: in the model's vocabulary, not none, and room for one more.

        Args:
            raw: from `read_prompts`.
            card: of the model that will run them.
            keep_text: the prompt's text goes along, as `echo` needs it.

        Raises:
            InvalidRequest: a prompt breaks one of those rules.
            NoWorker: the model's tokenizer was never announced.
        """
        size = sum(map(len, raw))
        if not isinstance(raw[0], str):
            call = partial(_check_ids, raw, card)
        else:
            call = partial(_tokenize, raw, await self._tokenizer(card), card, keep_text)
        return call() if size <= INLINE_SIZE else await asyncio.to_thread(call)

    async def _tokenizer(self, card: ModelCard) -> LoadedTokenizer:
        digest = card.tokenizer_digest
        if digest not in self._loaded:
            return await self._loading.ask(digest, partial(self._load, digest, card.name))
        self._loaded.move_to_end(digest)
        return self._loaded[digest]

    async def _load(self, digest: str, model: str) -> LoadedTokenizer:
        text = await self._directory.tokenizer_json(digest)
        if text is None:
            raise NoWorker(model)
        loaded = await asyncio.to_thread(LoadedTokenizer.from_json, text)
        self._loaded[digest] = loaded
        while len(self._loaded) > MAX_TOKENIZERS:
            self._loaded.popitem(last=False)
        return loaded


def _tokenize(
    texts: list[Any], loaded: LoadedTokenizer, card: ModelCard, keep_text: bool
) -> tuple[Prompt, ...]:
    for index, text in enumerate(texts):
        # Such a text cannot fit, whatever its tokens: no time is spent on counting them.
        at_least = len(text) // loaded.max_token_characters
        if at_least >= card.max_model_len:
            raise PromptTooLong(_where(index, texts), card.max_model_len, at_least, is_exact=False)
    prompts = []
    for index, ids in enumerate(loaded.encode(texts)):
        where = _where(index, texts)
        if not ids:
            raise InvalidRequest(where, texts[index], "has no tokens")
        _check_length(ids, card, where)
        if max(ids) >= card.vocab_size:
            raise InvalidRequest(where, texts[index], "has tokens that are not in the model's vocabulary")
        prompts.append(Prompt(token_ids=tuple(ids), text=texts[index] if keep_text else None))
    return tuple(prompts)


def _check_ids(prompts: list[Any], card: ModelCard) -> tuple[Prompt, ...]:
    for index, ids in enumerate(prompts):
        where = _where(index, prompts)
        _check_length(ids, card, where)
        for position, token in enumerate(ids):
            if not _is_token(token) or not 0 <= token < card.vocab_size:
                rule = f"must be a token id, a whole number from 0 to {card.vocab_size - 1}"
                raise InvalidRequest(f"{where}[{position}]", token, rule)
    return tuple(Prompt(token_ids=tuple(ids)) for ids in prompts)


def _check_length(ids: list[int], card: ModelCard, where: str) -> None:
    if len(ids) >= card.max_model_len:
        raise PromptTooLong(where, card.max_model_len, len(ids))


def _where(index: int, prompts: list[Any]) -> str:
    return f"prompt[{index}]" if len(prompts) > 1 else "prompt"


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
