"""Rotary position embedding of queries and keys, in place."""

from __future__ import annotations

from torch import Tensor

from cuda_ops import reference
from cuda_ops.errors import OpInputError
from cuda_ops.registry import define_op


def rotary_embedding(query: Tensor, key: Tensor, cos_sin: Tensor) -> None:
    """Rotate each head's first `rotary_dim` elements by its token's angles, element i with i + rotary_dim /
    2.

    The "half" pairing of Llama and its kin (Su et al. 2021, in GPT-NeoX's order), computed in float32 and
    rounded once. The angles come in by token, so one table serves all layers of a step.

    Args:
        query: `[num_tokens, num_heads, head_dim]`, any strides, mutated.
        key: `[num_tokens, num_kv_heads, head_dim]`, any strides, mutated.
        cos_sin: `[num_tokens, rotary_dim]` float32: cosines of the `rotary_dim / 2` angles, then their sines.

    Raises:
        OpInputError: `cos_sin` does not fit the heads.
    """
    rotary_dim = cos_sin.shape[-1]
    if cos_sin.shape[0] != query.shape[0] or rotary_dim % 2 or rotary_dim > query.shape[-1]:
        raise OpInputError(
            "rotary_embedding",
            f"cos_sin is {list(cos_sin.shape)}, query {list(query.shape)}: rows must be tokens,"
            " columns even and at most head_dim",
        )
    _rotary_embedding(query, key, cos_sin)


def _fake(query: Tensor, key: Tensor, cos_sin: Tensor) -> None:
    return None


_rotary_embedding = define_op(
    "rotary_embedding(Tensor(a!) query, Tensor(b!) key, Tensor cos_sin) -> ()",
    reference=reference.rotary_embedding,
    fake=_fake,
)
