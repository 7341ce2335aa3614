"""Attention over the paged key-value cache: one op for sequences that decode, one for those that prefill.

Both write into a caller's `out`, so that the two parts of a mixed batch share one result without a copy.
Blocks named by a table must hold finite numbers in every slot: slots past the context get weight 0, and 0
times NaN is NaN. A cache allocated with zeros keeps that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_ops import reference, reference_eight_bits
from cuda_ops.errors import OpInputError
from cuda_ops.kv_cache import NO_SCALES, Scales, check_scales
from cuda_ops.registry import define_op


def paged_attention_decode(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    max_context_len: int,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    split_len: int | None = None,
    scales: Scales = NO_SCALES,
) -> None:
    """Let one token of each sequence, its last, attend to the sequence's whole context.

    Scores, softmax and sums are float32.

    Args:
        out: `[num_sequences, num_heads, head_dim]`, mutated.
        query: like `out`, any strides; `num_heads` is a multiple of `num_kv_heads`, query head h reads key
            head `h // (num_heads / num_kv_heads)`.
        key_cache: `[num_blocks, num_kv_heads, block_size, head_dim]`, contiguous.
        value_cache: like `key_cache`.
        block_tables: `[num_sequences, max_blocks]` int32; unused entries name any valid block.
        context_lens: `[num_sequences]` int32, at least 1, the decoding token included.
        max_context_len: at least the largest of `context_lens`, at most `max_blocks * block_size`.
        scale: multiplies the scores before the softmax.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it; None sees all.
        soft_cap: bends scaled scores towards it, `soft_cap * tanh(score / soft_cap)`, before the softmax.
        split_len: where a kernel sums a context in parts, the tokens of each, a multiple of 16: a sequence's
            result then has the same bits in any batch. None lets the kernel choose, to fill the device.
        scales: of a float8 cache, as for `write_kv`.

    Raises:
        OpInputError: heads do not fit together, `split_len` is no multiple of 16, `soft_cap` not above 0, or
            `scales` do not fit the cache.
    """
    _check_heads("paged_attention_decode", query, key_cache)
    _check_soft_cap("paged_attention_decode", soft_cap)
    if split_len is not None and (split_len < 1 or split_len % 16):
        raise OpInputError("paged_attention_decode", f"split_len is {split_len}: must be a multiple of 16")
    check_scales("paged_attention_decode", key_cache, scales)
    arguments = (
        out, query, key_cache, value_cache, block_tables, context_lens,
        max_context_len, scale, sliding_window, soft_cap, split_len,
    )  # fmt: skip
    if key_cache.dtype == torch.float8_e4m3fn:
        _decode_float8(*arguments, *scales)
    else:
        _decode(*arguments)


def paged_attention_prefill(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    scales: Scales = NO_SCALES,
) -> None:
    """Let each sequence's last tokens attend causally to its context, which already holds their own keys.

    Scores, softmax and sums are float32.

    Args:
        out: `[num_tokens, num_heads, head_dim]`, mutated in rows `query_start[0]:query_start[-1]`.
        query: like `out`, any strides; heads as in `paged_attention_decode`.
        key_cache: `[num_blocks, num_kv_heads, block_size, head_dim]`, contiguous.
        value_cache: like `key_cache`.
        query_start: `[num_sequences + 1]` int32 offsets into the rows of `query`; need not begin at 0.
        context_lens: `[num_sequences]` int32, each at least the sequence's number of query tokens.
        block_tables: `[num_sequences, max_blocks]` int32.
        scale: multiplies the scores before the softmax.
        sliding_window: as in `paged_attention_decode`.
        soft_cap: as in `paged_attention_decode`.
        scales: as in `paged_attention_decode`.

    Raises:
        OpInputError: heads do not fit together, `soft_cap` is not above 0, or `scales` do not fit the cache.
    """
    _check_heads("paged_attention_prefill", query, key_cache)
    _check_soft_cap("paged_attention_prefill", soft_cap)
    check_scales("paged_attention_prefill", key_cache, scales)
    arguments = (
        out, query, key_cache, value_cache, query_start, context_lens, block_tables,
        scale, sliding_window, soft_cap,
    )  # fmt: skip
    if key_cache.dtype == torch.float8_e4m3fn:
        _prefill_float8(*arguments, *scales)
    else:
        _prefill(*arguments)


def _check_heads(op: str, query: Tensor, key_cache: Tensor) -> None:
    if query.shape[1] % key_cache.shape[1] or query.shape[2] != key_cache.shape[3]:
        raise OpInputError(
            op,
            f"query is {list(query.shape)}, key_cache {list(key_cache.shape)}:"
            " head_dim must be equal and query heads a multiple of key heads",
        )


def _check_soft_cap(op: str, soft_cap: float | None) -> None:
    if soft_cap is not None and not soft_cap > 0:
        raise OpInputError(op, f"soft_cap is {soft_cap}: must be above 0")


def _fake(*_: object) -> None:
    return None


_decode = define_op(
    "paged_attention_decode(Tensor(a!) out, Tensor query, Tensor key_cache, Tensor value_cache,"
    " Tensor block_tables, Tensor context_lens, int max_context_len, float scale, int? sliding_window,"
    " float? soft_cap, int? split_len) -> ()",
    reference=reference.paged_attention_decode,
    fake=_fake,
)
_prefill = define_op(
    "paged_attention_prefill(Tensor(a!) out, Tensor query, Tensor key_cache, Tensor value_cache,"
    " Tensor query_start, Tensor context_lens, Tensor block_tables, float scale, int? sliding_window,"
    " float? soft_cap) -> ()",
    reference=reference.paged_attention_prefill,
    fake=_fake,
)
_decode_float8 = define_op(
    "paged_attention_decode_float8(Tensor(a!) out, Tensor query, Tensor key_cache, Tensor value_cache,"
    " Tensor block_tables, Tensor context_lens, int max_context_len, float scale, int? sliding_window,"
    " float? soft_cap, int? split_len, float key_scale, float value_scale) -> ()",
    reference=reference_eight_bits.paged_attention_decode_float8,
    fake=_fake,
)
_prefill_float8 = define_op(
    "paged_attention_prefill_float8(Tensor(a!) out, Tensor query, Tensor key_cache, Tensor value_cache,"
    " Tensor query_start, Tensor context_lens, Tensor block_tables, float scale, int? sliding_window,"
    " float? soft_cap, float key_scale, float value_scale) -> ()",
    reference=reference_eight_bits.paged_attention_prefill_float8,
    fake=_fake,
)
