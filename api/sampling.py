"""From a checked body to the engine's sampling parameters: the rules that span fields, and the names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from api.errors import ContextTooLong, InvalidRequest
from api.schemas import DEFAULT_MAX_TOKENS, CompletionBody
from api.structured import structured_output
from jobs.model import Prompt
from jobs.registry import ModelCard

FIELDS = (
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "n",
    "best_of",
    "use_beam_search",
    "length_penalty",
    "early_stopping",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "logprobs",
    "prompt_logprobs",
    "echo",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "bad_words",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "structured_outputs",
)
"""Taken over as they are when the client gave them. The defaults of both sides are the same."""


def to_sampling(body: CompletionBody, card: ModelCard, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Keyword arguments of `engine.sampling.SamplingParams`, as they look in JSON.

    Raises:
        InvalidRequest: fields that contradict each other or the model.
        ContextTooLong: a prompt and max_tokens do not fit.
    """
    check_options(body, card)
    given = {name: value for name in FIELDS if (value := getattr(body, name)) is not None}
    for name in ("stop", "stop_token_ids", "bad_words"):
        if name in given:
            given[name] = list(given[name])
    if body.logit_bias is not None:
        given["logit_bias"] = {str(token): bias for token, bias in body.logit_bias.items()}
    structure = structured_output(body)
    if structure is not None:
        given["structured_outputs"] = structure
    max_tokens = fit_max_tokens(body, card, prompts)
    if body.min_tokens is not None and body.min_tokens > max_tokens:
        raise InvalidRequest(
            "min_tokens", body.min_tokens, f"must be at most max_tokens, which is {max_tokens}"
        )
    return {"max_tokens": max_tokens, **given}


def check_options(body: CompletionBody, card: ModelCard) -> None:
    """What can be refused before a prompt is looked at."""
    if body.stream:
        raise InvalidRequest("stream", body.stream, "streaming is not offered yet")
    if body.suffix:
        raise InvalidRequest("suffix", body.suffix, "completing before a suffix is not offered")
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("max_tokens", 0, "must be at least 1, unless echo is true")
    _check_width(body, card)
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(body, name) or 0) > card.max_logprobs:
            raise InvalidRequest(name, getattr(body, name), f"must be at most {card.max_logprobs}")
    _check_vocabulary("stop_token_ids", body.stop_token_ids or (), card)
    _check_vocabulary("logit_bias", tuple(body.logit_bias or ()), card)


def fit_max_tokens(body: CompletionBody, card: ModelCard, prompts: Sequence[Prompt]) -> int:
    """What was asked for, which must fit; or OpenAI's default, cut to what the longest prompt leaves."""
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index].token_ids))
    num_prompt_tokens = len(prompts[longest].token_ids)
    room = card.max_model_len - num_prompt_tokens
    if body.max_tokens is None:
        return min(DEFAULT_MAX_TOKENS, room)
    if body.max_tokens > room:
        where = f"prompt[{longest}]" if len(prompts) > 1 else "prompt"
        raise ContextTooLong(where, card.max_model_len, num_prompt_tokens, body.max_tokens)
    return body.max_tokens


def num_sequences(body: CompletionBody) -> int:
    """Sequences a prompt."""
    return body.best_of or body.n or 1


def _check_width(body: CompletionBody, card: ModelCard) -> None:
    n = body.n or 1
    if body.best_of is not None and body.best_of < n:
        raise InvalidRequest("best_of", body.best_of, f"must be at least n, which is {n}")
    if num_sequences(body) > card.max_num_sequences:
        field = "n" if body.best_of is None else "best_of"
        rule = f"must be at most {card.max_num_sequences}, what a worker of this model runs at once"
        raise InvalidRequest(field, num_sequences(body), rule)


def _check_vocabulary(field: str, tokens: tuple[int, ...], card: ModelCard) -> None:
    for token in tokens:
        if token >= card.vocab_size:
            raise InvalidRequest(field, token, f"must be token ids from 0 to {card.vocab_size - 1}")
