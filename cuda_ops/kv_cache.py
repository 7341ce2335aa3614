"""Writing keys and values into the paged cache, alone or together with what comes before."""

from __future__ import annotations

from torch import Tensor

from cuda_ops import reference
from cuda_ops.errors import OpInputError
from cuda_ops.registry import define_op


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Store each token's key and value in its slot; other slots keep what they hold.

    Args:
        key: `[num_tokens, num_kv_heads, head_dim]`, any strides, the cache's dtype.
        value: like `key`.
        key_cache: `[num_blocks, num_kv_heads, block_size, head_dim]`, contiguous, mutated.
        value_cache: like `key_cache`, mutated.
        slot_mapping: `[num_tokens]` int64, `block * block_size + offset`, no slot twice and none out of
            range.

    Raises:
        OpInputError: shapes or dtypes do not fit together.
    """
    _check_stored("write_kv", key, value, key_cache)
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

    Raises:
        OpInputError: shapes or dtypes do not fit together.
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
    _rotary_write_kv(
        query,
        key,
        value,
        cos_sin,
        query_weight,
        key_weight,
        eps,
        key_cache,
        value_cache,
        slot_mapping,
    )


def _check_stored(op: str, key: Tensor, value: Tensor, key_cache: Tensor) -> None:
    if key.shape != value.shape or key.shape[1:] != (key_cache.shape[1], key_cache.shape[3]):
        raise OpInputError(
            op,
            f"key is {list(key.shape)}, value {list(value.shape)}, key_cache {list(key_cache.shape)}:"
            " heads and head_dim must be equal",
        )
    if key.dtype != key_cache.dtype:
        raise OpInputError(op, f"key is {key.dtype}, key_cache {key_cache.dtype}: must be equal")


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
