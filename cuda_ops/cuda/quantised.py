"""Products with weights of 4 and 8 bits: how the inputs are divided, and when the weight is widened first."""

from __future__ import annotations

from ctypes import c_int, c_longlong
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_ops import quantised
from cuda_ops.cuda.elements import ELEMENTS
from cuda_ops.cuda.launcher import Launcher, LaunchShape, Variant
from cuda_ops.quantised import CHUNK, TILE

MOST_ROWS: Final = 256
"""Up to here a batch reads the codes, for each 64 rows once more; above, the weight is widened for cuBLAS.

That is 0.5 bytes a weight for every 64 rows against 4.5 for all. Where the two meet is for a GPU to say
(benchmarks/bench_kernels.py).
"""

_DTYPES: Final = (torch.bfloat16, torch.float16)
# As in quantised_linear.cu and dequantise.cu.
_THREADS: Final = 256
_BLOCK_OUTPUTS: Final = 256
_ROW_TILE: Final = 8
_ROW_TILES: Final = (1, 2, 4, 8)
_DEQUANTISE_WARPS: Final = 4
_ROW_LENGTH: Final = CHUNK + 8
# Eight bits' are one fewer: 99 KB is all that a block may have on sm_89 and sm_120.
_STAGES: Final = {4: 4, 8: 3}
_RUN: Final = 8
# A part of fewer chunks ends before its loads are under way.
_FEWEST_CHUNKS: Final = 4


def quantised_linear(
    launcher: Launcher,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    num_outputs: int,
) -> Tensor:
    """As the op. The weight's shape decides how inputs are divided: a row has the same bits in any batch."""
    if not serves(x, codes, scales, zeros, bias, bits, group_size):
        return quantised.reference(x, codes, scales, zeros, order, bias, bits, group_size, num_outputs)
    out = x.new_empty((len(x), num_outputs))
    if out.numel() == 0:
        return out
    ordered = _aligned(x if order is None else x.index_select(1, order))
    if len(x) > MOST_ROWS:
        weight = _dequantise(launcher, ordered, codes, scales, zeros, bits, group_size, num_outputs)
        return F.linear(ordered, weight, bias)
    _multiply(launcher, out, ordered, codes, scales, zeros, bias, bits, group_size)
    return out


def serves(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> bool:
    """Whether a kernel takes this, any strides of x and any number of rows."""
    return (
        x.dtype in _DTYPES
        and x.shape[1] % _RUN == 0
        and x.shape[1] > 0
        and bits in _STAGES
        and (group_size == CHUNK // 2 or group_size % CHUNK == 0)
        and scales.dtype in ELEMENTS
        and all(part.is_contiguous() for part in (codes, scales, zeros) if part is not None)
        and all(part.data_ptr() % 16 == 0 for part in (codes, scales, zeros) if part is not None)
        and (bias is None or (bias.dtype == x.dtype and bias.is_contiguous()))
    )


def _aligned(x: Tensor) -> Tensor:
    is_aligned = x.stride(1) == 1 and x.stride(0) % _RUN == 0 and x.data_ptr() % 16 == 0
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)


def _multiply(
    launcher: Launcher,
    out: Tensor,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> None:
    num_rows, num_outputs = out.shape
    num_blocks = -(-num_outputs // _BLOCK_OUTPUTS)
    num_parts, chunks_of_part = _parts(launcher.num_multiprocessors, num_blocks, len(codes))
    parts = out.new_empty((num_parts, *out.shape), dtype=torch.float32) if num_parts > 1 else None
    row_tiles = next((n for n in _ROW_TILES if n * _ROW_TILE >= num_rows), _ROW_TILES[-1])
    constants = _constants(x, scales, zeros, bits, group_size)
    constants |= {"ROW_TILES": row_tiles, "STAGES": _STAGES[bits]}
    launcher.launch(
        Variant.of("quantised_linear", "multiply", **constants),
        LaunchShape(
            (num_blocks, num_parts, -(-num_rows // (row_tiles * _ROW_TILE))),
            _THREADS,
            _STAGES[bits] * _stage_bytes(bits, group_size, row_tiles, scales, zeros),
        ),
        (
            out, parts, x, codes, scales, zeros, bias, c_longlong(x.stride(0)), c_int(num_rows),
            c_int(x.shape[1]), c_int(num_outputs), c_int(len(scales)), c_int(chunks_of_part),
        ),
    )  # fmt: skip
    if parts is not None:
        # The sums know neither bits nor groups: one variant serves all.
        constants |= {"ROW_TILES": 1, "BITS": 4, "GROUP": 0, "HAS_ZEROS": 0, "STAGES": 2, "SCALE": "Float32"}
        launcher.launch(
            Variant.of("quantised_linear", "add_parts", **constants),
            LaunchShape((-(-out.numel() // _THREADS), 1, 1), _THREADS),
            (out, parts, bias, c_int(num_rows), c_int(num_outputs), c_int(num_parts)),
        )


def _dequantise(
    launcher: Launcher,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    num_outputs: int,
) -> Tensor:
    weight = x.new_empty((num_outputs, x.shape[1]))
    num_chunks, num_tiles = codes.shape[:2]
    launcher.launch(
        Variant.of("dequantise", "dequantise", **_constants(x, scales, zeros, bits, group_size)),
        LaunchShape(
            (-(-num_tiles // _DEQUANTISE_WARPS), num_chunks, 1),
            _DEQUANTISE_WARPS * 32,
            _DEQUANTISE_WARPS * TILE * _ROW_LENGTH * x.element_size(),
        ),
        (weight, codes, scales, zeros, c_int(x.shape[1]), c_int(num_outputs)),
    )
    return weight


def _constants(
    x: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int
) -> dict[str, str | int]:
    return {
        "ELEMENT": ELEMENTS[x.dtype],
        "SCALE": ELEMENTS[scales.dtype],
        "BITS": bits,
        "GROUP": group_size,
        "HAS_ZEROS": int(zeros is not None),
    }


def _parts(num_multiprocessors: int, num_blocks: int, num_chunks: int) -> tuple[int, int]:
    """In how many parts the inputs are, of how many chunks each: as one wave of blocks has room for."""
    wanted = max(1, min(num_multiprocessors // num_blocks, num_chunks // _FEWEST_CHUNKS))
    chunks_of_part = -(-num_chunks // wanted)
    return -(-num_chunks // chunks_of_part), chunks_of_part


def _stage_bytes(bits: int, group_size: int, row_tiles: int, scales: Tensor, zeros: Tensor | None) -> int:
    """Size of the kernel's `Stage`."""
    groups = CHUNK // group_size if 0 < group_size < CHUNK else 1
    codes = _BLOCK_OUTPUTS * CHUNK * bits // 8
    rows = row_tiles * _ROW_TILE * _ROW_LENGTH * 2
    by_group = groups * _BLOCK_OUTPUTS
    return codes + rows + by_group * scales.element_size() + (by_group if zeros is not None else 16)
