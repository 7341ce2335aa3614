"""The ops that work row by row: norms, rotary embedding, gated activation, writing into the cache.

Each takes what its namesake in `cuda_ops` has checked. What a kernel does not serve the reference does.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_longlong
from typing import Final

import torch
from torch import Tensor

from cuda_ops import reference, reference_eight_bits
from cuda_ops.cuda.elements import ELEMENTS, OUTPUTS, is_cache_served, is_served, run_length
from cuda_ops.cuda.launcher import Launcher, LaunchShape, Variant

_WARP: Final = 32
_NORM_THREADS: Final = 512
# Elements of a row that a thread of a norm keeps in registers.
_NORM_KEPT: Final = 32
_THREADS: Final = 128
# Of what a head's lanes keep in registers.
_MAX_HEAD_DIM: Final = 512


def silu_and_mul(launcher: Launcher, x: Tensor) -> Tensor:
    return _activate_and_mul(launcher, x) if is_served(x) else reference.silu_and_mul(x)


def gelu_and_mul(launcher: Launcher, x: Tensor) -> Tensor:
    return _activate_and_mul(launcher, x, is_gelu=True) if is_served(x) else reference.gelu_and_mul(x)


def rms_norm(launcher: Launcher, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not _fits_norm(x, weight):
        return reference.rms_norm(x, weight, eps)
    return _norm(launcher, x, None, weight, None, eps, is_centred=False)


def add_rms_norm(launcher: Launcher, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not _fits_norm(x, residual, weight):
        return reference.add_rms_norm(x, residual, weight, eps)
    return _norm(launcher, x, residual, weight, None, eps, is_centred=False)


def layer_norm(
    launcher: Launcher, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    if not _fits_norm(x, weight, bias):
        return reference.layer_norm(x, weight, bias, eps)
    return _norm(launcher, x, None, weight, bias, eps, is_centred=True)


def add_layer_norm(
    launcher: Launcher, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    if not _fits_norm(x, residual, weight, bias):
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    return _norm(launcher, x, residual, weight, bias, eps, is_centred=True)


def rms_norm_quantised(
    launcher: Launcher, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if not _fits_norm(x, weight):
        return reference_eight_bits.rms_norm_quantised(x, weight, eps, dtype)
    return _quantised_norm(launcher, x, None, weight, None, eps, dtype, is_centred=False)


def add_rms_norm_quantised(
    launcher: Launcher, x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if not _fits_norm(x, residual, weight):
        return reference_eight_bits.add_rms_norm_quantised(x, residual, weight, eps, dtype)
    return _quantised_norm(launcher, x, residual, weight, None, eps, dtype, is_centred=False)


def layer_norm_quantised(
    launcher: Launcher,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if not _fits_norm(x, weight, bias):
        return reference_eight_bits.layer_norm_quantised(x, weight, bias, eps, dtype)
    return _quantised_norm(launcher, x, None, weight, bias, eps, dtype, is_centred=True)


def add_layer_norm_quantised(
    launcher: Launcher,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if not _fits_norm(x, residual, weight, bias):
        return reference_eight_bits.add_layer_norm_quantised(x, residual, weight, bias, eps, dtype)
    return _quantised_norm(launcher, x, residual, weight, bias, eps, dtype, is_centred=True)


def rotary_embedding(launcher: Launcher, query: Tensor, key: Tensor, cos_sin: Tensor) -> None:
    half = cos_sin.shape[-1] // 2
    if query.numel() == 0 or half == 0:
        return
    if not is_served(query, key) or cos_sin.stride(-1) != 1 or cos_sin.dtype != torch.float32:
        reference.rotary_embedding(query, key, cos_sin)
        return
    strides = (query.stride(0), query.stride(1), key.stride(0), key.stride(1))
    variant = Variant.of(
        "rotary", "rotary_embedding",
        ELEMENT=ELEMENTS[query.dtype], COUNT=run_length((query, key), half, *strides), THREADS=_THREADS,
    )  # fmt: skip
    launcher.launch(
        variant,
        LaunchShape((len(query), 1, 1), _THREADS),
        (
            query, key, cos_sin, *map(c_longlong, strides), c_longlong(cos_sin.stride(0)),
            c_int(query.shape[1]), c_int(key.shape[1]), c_int(half),
        ),
    )  # fmt: skip


def write_kv(
    launcher: Launcher,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """As the op, and rows with a negative slot, which fill up a batch of fixed size, are not stored."""
    if key.numel() == 0:
        return
    if not _fits_cache(slot_mapping, key_cache, value_cache, key, value):
        if key_cache.dtype == torch.float8_e4m3fn:
            reference_eight_bits.write_kv_float8(
                key, value, key_cache, value_cache, slot_mapping, key_scale, value_scale
            )
        else:
            reference.write_kv(key, value, key_cache, value_cache, slot_mapping)
        return
    num_kv_heads, block_size, head_dim = key_cache.shape[1:]
    strides = (key.stride(0), key.stride(1), value.stride(0), value.stride(1))
    count = run_length((key, value, key_cache, value_cache), head_dim, *strides)
    variant = Variant.of(
        "kv_cache", "write_kv",
        ELEMENT=ELEMENTS[key.dtype], CACHE=OUTPUTS[key_cache.dtype], COUNT=count, THREADS=_THREADS,
    )  # fmt: skip
    launcher.launch(
        variant,
        LaunchShape((len(key), 1, 1), _THREADS),
        (
            key, value, key_cache, value_cache, slot_mapping, *map(c_longlong, strides),
            c_int(num_kv_heads), c_int(block_size), c_int(head_dim),
            c_float(key_scale), c_float(value_scale),
        ),
    )  # fmt: skip


def rotary_write_kv(
    launcher: Launcher,
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
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """As the op, and keys and values of rows with a negative slot are not stored."""
    if query.numel() == 0:
        return
    weights = tuple(weight for weight in (query_weight, key_weight) if weight is not None)
    caches = (key_cache, value_cache)
    heads = (query, key, value, *weights)
    if not _fits_cache(slot_mapping, *caches, *heads) or not _fits_rotation(cos_sin, query):
        arguments = (query, key, value, cos_sin, query_weight, key_weight, eps, *caches, slot_mapping)
        if key_cache.dtype == torch.float8_e4m3fn:
            reference_eight_bits.rotary_write_kv_float8(*arguments, key_scale, value_scale)
        else:
            reference.rotary_write_kv(*arguments)
        return
    num_kv_heads, block_size, head_dim = key_cache.shape[1:]
    half, num_heads = cos_sin.shape[1] // 2, query.shape[1] + 2 * num_kv_heads
    strides = (*query.stride()[:2], *key.stride()[:2], *value.stride()[:2])
    count = run_length((query, key, value, *caches, *weights), half, head_dim, *strides)
    lanes = _lanes_of_head(max(half, head_dim - 2 * half) // count)
    variant = Variant.of(
        "rotary_write", "rotary_write_kv",
        ELEMENT=ELEMENTS[query.dtype], CACHE=OUTPUTS[key_cache.dtype],
        COUNT=count, THREADS=_THREADS, LANES=lanes,
        HEAD_DIM=head_dim, HALF=half, NORMS=int(bool(weights)),
        ANGLE_COUNT=min(count, run_length((cos_sin,), half, cos_sin.stride(0))),
    )  # fmt: skip
    launcher.launch(
        variant,
        LaunchShape((len(query), -(-num_heads // (_THREADS // lanes)), 1), _THREADS),
        (
            query, key, value, cos_sin, query_weight, key_weight, key_cache, value_cache, slot_mapping,
            *map(c_longlong, strides), c_longlong(cos_sin.stride(0)), c_int(query.shape[1]),
            c_int(num_kv_heads), c_int(block_size), c_float(eps), c_float(key_scale), c_float(value_scale),
        ),
    )  # fmt: skip


def _fits_cache(slot_mapping: Tensor, key_cache: Tensor, value_cache: Tensor, *heads: Tensor) -> bool:
    return (
        is_served(*heads)
        and is_cache_served(heads[0].dtype, key_cache, value_cache)
        and slot_mapping.dtype == torch.int64
        and slot_mapping.is_contiguous()
    )


def _fits_rotation(cos_sin: Tensor, query: Tensor) -> bool:
    return query.shape[-1] <= _MAX_HEAD_DIM and cos_sin.dtype == torch.float32 and cos_sin.stride(-1) == 1


def _lanes_of_head(runs: int) -> int:
    """A power of two, of one warp."""
    return min(_WARP, 1 << max(0, runs - 1).bit_length())


def _activate_and_mul(launcher: Launcher, x: Tensor, *, is_gelu: bool = False) -> Tensor:
    size = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], size))
    if out.numel() == 0:
        return out
    rows = x.reshape(-1, 2 * size)
    count = run_length((rows,), size, rows.stride(0))
    variant = Variant.of(
        "activation", "activate_and_mul",
        ELEMENT=ELEMENTS[x.dtype], COUNT=count, THREADS=_THREADS, IS_GELU=int(is_gelu),
    )  # fmt: skip
    launcher.launch(
        variant,
        LaunchShape((len(rows), -(-size // (_THREADS * count)), 1), _THREADS),
        (out, rows, c_longlong(rows.stride(0)), c_int(size)),
    )
    return out


def _fits_norm(x: Tensor, *others: Tensor | None) -> bool:
    # A residual is written in place: a copy of it, made for its strides, would not do.
    return 0 < x.shape[-1] <= _NORM_THREADS * _NORM_KEPT and is_served(x, *others)


def _norm(
    launcher: Launcher,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    is_centred: bool,
) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_norm(launcher, out, None, x, residual, weight, bias, eps, is_centred=is_centred)
    return out


def _quantised_norm(
    launcher: Launcher,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    *,
    is_centred: bool,
) -> tuple[Tensor, Tensor]:
    out, scales = x.new_empty(x.shape, dtype=dtype), x.new_empty((len(x), 1), dtype=torch.float32)
    _launch_norm(launcher, out, scales, x, residual, weight, bias, eps, is_centred=is_centred)
    return out, scales


def _launch_norm(
    launcher: Launcher,
    out: Tensor,
    scales: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    is_centred: bool,
) -> None:
    if out.numel() == 0:
        return
    # Heads of a projection are rows of rows: what cannot be told by two strides is copied.
    rows = x if x.dim() in (2, 3) else x.reshape(-1, x.shape[-1])
    size, per_outer = rows.shape[-1], rows.shape[1] if rows.dim() == 3 else 1
    residual_stride = residual.stride(0) if residual is not None else 0
    read = tuple(tensor for tensor in (rows, residual, weight, bias) if tensor is not None)
    count = run_length(read, size, rows.stride(0), rows.stride(-2), residual_stride)
    runs = -(-size // count)
    threads = min(_NORM_THREADS, -(-runs // _WARP) * _WARP)
    variant = Variant.of(
        "norm", "normalise",
        ELEMENT=ELEMENTS[x.dtype], OUTPUT=OUTPUTS[out.dtype],
        COUNT=count, THREADS=threads, RUNS=-(-runs // threads),
        ADDS_RESIDUAL=int(residual is not None), CENTRES=int(is_centred),
    )  # fmt: skip
    launcher.launch(
        variant,
        LaunchShape((out.numel() // size, 1, 1), threads),
        (
            out, scales, rows, residual, weight, bias, c_longlong(rows.stride(0)),
            c_longlong(rows.stride(-2)), c_longlong(residual_stride), c_int(per_outer), c_int(size),
            c_float(eps),
        ),
    )  # fmt: skip
