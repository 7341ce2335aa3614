"""What choosing a token needs of a whole vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_ops import reference
from cuda_ops.errors import OpInputError
from cuda_ops.registry import define_op


@dataclass(frozen=True, slots=True)
class LogitChanges:
    """What happens to logits before a token is chosen, first the list, then the masks.

    Attributes:
        starts: `[num_rows + 1]` int32: row r has the entries from `starts[r]` to `starts[r + 1]`.
        tokens: `[num_entries, 3]` int32: a token, each once and ascending within a row; whether the
            repetition penalty applies to it (0 or 1); how often it counts for presence and frequency penalty.
        biases: `[num_entries]` float32, added before the penalties; -inf forbids the token.
        masks: `[num_masks, at least vocab_size / 32]` int32; bit `t % 32` of word `t // 32` allows token t.
        mask_rows: `[num_rows]` int32: a row's mask, or a negative number, which allows all.
    """

    starts: Tensor
    tokens: Tensor
    biases: Tensor
    masks: Tensor
    mask_rows: Tensor


@dataclass(frozen=True, slots=True)
class ChosenTokens:
    """Attributes:
    token_ids: `[num_rows]` int64.
    logprobs: `[num_rows]` float32, of the logits as they were given; empty unless asked for.
    are_sound: `[num_rows]` bool: neither a NaN nor +inf among the logits as given, nor -inf alone. Of other
        rows any token may come.
    top_ids: `[num_rows, num_top]` int64, the most probable tokens of the logits as given, best first, equal
        ones in the order of their ids.
    top_logprobs: like `top_ids`, float32, their log-probabilities.
    """

    token_ids: Tensor
    logprobs: Tensor
    are_sound: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def sample_tokens(
    logits: Tensor,
    numbers: Tensor,
    controls: Tensor,
    changes: LogitChanges | None = None,
    *,
    truncates: bool,
    scores: bool,
    num_top: int = 0,
) -> ChosenTokens:
    """Choose a token for each row: the best of `logit - temperature * log(E)`, of equals the first.

    E is exponential noise, `-log(1 - u)`, so that the choice is a draw from `softmax(logit / temperature)`
    (Gumbel-max), and u the token's own number in (0, 1): word `token % 4` of Philox4x32-10 for the seed and
    the counter (token / 4, position, sequence, 0). The same row gives the same token beside any others, and
    on every device as far as logits and logarithms agree.

    Of a row with a temperature above 0 the race is among the tokens that remain: those with `min_p` times the
    largest probability or more; of these the `top_k` most probable; of these the fewest that hold `top_p` of
    what is left, and at least one. Equally probable ones are taken in the order of their ids.

    Args:
        logits: `[num_rows, vocab_size]`, left as they are; neighbours side by side, or the reference runs.
        numbers: `[num_rows, 4]` int64: seed, sequence, position, and `top_k` (0: no limit).
        controls: `[num_rows, 6]` float32: temperature (0 takes the largest logit), `top_p`, `min_p`, and the
            repetition, presence and frequency penalties, which `changes` makes count.
        changes: None where no row has any; masks without a row may be `[0, n]`.
        truncates: whether any row has `top_k`, `top_p` or `min_p`; they are not looked at otherwise.
        scores: whether log-probabilities are wanted.
        num_top: how many of each row's most probable tokens are wanted too.

    Raises:
        OpInputError: shapes or dtypes that do not fit together, an empty vocabulary, or more tokens wanted
            than it has.
    """
    _check_rows(logits, numbers, controls)
    if not 0 <= num_top <= logits.shape[1]:
        raise OpInputError("sample_tokens", f"num_top is {num_top}: 0 to {logits.shape[1]}, the vocabulary")
    if changes is not None:
        _check_changes(logits, changes)
    lists = (None, None, None) if changes is None else (changes.starts, changes.tokens, changes.biases)
    masks = (None, None) if changes is None else (changes.masks, changes.mask_rows)
    chosen = _sample_tokens(logits, numbers, controls, *lists, *masks, truncates, scores, num_top)
    return ChosenTokens(*chosen)


def softmax_at(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Return `softmax(logits / temperature)` of each row, without overflow at any temperature above 0.

    In one pass over memory where four torch calls make four copies: for 64 rows of 50,272 that is the larger
    part of sampling.

    Args:
        logits: `[num_rows, vocab_size]`; -inf is a token that cannot be drawn.
        temperatures: `[num_rows]` float32, above 0.

    Returns:
        Contiguous float32; what lies more than 87 below a row's maximum, divided, may be 0.

    Raises:
        OpInputError: not one temperature a row.
    """
    if logits.dim() != 2 or temperatures.shape != logits.shape[:1]:
        raise OpInputError(
            "softmax_at",
            f"logits is {list(logits.shape)}, temperatures {list(temperatures.shape)}: one for each row",
        )
    result: Tensor = _softmax_at(logits, temperatures)
    return result


def argmax(logits: Tensor) -> Tensor:
    """Return each row's largest element's place, the first of equals, or of a NaN: `[num_rows]` int64.

    Args:
        logits: `[num_rows, vocab_size]`, of one column at least.
    """
    result: Tensor = _argmax(logits)
    return result


def _check_rows(logits: Tensor, numbers: Tensor, controls: Tensor) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise OpInputError("sample_tokens", f"logits is {list(logits.shape)}: [num_rows, vocab_size]")
    for name, tensor, width, dtype in (
        ("numbers", numbers, 4, torch.int64),
        ("controls", controls, 6, torch.float32),
    ):
        if tensor.shape != (len(logits), width) or tensor.dtype != dtype or not tensor.is_contiguous():
            raise OpInputError(
                "sample_tokens",
                f"{name} is {list(tensor.shape)} {tensor.dtype}: contiguous [{len(logits)}, {width}] {dtype}",
            )


def _check_changes(logits: Tensor, changes: LogitChanges) -> None:
    num_rows, vocab_size = logits.shape
    num_entries = len(changes.tokens)
    num_words = max(changes.masks.shape[-1], -(-vocab_size // 32))
    expected = (
        ("starts", changes.starts, (num_rows + 1,), torch.int32),
        ("tokens", changes.tokens, (num_entries, 3), torch.int32),
        ("biases", changes.biases, (num_entries,), torch.float32),
        ("masks", changes.masks, (len(changes.masks), num_words), torch.int32),
        ("mask_rows", changes.mask_rows, (num_rows,), torch.int32),
    )
    for name, tensor, shape, dtype in expected:
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise OpInputError(
                "sample_tokens",
                f"{name} is {list(tensor.shape)} {tensor.dtype}: contiguous {list(shape)} {dtype}",
            )


def _fake(logits: Tensor, temperatures: Tensor) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float32)


_softmax_at = define_op(
    "softmax_at(Tensor logits, Tensor temperatures) -> Tensor", reference=reference.softmax_at, fake=_fake
)
_argmax = define_op(
    "argmax(Tensor logits) -> Tensor",
    reference=reference.argmax,
    fake=lambda logits: logits.new_empty(logits.shape[:1], dtype=torch.int64),
)


def _fake_sample(
    logits: Tensor,
    numbers: Tensor,
    controls: Tensor,
    starts: Tensor | None,
    changes: Tensor | None,
    biases: Tensor | None,
    masks: Tensor | None,
    mask_rows: Tensor | None,
    truncates: bool,
    scores: bool,
    num_top: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows = logits.shape[0]
    return (
        logits.new_empty(num_rows, dtype=torch.int64),
        logits.new_empty(num_rows if scores else 0, dtype=torch.float32),
        logits.new_empty(num_rows, dtype=torch.bool),
        logits.new_empty((num_rows, num_top), dtype=torch.int64),
        logits.new_empty((num_rows, num_top), dtype=torch.float32),
    )


_sample_tokens = define_op(
    "sample_tokens(Tensor logits, Tensor numbers, Tensor controls, Tensor? starts, Tensor? changes, "
    "Tensor? biases, Tensor? masks, Tensor? mask_rows, bool truncates, bool scores, "
    "int num_top) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.sample_tokens,
    fake=_fake_sample,
)
