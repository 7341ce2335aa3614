"""Writing keys and values into the paged cache, alone or together with what comes before.

A cache of float8 has ops of its own under the same functions: a device that has no kernel for it, as the CPU,
runs their meaning.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from cuda_ops import reference, reference_eight_bits
from cuda_ops.errors import OpInputError
from cuda_ops.registry import define_op

Scales = tuple[float, float]
"""What one of a float8 cache's keys stands for, and one of its values."""

NO_SCALES: Final[Scales] = (1.0, 1.0)


def write_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    scales: Scales = NO_SCALES,
) -> None:
    """Store each token's key and value in its slot; other slots keep what they hold.

    A cache of float8 (e4m3) gets them divided by its scales, rounded to the nearest, of two to the even one,
    and at most 448 in size.

    Args:
        key: `[num_tokens, num_kv_heads, head_dim]`, any strides, the cache's dtype unless that is float8.
        value: like `key`.
        key_cache: `[num_blocks, num_kv_heads, block_size, head_dim]`, contiguous, mutated.
        value_cache: like `key_cache`, mutated.
        slot_mapping: `[num_tokens]` int64, `block * block_size + offset`, no slot twice and none out of
            range.
        scales: of a float8 cache; 1 for any other.

    Raises:
        OpInputError: shapes, dtypes or scales do not fit together.
    """
    _check_stored("write_kv", key, value, key_cache)
    check_scales("write_kv", key_cache, scales)
    if key_cache.dtype == torch.float8_e4m3fn:
        _write_kv_float8(key, value, key_cache, value_cache, slot_mapping, *scales)
    else:
        _write_kv(key, value, key_cache, value_cache, slot_mapping)


def rotary_write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    eps: float = 0.0,
    scales: Scales = NO_SCALES,
) -> None:
    """Normalise and rotate queries in place, and store keys, treated alike, and values as `write_kv` does.

    What `rms_norm` of each head, `rotary_embedding` and `write_kv` do one after the other, in one pass:
    float32 from the norm through the rotation, rounded once. Keys are left as they are.

    Args:
        query: `[num_tokens, num_heads, head_dim]`, any strides, mutated.
        key: `[num_tokens, num_kv_heads, head_dim]`, any strides.
        value: like `key`.
        cos_sin: `[num_tokens, rotary_dim]` float32, as for `rotary_embedding`.
        key_cache: `[num_blocks, num_kv_heads, block_size, head_dim]`, contiguous, mutated.
        value_cache: like `key_cache`, mutated.
        slot_mapping: `[num_tokens]` int64, as for `write_kv`.
        query_weight: `[head_dim]` of an RMSNorm of each query head; None is no norm.
        key_weight: like `query_weight`, of each key head.
        eps: of the norms.
        scales: as for `write_kv`.

    Raises:
        OpInputError: shapes, dtypes or scales do not fit together.
    """
    op = "rotary_write_kv"
    _check_stored(op, key, value, key_cache)
    if query.shape[::2] != key.shape[::2] or query.dtype != key.dtype:
        raise OpInputError(
            op,
            f"query is {list(query.shape)} {query.dtype}, key {list(key.shape)} {key.dtype}:"
            " tokens, head_dim and dtype must be equal",
        )
    rotary_dim = cos_sin.shape[-1]
    if cos_sin.shape[0] != key.shape[0] or rotary_dim % 2 or rotary_dim > key.shape[-1]:
        raise OpInputError(
            op,
            f"cos_sin is {list(cos_sin.shape)}, key {list(key.shape)}: rows must be tokens,"
            " columns even and at most head_dim",
        )
    check_scales(op, key_cache, scales)
    norms = (query_weight, key_weight, eps)
    if key_cache.dtype == torch.float8_e4m3fn:
        _rotary_write_kv_float8(
            query, key, value, cos_sin, *norms, key_cache, value_cache, slot_mapping, *scales
        )
    else:
        _rotary_write_kv(query, key, value, cos_sin, *norms, key_cache, value_cache, slot_mapping)


def check_scales(op: str, key_cache: Tensor, scales: Scales) -> None:
    if not all(0 < scale < math.inf for scale in scales):
        raise OpInputError(op, f"scales is {scales}: must be above 0 and finite")
    if scales != NO_SCALES and key_cache.dtype != torch.float8_e4m3fn:
        raise OpInputError(op, f"scales is {scales}, key_cache {key_cache.dtype}: only float8_e4m3fn has any")


def _check_stored(op: str, key: Tensor, value: Tensor, key_cache: Tensor) -> None:
    if key.shape != value.shape or key.shape[1:] != (key_cache.shape[1], key_cache.shape[3]):
        raise OpInputError(
            op,
            f"key is {list(key.shape)}, value {list(value.shape)}, key_cache {list(key_cache.shape)}:"
            " heads and head_dim must be equal",
        )
    if key_cache.dtype not in (key.dtype, torch.float8_e4m3fn):
        raise OpInputError(op, f"key is {key.dtype}, key_cache {key_cache.dtype}: must be equal, or float8")


def _fake(*_: object) -> None:
    return None


_write_kv = define_op(
    "write_kv(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping)"
    " -> ()",
    reference=reference.write_kv,
    fake=_fake,
)
_rotary_write_kv = define_op(
    "rotary_write_kv(Tensor(a!) query, Tensor key, Tensor value, Tensor cos_sin, Tensor? query_weight,"
    " Tensor? key_weight, float eps, Tensor(b!) key_cache, Tensor(c!) value_cache, Tensor slot_mapping)"
    " -> ()",
    reference=reference.rotary_write_kv,
    fake=_fake,
)
_write_kv_float8 = define_op(
    "write_kv_float8(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache,"
    " Tensor slot_mapping, float key_scale, float value_scale) -> ()",
    reference=reference_eight_bits.write_kv_float8,
    fake=_fake,
)
_rotary_write_kv_float8 = define_op(
    "rotary_write_kv_float8(Tensor(a!) query, Tensor key, Tensor value, Tensor cos_sin, Tensor? query_weight,"
    " Tensor? key_weight, float eps, Tensor(b!) key_cache, Tensor(c!) value_cache, Tensor slot_mapping,"
    " float key_scale, float value_scale) -> ()",
    reference=reference_eight_bits.rotary_write_kv_float8,
    fake=_fake,
)
