"""Attention over the paged cache: which kernels, how many blocks, how much shared memory."""

from __future__ import annotations

import math
from ctypes import c_float, c_int, c_longlong
from typing import Any, Final

import torch
from torch import Tensor

from cuda_ops import reference, reference_eight_bits
from cuda_ops.cuda.elements import ELEMENTS, OUTPUTS, is_cache_served, is_served, run_length
from cuda_ops.cuda.launcher import Launcher, LaunchShape, Variant

_HEAD_DIMS: Final = (64, 80, 96, 128, 256)
_DTYPES: Final = (torch.bfloat16, torch.float16)
# As in attention.cuh, attention_decode.cu and attention_prefill.cu.
_PADDING: Final = 8
_ROWS: Final = 16
_TILE: Final = 16
_MIN_SPLIT_TOKENS: Final = 256
_STAGES: Final = 2
_PREFILL_WARPS: Final = 4
_PREFILL_TOKENS: Final = 32
_BYTES: Final = 2
# As in attention_prefill_hopper.cu.
_HOPPER: Final = "sm_90a"
_HOPPER_HEAD_DIMS: Final = (64, 128)
_HOPPER_QUERIES: Final = 128
_HOPPER_TOKENS: Final = 64
_HOPPER_ALIGNMENT: Final = 1024
# What cp.async moves at once.
_COPY_BYTES: Final = 16
# Enough to fill a GPU where few sequences decode, and not so many that merging shows where many do.
_BLOCKS_PER_MULTIPROCESSOR: Final = 4


def has_kernels(dtype: torch.dtype, head_dim: int, block_size: int) -> bool:
    return dtype in _DTYPES and head_dim in _HEAD_DIMS and block_size % _TILE == 0


def paged_attention_decode(
    launcher: Launcher,
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
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """As the op, and a context of 0 tokens, a row that fills up a batch of fixed size, gives zeros.

    Nothing is read on the host, and the grid follows from shapes and `max_context_len` alone.
    """
    num_sequences, num_heads, head_dim = query.shape
    if num_sequences == 0:
        return
    if not _is_native(out, query, key_cache, value_cache, block_tables, context_lens):
        _decode_plainly(
            key_cache.dtype, (key_scale, value_scale),
            out, query, key_cache, value_cache, block_tables, context_lens,
            max_context_len, scale, sliding_window, soft_cap, split_len,
        )  # fmt: skip
        return
    num_kv_heads, block_size = key_cache.shape[1:3]
    group = num_heads // num_kv_heads
    parts = num_kv_heads * -(-group // _ROWS)
    if split_len is None:
        most_seen = min(max_context_len, (sliding_window or max_context_len) + 2 * _TILE)
        num_splits = _num_splits(launcher.num_multiprocessors, num_sequences * parts, most_seen)
    else:
        num_splits = -(-max_context_len // split_len)
    split_tiles = (split_len or 0) // _TILE
    is_split = num_splits > 1
    partial = (
        query.new_empty((num_sequences, num_heads, num_splits, head_dim), dtype=torch.float32)
        if is_split
        else None
    )
    scales = (
        query.new_empty((num_sequences, num_heads, num_splits), dtype=torch.float32) if is_split else None
    )
    arrivals = launcher.counters.take(num_sequences * parts, query.device) if is_split else None
    warps = 2 if head_dim > 128 else 4
    constants: dict[str, str | int] = {
        "ELEMENT": ELEMENTS[query.dtype],
        "CACHE": OUTPUTS[key_cache.dtype],
        "HEAD_DIM": head_dim,
        "GROUP": group,
        "BLOCK_SIZE": block_size,
        "WARPS": warps,
        "STAGES": _STAGES,
        "SOFT_CAP": int(soft_cap is not None),
    }
    shared = _ROWS * (head_dim + _PADDING) * _BYTES + warps * _stage_bytes(key_cache, _TILE)
    shared += warps * min(group, _ROWS) * 2 * 4
    launcher.launch(
        Variant.of("attention_decode", "decode", **constants),
        LaunchShape((parts, num_sequences, num_splits), warps * 32, shared),
        (
            out, partial, scales, arrivals, query, key_cache, value_cache, block_tables, context_lens,
            c_longlong(out.stride(0)), c_longlong(out.stride(1)),
            c_longlong(query.stride(0)), c_longlong(query.stride(1)), c_longlong(block_tables.stride(0)),
            c_int(num_kv_heads), c_int(sliding_window or 0), c_int(split_tiles),
            c_float(scale * key_scale * math.log2(math.e)), c_float(value_scale), c_float(soft_cap or 0.0),
        ),
    )  # fmt: skip


def paged_attention_prefill(
    launcher: Launcher,
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
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """As the op. Nothing is read on the host: blocks that turn out to have no queries end at once."""
    num_tokens, num_heads, head_dim = query.shape
    num_sequences = len(context_lens)
    if num_tokens == 0 or num_sequences == 0:
        return
    is_native = _is_native(out, query, key_cache, value_cache, block_tables, context_lens)
    if not is_native or query_start.dtype != torch.int32 or not _stores_pairs(out):
        _prefill_plainly(
            key_cache.dtype, (key_scale, value_scale),
            out, query, key_cache, value_cache, query_start, context_lens, block_tables,
            scale, sliding_window, soft_cap,
        )  # fmt: skip
        return
    num_kv_heads, block_size = key_cache.shape[1:3]
    constants: dict[str, str | int] = {
        "ELEMENT": ELEMENTS[query.dtype],
        "CACHE": OUTPUTS[key_cache.dtype],
        "HEAD_DIM": head_dim,
        "GROUP": num_heads // num_kv_heads,
        "BLOCK_SIZE": block_size,
        "SOFT_CAP": int(soft_cap is not None),
        "QUERY_RUN": run_length((query,), query.stride(0), query.stride(1)),
    }
    is_hopper = launcher.arch == _HOPPER and key_cache.dtype == query.dtype
    variant, queries, threads, shared = _prefill_variant(key_cache, constants, is_hopper=is_hopper)
    # Each sequence may leave one tile that is not full.
    num_tiles = num_tokens // queries + num_sequences
    launcher.launch(
        variant,
        LaunchShape((num_heads, num_tiles, 1), threads, shared),
        (
            out, query, key_cache, value_cache, query_start, context_lens, block_tables,
            c_longlong(out.stride(0)), c_longlong(out.stride(1)),
            c_longlong(query.stride(0)), c_longlong(query.stride(1)), c_longlong(block_tables.stride(0)),
            c_int(num_sequences), c_int(num_kv_heads), c_int(sliding_window or 0),
            c_float(scale * key_scale * math.log2(math.e)), c_float(value_scale), c_float(soft_cap or 0.0),
        ),
    )  # fmt: skip


def _prefill_variant(
    key_cache: Tensor, constants: dict[str, str | int], *, is_hopper: bool
) -> tuple[Variant, int, int, int]:
    """Which kernel, its queries and threads a block, and the bytes of shared memory these take."""
    head_dim = key_cache.shape[3]
    if is_hopper and head_dim in _HOPPER_HEAD_DIMS:
        rows = _HOPPER_QUERIES + _STAGES * 2 * _HOPPER_TOKENS
        shared = rows * head_dim * _BYTES + _HOPPER_ALIGNMENT
        return Variant.of("attention_prefill_hopper", "prefill", **constants), _HOPPER_QUERIES, 256, shared
    row_tiles = 1 if head_dim > 128 else 2
    queries = _PREFILL_WARPS * row_tiles * _ROWS
    shared = queries * (head_dim + _PADDING) * _BYTES + _stage_bytes(key_cache, _PREFILL_TOKENS)
    variant = Variant.of("attention_prefill", "prefill", ROW_TILES=row_tiles, **constants)
    return variant, queries, _PREFILL_WARPS * 32, shared


def _decode_plainly(cached: torch.dtype, scales: tuple[float, float], *arguments: Any) -> None:
    if cached == torch.float8_e4m3fn:
        reference_eight_bits.paged_attention_decode_float8(*(*arguments, *scales))
    else:
        reference.paged_attention_decode(*arguments)


def _prefill_plainly(cached: torch.dtype, scales: tuple[float, float], *arguments: Any) -> None:
    if cached == torch.float8_e4m3fn:
        reference_eight_bits.paged_attention_prefill_float8(*(*arguments, *scales))
    else:
        reference.paged_attention_prefill(*arguments)


def _stage_bytes(key_cache: Tensor, num_tokens: int) -> int:
    """Of tiles of keys and values on their way, and where these are float8 of the one that is attended to."""
    head_dim = key_cache.shape[3]
    widened = 2 * num_tokens * (head_dim + _PADDING) * _BYTES
    if key_cache.dtype != torch.float8_e4m3fn:
        return _STAGES * widened
    return _STAGES * 2 * num_tokens * head_dim + widened


def _stores_pairs(out: Tensor) -> bool:
    return out.data_ptr() % 4 == 0 and out.stride(0) % 2 == 0 and out.stride(1) % 2 == 0


def _is_native(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
) -> bool:
    block_size, head_dim = key_cache.shape[2:]
    return (
        has_kernels(query.dtype, head_dim, block_size)
        and is_served(out, query)
        and is_cache_served(query.dtype, key_cache, value_cache)
        and key_cache.is_contiguous()
        and value_cache.is_contiguous()
        and (key_cache.data_ptr() | value_cache.data_ptr()) % _COPY_BYTES == 0
        and block_tables.dtype == context_lens.dtype == torch.int32
        and block_tables.stride(-1) == 1
        and context_lens.is_contiguous()
    )


def _num_splits(num_multiprocessors: int, num_blocks: int, max_context_len: int) -> int:
    wanted = -(-_BLOCKS_PER_MULTIPROCESSOR * num_multiprocessors // num_blocks)
    return max(1, min(wanted, max_context_len // _MIN_SPLIT_TOKENS))
