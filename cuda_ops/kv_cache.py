"""Writing keys and values into the paged cache."""

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
    if key.shape != value.shape or key.shape[1:] != (key_cache.shape[1], key_cache.shape[3]):
        raise OpInputError(
            "write_kv",
            f"key is {list(key.shape)}, value {list(value.shape)}, key_cache {list(key_cache.shape)}:"
            " heads and head_dim must be equal",
        )
    if key.dtype != key_cache.dtype:
        raise OpInputError("write_kv", f"key is {key.dtype}, key_cache {key_cache.dtype}: must be equal")
    _write_kv(key, value, key_cache, value_cache, slot_mapping)


def _fake(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    return None


_write_kv = define_op(
    "write_kv(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping)"
    " -> ()",
    reference=reference.write_kv,
    fake=_fake,
)
