"""What is refused at the door: requests that this model and this cache could never run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.errors import InvalidRequestError
from engine.sampling import SamplingParams
from engine.scheduler import max_blocks_of
from engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is served, once it is loaded.

    Attributes:
        max_model_len: Prompt plus generated tokens of one sequence.
        num_parameters: As stored; tied ones count once.
    """

    architecture: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    num_parameters: int
    num_blocks: int
    block_size: int
    max_num_sequences: int
    tokenizer: Tokenizer = field(repr=False, compare=False)


def check_request(
    info: ModelInfo, prompt_token_ids: Sequence[int], params: SamplingParams, priority: int = 0
) -> None:
    """Raises InvalidRequestError if the request does not fit the model or can never fit the cache."""
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise InvalidRequestError("priority", priority, "must be a whole number")
    if len(prompt_token_ids) == 0:
        raise InvalidRequestError("prompt_token_ids", [], "must hold at least one token")
    _check_token_ids("prompt_token_ids", prompt_token_ids, info.vocab_size)
    _check_token_ids("stop_token_ids", params.stop_token_ids, info.vocab_size)
    _check_token_ids("logit_bias", tuple(params.logit_bias), info.vocab_size)
    _check_length(info, len(prompt_token_ids), params)
    if params.width > info.max_num_sequences:
        field_name = "n" if params.best_of is None else "best_of"
        rule = f"must be at most {info.max_num_sequences}, the sequences that run at once"
        raise InvalidRequestError(field_name, params.width, rule)
    _check_blocks(info, len(prompt_token_ids), params)


def _check_token_ids(field_name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            rule = f"must be whole numbers from 0 to {vocab_size - 1}"
            raise InvalidRequestError(field_name, token_id, rule)


def _check_length(info: ModelInfo, num_prompt_tokens: int, params: SamplingParams) -> None:
    if num_prompt_tokens > info.max_model_len:
        rule = f"must be at most {info.max_model_len} tokens, the longest context of the model"
        raise InvalidRequestError("prompt_token_ids", num_prompt_tokens, rule)
    if num_prompt_tokens + params.max_tokens > info.max_model_len:
        rule = (
            f"must be at most {info.max_model_len - num_prompt_tokens} after a prompt of {num_prompt_tokens}"
            f" tokens: the longest context of the model is {info.max_model_len}"
        )
        raise InvalidRequestError("max_tokens", params.max_tokens, rule)


def _check_blocks(info: ModelInfo, num_prompt_tokens: int, params: SamplingParams) -> None:
    num_blocks = max_blocks_of(info.block_size, num_prompt_tokens, params.width, params.max_tokens)
    if num_blocks > info.num_blocks:
        rule = (
            f"needs up to {num_blocks} blocks of {info.block_size} tokens with this prompt and"
            f" {params.width} sequences; the cache has {info.num_blocks}"
        )
        raise InvalidRequestError("max_tokens", params.max_tokens, rule)
