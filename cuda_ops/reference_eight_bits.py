"""What ops in eight bits mean, in plain torch: norms that quantise, and a cache in float8.

As `reference.py`, on which they stand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_ops.reference import (
    GATHERED_ELEMENTS,
    layer_norm,
    normed_and_rotated,
    paged_attention_decode,
    paged_attention_prefill,
    rms_norm,
    write_kv,
)


def rms_norm_quantised(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _quantised(rms_norm(x.float(), weight, eps), dtype)


def add_rms_norm_quantised(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    residual += x
    return rms_norm_quantised(residual, weight, eps, dtype)


def layer_norm_quantised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    wide_weight, wide_bias = (None if part is None else part.float() for part in (weight, bias))
    return _quantised(layer_norm(x.float(), wide_weight, wide_bias, eps), dtype)


def add_layer_norm_quantised(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    residual += x
    return layer_norm_quantised(residual, weight, bias, eps, dtype)


def _quantised(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each row's largest becomes the dtype's largest; `[num_rows, 1]` says how much one stands for."""
    end = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    largest = rows.abs().amax(dim=1, keepdim=True)
    scaled = (rows * (end / largest).masked_fill(largest == 0, 0.0)).clamp(-end, end)
    if dtype == torch.int8:
        scaled = scaled.nan_to_num(0.0).round()
    return scaled.to(dtype), largest / end


def write_kv_float8(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scale: float,
    value_scale: float,
) -> None:
    keys, values = _to_float8(key, key_scale), _to_float8(value, value_scale)
    # Bytes, for torch moves no float8 by index.
    write_kv(keys, values, key_cache.view(torch.uint8), value_cache.view(torch.uint8), slot_mapping)


def _to_float8(x: Tensor, scale: float) -> Tensor:
    """Bytes of e4m3 numbers, each of which stands for itself times `scale`."""
    end = torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).clamp(-end, end).to(torch.float8_e4m3fn).view(torch.uint8)


def paged_attention_decode_float8(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    max_context_len: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    split_len: int | None,
    key_scale: float,
    value_scale: float,
) -> None:
    num_kv_heads, block_size, head_dim = key_cache.shape[1:]
    num_blocks = -(-max_context_len // block_size)
    chunk = max(1, GATHERED_ELEMENTS // (num_kv_heads * num_blocks * block_size * head_dim))
    for start in range(0, len(query), chunk):
        part = slice(start, start + chunk)
        tables = block_tables[part, :num_blocks]
        attended = torch.empty_like(query[part], dtype=torch.float32)
        paged_attention_decode(
            attended,
            query[part].float(),
            _widened(key_cache, tables, key_scale),
            _widened(value_cache, tables, value_scale),
            _own_table(tables),
            context_lens[part],
            max_context_len,
            scale,
            sliding_window,
            soft_cap,
            split_len,
        )
        out[part] = attended


def paged_attention_prefill_float8(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    key_scale: float,
    value_scale: float,
) -> None:
    # As for other caches, two device syncs on CUDA.
    starts = query_start.tolist()
    for index, context_len in enumerate(context_lens.tolist()):
        part = slice(starts[index], starts[index + 1])
        tables = block_tables[index : index + 1, : -(-context_len // key_cache.shape[2])]
        attended = torch.empty_like(query[part], dtype=torch.float32)
        paged_attention_prefill(
            attended,
            query[part].float(),
            _widened(key_cache, tables, key_scale),
            _widened(value_cache, tables, value_scale),
            query_start[index : index + 2] - starts[index],
            context_lens[index : index + 1],
            _own_table(tables),
            scale,
            sliding_window,
            soft_cap,
        )
        out[part] = attended


def _widened(cache: Tensor, tables: Tensor, scale: float) -> Tensor:
    """The blocks that are named, one after the other, in float32."""
    return cache.view(torch.uint8)[tables.flatten().long()].view(cache.dtype).float() * scale


def _own_table(tables: Tensor) -> Tensor:
    """As `tables`, of what `_widened` gives."""
    return torch.arange(tables.numel(), dtype=tables.dtype, device=tables.device).view_as(tables)


def rotary_write_kv_float8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scale: float,
    value_scale: float,
) -> None:
    turned = normed_and_rotated(key, key_weight, eps, cos_sin)
    query.copy_(normed_and_rotated(query, query_weight, eps, cos_sin))
    write_kv_float8(turned, value, key_cache, value_cache, slot_mapping, key_scale, value_scale)
