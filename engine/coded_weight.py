"""Weights of AWQ and GPTQ checkpoints, from words of eight or four codes to one form.

    tensor     AWQ (gemm)                GPTQ
    qweight    [inputs, outputs / 8]     [inputs * bits / 32, outputs]     words of outputs; of inputs
    qzeros     [groups, outputs / 8]     [groups, outputs * bits / 32]     words of outputs
    scales     [groups, outputs]         [groups, outputs]
    g_idx      -                         [inputs]                          an input's group; may be absent

A word holds neighbours' codes from its lowest bits up, in AWQ those of outputs 0, 2, 4, 6, 1, 3, 5, 7. GPTQ
stores zeros less one, but in `gptq_v2`. Sources: AutoAWQ's `WQLinear_GEMM`, AutoGPTQ's `QuantLinear`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from cuda_ops.quantised import QuantisedWeight, lay_out_codes
from engine.errors import ModelLoadError
from engine.quantisation import Quantisation

_WORD_BITS: Final = 32
_AWQ_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the code of each of its eight outputs is."""

_ALL: Final = slice(None)
_ROWS_AT_ONCE: Final = 2048


class StoredTensor(Protocol):
    """A tensor in a file, that is read when it is asked for."""

    @property
    def path(self) -> Path: ...

    def shape(self) -> tuple[int, ...]: ...

    def read(self, region: tuple[slice, ...]) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """A part of a weight, or several stacked by their outputs.

    Attributes:
        codes: `[num_outputs, num_inputs]` uint8.
        scales: `[num_groups, num_outputs]`.
        zeros: like `scales`, uint8.
        groups: `[num_inputs]` int64, the group of each input.
        quantisation: how it was rounded.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor
    quantisation: Quantisation

    def values(self) -> Tensor:
        """What the codes stand for, `[num_outputs, num_inputs]` float32."""
        values = torch.empty(self.codes.shape)
        for first in range(0, len(values), _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            zeros, scales = (part[:, rows].T[:, self.groups].float() for part in (self.zeros, self.scales))
            torch.mul(self.codes[rows].float().sub_(zeros), scales, out=values[rows])
        return values

    def lay_out(self, device: torch.device) -> QuantisedWeight | None:
        """For the kernels; None where a rank's inputs are so cut out of groups that these differ in size."""
        sorted_groups, order = torch.sort(self.groups, stable=True)
        first = int(sorted_groups[0])
        size = self.quantisation.group_size
        num_inputs = len(sorted_groups)
        places = torch.arange(num_inputs)
        if size and not torch.equal(sorted_groups, first + places // size):
            return None
        used = slice(first, int(sorted_groups[-1]) + 1)
        is_moved = not torch.equal(order, places)
        zeros = self.zeros[used]
        is_middle = bool((zeros == 1 << (self.quantisation.bits - 1)).all())
        return lay_out_codes(
            (self.codes[:, order] if is_moved else self.codes).to(device),
            self.scales[used].to(device),
            None if is_middle else zeros.to(device),
            bits=self.quantisation.bits,
            group_size=size,
            order=order.to(device) if is_moved else None,
        )


def stack(parts: Sequence[CodedWeight]) -> CodedWeight | None:
    """Put weights of the same inputs one under the other; None where their inputs are grouped differently."""
    first = parts[0]
    if not all(torch.equal(part.groups, first.groups) for part in parts):
        return None
    return CodedWeight(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts], dim=1),
        torch.cat([part.zeros for part in parts], dim=1),
        first.groups,
        first.quantisation,
    )


class StoredCodes:
    """One layer's weight in a checkpoint, as codes.

    Attributes:
        path: of the file that holds the codes.
        shape: `(num_outputs, num_inputs)`.
    """

    def __init__(self, name: str, tensors: Mapping[str, StoredTensor], quantisation: Quantisation) -> None:
        """Look at the shapes; `tensors` are by what follows the layer's name.

        Raises:
            ModelLoadError: one is missing, or they do not fit together.
        """
        self._name = name
        self._tensors = tensors
        self.quantisation = quantisation
        self.path = tensors["qweight"].path
        for part in ("qzeros", "scales"):
            if part not in tensors:
                raise ModelLoadError(str(self.path), f"tensor {name}.{part} is missing")
        codes_a_word = _WORD_BITS // quantisation.bits
        rows, columns = tensors["qweight"].shape()
        is_awq = quantisation.method == "awq"
        num_inputs, num_outputs = (rows, columns * codes_a_word) if is_awq else (rows * codes_a_word, columns)
        self.shape = (num_outputs, num_inputs)
        self._num_groups = -(-num_inputs // quantisation.group_size) if quantisation.group_size else 1
        self._check("scales", self._num_groups, num_outputs)
        self._check("qzeros", self._num_groups, num_outputs // codes_a_word)
        if "g_idx" in tensors:
            self._check("g_idx", num_inputs)

    def read(self, rows: slice = _ALL, columns: slice = _ALL) -> CodedWeight:
        """Read some outputs and inputs.

        Raises:
            ModelLoadError: the codes are no int32, or an input is of a group that is not there.
        """
        num_outputs, num_inputs = self.shape
        rows, columns = slice(*rows.indices(num_outputs)), slice(*columns.indices(num_inputs))
        bits, offset = self.quantisation.bits, self.quantisation.zero_offset
        codes_a_word = _WORD_BITS // bits
        is_awq = self.quantisation.method == "awq"
        packed, kept = (rows, columns) if is_awq else (columns, rows)
        words = slice(packed.start // codes_a_word, -(-packed.stop // codes_a_word))
        within = slice(packed.start - words.start * codes_a_word, packed.stop - words.start * codes_a_word)
        groups = slice(0, self._num_groups)
        places = _AWQ_PLACES if is_awq else None
        zeros = _unpack(self._words("qzeros", (groups, slice(0, num_outputs // codes_a_word))), bits, places)
        if is_awq:
            codes = _unpack(self._words("qweight", (kept, words)), bits, places)[:, within].T
        else:
            codes = _unpack(self._words("qweight", (words, kept)).T.contiguous(), bits, None)[:, within]
        scales = self._tensors["scales"].read((groups, rows))
        if offset:
            zeros = (zeros + offset) & ((1 << bits) - 1)
        return CodedWeight(
            codes.contiguous(),
            scales.contiguous(),
            zeros[:, rows].contiguous(),
            self._group_of_inputs()[columns],
            self.quantisation,
        )

    def _group_of_inputs(self) -> Tensor:
        num_inputs = self.shape[1]
        if "g_idx" not in self._tensors:
            return torch.arange(num_inputs) // (self.quantisation.group_size or num_inputs)
        groups = self._tensors["g_idx"].read((slice(0, num_inputs),)).long()
        if num_inputs and not 0 <= int(groups.min()) <= int(groups.max()) < self._num_groups:
            raise ModelLoadError(
                str(self.path), f"tensor {self._name}.g_idx must name groups below {self._num_groups}"
            )
        return groups

    def _words(self, part: str, region: tuple[slice, ...]) -> Tensor:
        words = self._tensors[part].read(region)
        if words.dtype is not torch.int32:
            raise ModelLoadError(
                str(self.path), f"tensor {self._name}.{part} is {words.dtype}, must be int32"
            )
        return words.contiguous()

    def _check(self, part: str, *wanted: int) -> None:
        if (found := self._tensors[part].shape()) != wanted:
            raise ModelLoadError(
                str(self._tensors[part].path),
                f"tensor {self._name}.{part} has shape {list(found)},"
                f" {self.quantisation} asks for {list(wanted)}",
            )


def _unpack(words: Tensor, bits: int, places: Sequence[int] | None) -> Tensor:
    """Take `[n, m]` words apart into `[n, m * 32 / bits]` codes, uint8."""
    bytes_ = words.view(torch.uint8).view(*words.shape, 4)
    codes = torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1).flatten(2) if bits == 4 else bytes_
    return (codes if places is None else codes[..., list(places)]).flatten(1)
