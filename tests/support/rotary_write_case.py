"""A step's heads and a cache, and what `rotary_write_kv` makes of them, in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import cuda_ops

EPS = 1e-5
NUM_HEADS, NUM_KV_HEADS = 4, 2


@dataclass(frozen=True, slots=True)
class RotaryWriteCase:
    """Slices of one projection, as models have them; `weights` of queries and keys, or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    cos_sin: Tensor
    weights: tuple[Tensor | None, Tensor | None]
    key_cache: Tensor
    value_cache: Tensor
    slots: Tensor
    scales: tuple[float, float] = (1.0, 1.0)

    def in_float8(self, scales: tuple[float, float]) -> RotaryWriteCase:
        """The same case with a cache of float8 numbers that stand for `scales` each."""
        caches = [cache.to(torch.float8_e4m3fn) for cache in (self.key_cache, self.value_cache)]
        return replace(self, key_cache=caches[0], value_cache=caches[1], scales=scales)

    def run(self) -> None:
        cuda_ops.rotary_write_kv(
            self.query, self.key, self.value, self.cos_sin, self.key_cache, self.value_cache, self.slots,
            query_weight=self.weights[0], key_weight=self.weights[1], eps=EPS, scales=self.scales,
        )  # fmt: skip

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and what both caches stand for afterwards, in float64; negative slots are not stored."""
        caches = self.key_cache.double() * self.scales[0], self.value_cache.double() * self.scales[1]
        keys = turned(self.key, self.weights[1], self.cos_sin)
        block_size = self.key_cache.shape[2]
        for token, slot in enumerate(self.slots.tolist()):
            if slot >= 0:
                caches[0][slot // block_size, :, slot % block_size] = keys[token]
                caches[1][slot // block_size, :, slot % block_size] = self.value[token].double()
        return turned(self.query, self.weights[0], self.cos_sin), *caches


def make_case(
    head_dim: int, rotary_dim: int, dtype: torch.dtype, *, has_norms: bool, block_size: int = 3, gap: int = 8
) -> RotaryWriteCase:
    """Five tokens; each head's elements lie `gap` further apart than it has elements."""
    torch.manual_seed(head_dim + rotary_dim)
    whole = torch.randn(5, NUM_HEADS + 2 * NUM_KV_HEADS, head_dim + gap).to(dtype)[..., :head_dim]
    query, key, value = whole.split((NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS), dim=1)
    angles = torch.randn(5, rotary_dim // 2) * 50
    weights = (torch.randn(2, head_dim) + 1).to(dtype).unbind() if has_norms else (None, None)
    caches = torch.randn(2, 7, NUM_KV_HEADS, block_size, head_dim).to(dtype).unbind()
    slots = torch.randperm(7 * block_size)[:5]
    return RotaryWriteCase(
        query, key, value, torch.cat((angles.cos(), angles.sin()), -1), weights, *caches, slots
    )


def turned(heads: Tensor, weight: Tensor | None, cos_sin: Tensor) -> Tensor:
    """Normalised, then each pair turned as a complex number."""
    exact = heads.double()
    if weight is not None:
        exact = exact / torch.sqrt(exact.square().mean(-1, keepdim=True) + EPS) * weight.double()
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin.double().unsqueeze(1).chunk(2, dim=-1)
    pairs = torch.complex(exact[..., :half], exact[..., half : 2 * half]) * torch.complex(cos, sin)
    return torch.cat((pairs.real, pairs.imag, exact[..., 2 * half :]), dim=-1)


def bound_of(exact: Tensor, roundoff: float) -> float:
    """One rounding, and float32 sums before it: of a head's squares, and of two products."""
    return float(exact.abs().max()) * (roundoff * (1 + 2**-7) + (exact.shape[-1] + 16) * 2.0**-24)
