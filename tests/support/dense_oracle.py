"""Attention written out sequence by sequence in float64, independent of how the ops compute it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Unit roundoffs: half the distance from 1 to the next number.
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True, slots=True)
class PagedCase:
    """Sequences in shuffled pages; slots that belong to none hold large finite numbers."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    query_lens: tuple[int, ...]
    scales: tuple[float, float] = (1.0, 1.0)

    @property
    def scale(self) -> float:
        return float(self.query.shape[2]) ** -0.5

    @property
    def max_context_len(self) -> int:
        return int(self.context_lens.max())

    @property
    def is_decode(self) -> bool:
        return all(length == 1 for length in self.query_lens)


def make_case(
    context_lens: list[int],
    query_lens: list[int],
    *,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    seed: int,
) -> PagedCase:
    generator = torch.Generator().manual_seed(seed)
    num_blocks_of = [-(-length // block_size) for length in context_lens]
    num_blocks = sum(num_blocks_of) + 2
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    order = torch.randperm(num_blocks, generator=generator)[: sum(num_blocks_of)].to(torch.int32)
    tables = torch.nn.utils.rnn.pad_sequence(list(order.split(num_blocks_of)), batch_first=True)
    # A slot that is nobody's, or no longer, may hold whatever a request that overflowed has left.
    key_cache, value_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    for table, length in zip(order.split(num_blocks_of), context_lens, strict=True):
        for place in range(length):
            block, offset = int(table[place // block_size]), place % block_size
            for cache in (key_cache, value_cache):
                cache[block, :, offset] = torch.randn(num_kv_heads, head_dim, generator=generator)
    # Queries as models pass them: a strided view into a wider projection.
    width = num_kv_heads * group * head_dim
    projected = torch.randn(sum(query_lens), width + 8, generator=generator).to(dtype)
    query = projected[:, 8:].view(-1, num_kv_heads * group, head_dim)
    return PagedCase(
        query,
        key_cache.to(dtype),
        value_cache.to(dtype),
        torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
        torch.tensor(context_lens, dtype=torch.int32),
        tables,
        tuple(query_lens),
    )


def in_float8(case: PagedCase, scales: tuple[float, float]) -> PagedCase:
    """The same case with its cache rounded to float8 numbers that stand for `scales` each; NaN stays NaN."""
    caches = [
        (cache.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        for cache, scale in zip((case.key_cache, case.value_cache), scales, strict=True)
    ]
    return replace(case, key_cache=caches[0], value_cache=caches[1], scales=scales)


def attend_densely(case: PagedCase, sliding_window: int | None, soft_cap: float | None = None) -> Tensor:
    """Return what attention means, `[num_tokens, num_heads, head_dim]` float64."""
    block_size = case.key_cache.shape[2]
    group = case.query.shape[1] // case.key_cache.shape[1]
    rows = []
    for index, query_len in enumerate(case.query_lens):
        context = int(case.context_lens[index])
        places = [(int(case.block_tables[index, p // block_size]), p % block_size) for p in range(context)]
        keys, values = (
            torch.stack([cache[block, :, offset].double() for block, offset in places]) * scale
            for cache, scale in zip((case.key_cache, case.value_cache), case.scales, strict=True)
        )
        start = int(case.query_start[index])
        for step in range(query_len):
            position = context - query_len + step
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            visible = slice(first, position + 1)
            rows.append(
                _attend(
                    case.query[start + step].double(),
                    keys[visible],
                    values[visible],
                    group,
                    case.scale,
                    soft_cap,
                )
            )
    return torch.stack(rows)


def attention_tolerance(case: PagedCase) -> float:
    """Bound the error: weights and result rounded once each to the dtype, everything else summed in float32.

    Scores carry the float32 error of a sum over head_dim, which shifts a weight by as much relatively; the
    sum over the context adds one more term a token. The weights sum to 1, so errors scale with the largest
    value.
    """
    wide = ROUNDOFF[torch.float32]
    longest = case.max_context_len
    values = case.value_cache.float().abs() * case.scales[1]
    visible = values[values < 100].max()
    score = float(case.query.float().norm(dim=-1).max()) * 6.0
    relative = 2 * ROUNDOFF[case.query.dtype] + wide * (longest + 2 * case.query.shape[2] * score)
    return float(visible) * relative


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, group: int, scale: float, soft_cap: float | None
) -> Tensor:
    heads = []
    for head in range(query.shape[0]):
        scores = keys[:, head // group] @ query[head] * scale
        if soft_cap is not None:
            scores = torch.tanh(scores / soft_cap) * soft_cap
        heads.append(torch.softmax(scores, dim=0) @ values[:, head // group])
    return torch.stack(heads)
