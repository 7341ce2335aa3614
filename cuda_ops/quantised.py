"""Dense layers whose weights are whole numbers of 4 or 8 bits, each output or group of inputs on a scale.

What a code q of output n and input k stands for is `(q - zero[g, n]) * scale[g, n]`, g being the group of k.
Activations stay in 16 bits (w4a16, w8a16).

Codes are laid out once, at load, as a warp of a GPU takes them. Chunks of 64 inputs, in each the tiles of 16
outputs, in each 32 lanes' words: what lane l holds of the first factor of `mma.m16n8k16`, step by step of 16
inputs. With g = l / 4, t = l % 4 that is outputs g and g + 8 at inputs 2t, 2t + 1, 2t + 8, 2t + 9:

    4 bits   a word a step     nibbles    (g, 2t) (g+8, 2t) (g, 2t+8) (g+8, 2t+8), then the same at 2t + 1
    8 bits   two words a step  bytes      (g, 2t) (g+8, 2t) (g, 2t+1) (g+8, 2t+1); the second word at 2t + 8

so that two neighbours of one output lie 16 bits apart, and one mask takes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_ops.errors import OpInputError
from cuda_ops.registry import define_op

CHUNK: Final = 64
"""Inputs that are loaded together."""

TILE: Final = 16
"""Outputs of a product of tensor cores."""

BITS: Final = (4, 8)
_LANES: Final = 32
_WORDS: Final = 4
_LARGEST_INT8: Final = 127
_INT8_ZERO: Final = 128
_ROWS_AT_ONCE: Final = 2048
"""Of a weight that is rounded or laid out: wider copies of a whole one would be what loading holds most."""

# Axes of codes viewed as (tile, row / 8, g, chunk, step / 2, step % 2, column / 8, t, column % 2), in the
# order (chunk, tile, [step / 2,] lane, word, place in the word).
_AXES: Final = {4: (3, 0, 2, 7, 4, 5, 8, 6, 1), 8: (3, 0, 4, 2, 7, 5, 6, 8, 1)}


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A `[num_outputs, num_inputs]` weight.

    Attributes:
        codes: `[num_chunks, num_tiles, bits / 4, 32, 4]` int32; zeros fill up the last chunk and tile.
        scales: `[num_groups, 16 * num_tiles]`, any floating point type.
        zeros: like `scales`, uint8; None where every zero is half of the codes' range, 8 or 128.
        order: `[num_inputs]` int64: which input of x comes where in the codes; None as they are.
        bits: of a code, 4 or 8.
        group_size: inputs that share a scale, neighbours in the order of the codes; 0 is all.
        num_outputs: rows of the weight.
        num_inputs: its columns.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    bits: int
    group_size: int
    num_outputs: int
    num_inputs: int

    @property
    def nbytes(self) -> int:
        parts = (self.codes, self.scales, self.zeros, self.order)
        return sum(part.nbytes for part in parts if part is not None)


def lay_out_codes(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int,
    group_size: int = 0,
    order: Tensor | None = None,
) -> QuantisedWeight:
    """Make a weight of codes, on their device.

    Args:
        codes: `[num_outputs, num_inputs]` uint8, below `2 ** bits`.
        scales: `[num_groups, num_outputs]`.
        zeros: like `scales`, uint8; None is half of the codes' range.
        bits: 4 or 8.
        group_size: inputs of a group, the last of which may have fewer; 0 is all of them.
        order: which input of x each column of `codes` belongs to.

    Raises:
        OpInputError: shapes do not fit together, or there is no such number of bits.
    """
    num_outputs, num_inputs = codes.shape
    _check(codes, scales, zeros, bits, group_size)
    padding = -num_outputs % TILE
    return QuantisedWeight(
        _to_words(codes, bits),
        F.pad(scales, (0, padding)).contiguous(),
        None if zeros is None else F.pad(zeros, (0, padding)).contiguous(),
        order,
        bits,
        group_size,
        num_outputs,
        num_inputs,
    )


def quantise_to_int8(weight: Tensor) -> QuantisedWeight:
    """Round each row of a weight to 8 bits, in steps of 1/127 of its largest magnitude."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.zeros(1, len(weight), device=weight.device)
    for first in range(0, len(weight) if weight.shape[1] else 0, _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        rows = weight[part].float()
        scales[0, part] = rows.abs().amax(dim=1) / _LARGEST_INT8
        steps = scales[0, part].clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        codes[part] = ((rows / steps).round_() + _INT8_ZERO).to(torch.uint8)
    return lay_out_codes(codes, scales, bits=8)


def codes_of(words: Tensor, bits: int) -> Tensor:
    """Undo the layout: `[16 * num_tiles, 64 * num_chunks]` uint8."""
    num_chunks, num_tiles = words.shape[:2]
    bytes_ = words.view(torch.uint8)
    if bits == 4:
        bytes_ = torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1)
    sizes = _sizes(num_tiles, num_chunks)
    axes = _AXES[bits]
    places = bytes_.reshape([sizes[axis] for axis in axes])
    return places.permute([axes.index(axis) for axis in range(len(axes))]).reshape(
        num_tiles * TILE, num_chunks * CHUNK
    )


def dequantise(weight: QuantisedWeight) -> Tensor:
    """What the codes stand for, `[num_outputs, num_inputs]` float32, in the order of x."""
    values = dequantise_ordered(weight.codes, weight.scales, weight.zeros, weight.bits, weight.group_size)
    values = values[: weight.num_outputs, : weight.num_inputs]
    if weight.order is None:
        return values
    return torch.empty_like(values).index_copy_(1, weight.order, values)


def dequantise_ordered(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """As `dequantise`, with what fills up tiles and chunks, in the order of the codes."""
    numbers = codes_of(codes, bits)
    num_inputs = numbers.shape[1]
    group = torch.arange(num_inputs, device=codes.device) // (group_size or num_inputs)
    # A last chunk may reach past the last group.
    group = group.clamp_(max=len(scales) - 1)
    zero = float(1 << (bits - 1)) if zeros is None else zeros.float().T[:, group]
    return (numbers.float() - zero) * scales.float().T[:, group]


def quantised_linear(x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias`, summed in float32 and rounded once.

    For many rows the weight's values may each be rounded to the dtype of x first. For how many depends on the
    weight's shape alone, and what a row gives not on the others, up to that number.

    Args:
        x: `[num_rows, num_inputs]`, any strides.
        weight: of `lay_out_codes` or `quantise_to_int8`.
        bias: `[num_outputs]`, dtype of x.

    Returns:
        `[num_rows, num_outputs]`, contiguous, dtype of x.

    Raises:
        OpInputError: shapes do not fit together.
    """
    if x.dim() != 2 or x.shape[1] != weight.num_inputs:
        raise OpInputError(
            "quantised_linear",
            f"x is {list(x.shape)}, the weight [{weight.num_outputs}, {weight.num_inputs}]:"
            " x must have two axes and as many inputs as the weight",
        )
    product: Tensor = _quantised_linear(
        x,
        weight.codes,
        weight.scales,
        weight.zeros,
        weight.order,
        bias,
        weight.bits,
        weight.group_size,
        weight.num_outputs,
    )
    return product


def reference(
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
    """The op's meaning."""
    weight = dequantise_ordered(codes, scales, zeros, bits, group_size)[:num_outputs, : x.shape[1]]
    ordered = x if order is None else x[:, order]
    product = ordered.float() @ weight.T
    return (product if bias is None else product + bias.float()).to(x.dtype)


def _check(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> None:
    num_outputs, num_inputs = codes.shape
    if bits not in BITS:
        raise OpInputError("quantised_linear", f"bits is {bits}: must be one of {', '.join(map(str, BITS))}")
    num_groups = -(-num_inputs // group_size) if group_size else 1
    wanted: Sequence[int] = (num_groups, num_outputs)
    for name, part in (("scales", scales), ("zeros", zeros)):
        if part is not None and tuple(part.shape) != wanted:
            raise OpInputError(
                "quantised_linear",
                f"{name} is {list(part.shape)}, codes {list(codes.shape)}"
                f" in groups of {group_size or num_inputs}: must be {list(wanted)}",
            )


def _sizes(num_tiles: int, num_chunks: int) -> tuple[int, ...]:
    return num_tiles, 2, 8, num_chunks, 2, 2, 2, 4, 2


def _to_words(codes: Tensor, bits: int) -> Tensor:
    num_outputs, num_inputs = codes.shape
    num_tiles, num_chunks = -(-num_outputs // TILE), -(-num_inputs // CHUNK)
    shape = (num_chunks, num_tiles, bits // 4, _LANES, _WORDS)
    words = torch.empty(shape, dtype=torch.int32, device=codes.device)
    tiles_at_once = _ROWS_AT_ONCE // TILE
    for first in range(0, num_tiles, tiles_at_once):
        rows = codes[first * TILE : (first + tiles_at_once) * TILE]
        padded = F.pad(rows, (0, -num_inputs % CHUNK, 0, -len(rows) % TILE))
        places = padded.view(_sizes(len(padded) // TILE, num_chunks)).permute(_AXES[bits])
        flat = places.reshape(-1, 8 // bits)
        packed = flat[:, 0] | flat[:, 1] << 4 if bits == 4 else flat[:, 0]
        part = words[:, first : first + tiles_at_once]
        part.copy_(packed.view(torch.int32).view(part.shape))
    return words


def _fake(
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
    return x.new_empty((x.shape[0], num_outputs))


_quantised_linear = define_op(
    "quantised_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? order, Tensor? bias,"
    " int bits, int group_size, int num_outputs) -> Tensor",
    reference=reference,
    fake=_fake,
)
