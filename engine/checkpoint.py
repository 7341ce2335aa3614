"""A model folder's tensors, taken one by one under their names.

    model.safetensors                    ┐
    model.safetensors.index.json + parts │  the first that exists
    pytorch_model.bin.index.json + parts │
    pytorch_model.bin                    ┘

Every tensor is copied out of its file into memory of our own, in the wanted dtype: a folder replaced under a
running worker can then not tear its weights, and no file stays mapped, so at no time is more than one tensor
held twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Final, Literal, Protocol
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cuda_ops.float8 import Float8Weight
from cuda_ops.memory import LargePages
from cuda_ops.quantised import QuantisedWeight
from engine.coded_weight import CodedWeight, StoredCodes, stack
from engine.errors import ModelLoadError
from engine.float8_weight import Float8Part, StoredFloat8, stack_float8
from engine.model_config import ConfigFields
from engine.quantisation import Quantisation
from engine.shard import WHOLE, Shard

WeightLayout = Literal["dense", "packed", "int8", "w8a16", "fp8"]
"""Of dense layers: as in the file; in panels, or that and in int8, for the CPU; in codes or e4m3 for GPUs."""

Region = tuple[slice, ...]
"""One slice for each axis."""

_FLOAT_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)


class TensorFile(Protocol):
    @property
    def path(self) -> Path: ...

    def names(self) -> tuple[str, ...]: ...

    def read(self, name: str) -> Tensor:
        """Return a tensor that may share memory with the file."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read_region(self, name: str, region: Region) -> Tensor:
        """As `read`, a part of a tensor; the rest is not read."""
        ...


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    path: Path

    def names(self) -> tuple[str, ...]:
        with _open_safetensors(self.path) as file:
            return tuple(file.keys())  # type: ignore[no-untyped-call]  # the library has no types

    def read(self, name: str) -> Tensor:
        # Opened anew for each tensor: an open file keeps all of its pages mapped and counted as ours.
        with _open_safetensors(self.path) as file:
            tensor: Tensor = file.get_tensor(name)  # type: ignore[no-untyped-call]  # as above
            return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        with _open_safetensors(self.path) as file:
            return tuple(file.get_slice(name).get_shape())  # type: ignore[no-untyped-call]  # as above

    def read_region(self, name: str, region: Region) -> Tensor:
        with _open_safetensors(self.path) as file:
            tensor: Tensor = file.get_slice(name)[region]  # type: ignore[no-untyped-call]  # as above
            return tensor


class TorchFile:
    """A `torch.save` file; only tensors are unpickled, never code."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = _load_pickled(path)

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read_region(self, name: str, region: Region) -> Tensor:
        return self._tensors[name][region]


@dataclass(frozen=True, slots=True)
class CodedFile:
    """Shows a weight that is stored as codes or in e4m3 as the plain tensor that it stands for."""

    stored: StoredCodes | StoredFloat8

    @property
    def path(self) -> Path:
        return self.stored.path

    def names(self) -> tuple[str, ...]:
        return ()

    def read(self, name: str) -> Tensor:
        return self.stored.read().values()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored.shape

    def read_region(self, name: str, region: Region) -> Tensor:
        return self.stored.read(*region).values()


@dataclass(frozen=True, slots=True)
class _Entry:
    file: TensorFile
    full_name: str

    @property
    def path(self) -> Path:
        return self.file.path

    def shape(self) -> tuple[int, ...]:
        return self.file.shape(self.full_name)

    def read(self, region: Region) -> Tensor:
        return self.file.read_region(self.full_name, region)

    def stored_bytes(self, read: Tensor) -> int:
        """Of the file's bytes, those that were read to make this."""
        if isinstance(self.file, CodedFile):
            return read.numel() * self.file.stored.quantisation.bits // 8
        return read.nbytes


class Checkpoint:
    """The tensors of one model, cast to one dtype and moved to one device as they are taken.

    Every tensor is taken at most once; `finish` tells which were never asked for. `layout` is what layers are
    to make of the weights they took, and `pages` where they put it on the CPU.

    Attributes:
        on_read: Called with the bytes of each tensor once it is read.
        shard: The rank's share that split tensors are taken by.
        num_elements: Of the tensors taken so far, whole ones, whatever this rank's share of them is.
    """

    def __init__(
        self,
        entries: Mapping[str, _Entry],
        source: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
        layout: WeightLayout,
        shard: Shard = WHOLE,
        quantisation: Quantisation | None = None,
        keeps_codes: bool = False,
    ) -> None:
        self._entries = dict(entries) if quantisation is None else _with_coded(entries, quantisation)
        self._keeps_codes = keeps_codes
        self._is_coded = quantisation is not None
        self._source = source
        self.dtype = dtype
        self.device = device
        self.layout = layout
        self.shard = shard
        self.num_elements = 0
        self.on_read: Callable[[int], None] = lambda num_bytes: None
        self.pages = LargePages()

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        name_prefix: str,
        dtype: torch.dtype,
        device: torch.device,
        layout: WeightLayout = "dense",
        shard: Shard = WHOLE,
        quantisation: Quantisation | None = None,
        keeps_codes: bool = False,
    ) -> Checkpoint:
        """Find the folder's tensors.

        Args:
            folder: a model folder.
            name_prefix: cut off the names that have it; checkpoints of a bare decoder lack it.
            dtype: of every tensor taken.
            device: of every tensor taken.
            layout: of dense layers.
            shard: of split tensors.
            quantisation: how weights of dense layers are stored, if not plainly.
            keeps_codes: give those out as they are where a layer asks (`take_coded`); else only their values.

        Raises:
            ModelLoadError: no checkpoint, a part is missing, or a file is broken.
        """
        entries = {
            name.removeprefix(name_prefix): _Entry(file, name)
            for file in _find_files(folder)
            for name in file.names()
        }
        return cls(
            entries,
            str(folder),
            dtype=dtype,
            device=device,
            layout=layout,
            shard=shard,
            quantisation=quantisation,
            keeps_codes=keeps_codes,
        )

    @property
    def num_bytes(self) -> int:
        """Of the files whose tensors have not all been taken."""
        return sum(path.stat().st_size for path in {entry.file.path for entry in self._entries.values()})

    def has(self, name: str) -> bool:
        return name in self._entries

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a tensor of exactly this shape.

        Raises:
            ModelLoadError: it is missing, has another shape or is no floating-point tensor.
        """
        target = torch.empty(shape, dtype=self.dtype, device=self.device)
        self._read_into(target, name)
        return target

    def take_scale(self, name: str, default: float) -> float:
        """Return a single number, or `default` where there is none of this name.

        Raises:
            ModelLoadError: it is no single number, or not above 0 and finite.
        """
        if not self.has(name):
            return default
        entry = self._pop(name)
        source = entry.file.read(entry.full_name)
        number = float(source) if source.numel() == 1 else math.nan
        if not 0 < number < math.inf:
            what = number if source.numel() == 1 else list(source.shape)
            raise ModelLoadError(
                str(entry.file.path), f"tensor {name} is {what}: must be one finite number above 0"
            )
        self.on_read(source.nbytes)
        return number

    def take_rows(self, parts: Sequence[tuple[str, int]], *columns: int) -> Tensor:
        """Stack `[rows, *columns]` tensors into one, as if they had been one tensor in the file.

        Args:
            parts: name and number of rows of each.
            columns: one number for weights, none for biases.

        Raises:
            ModelLoadError: as `take`.
        """
        sizes = [rows for _, rows in parts]
        target = torch.empty((sum(sizes), *columns), dtype=self.dtype, device=self.device)
        for (name, _), rows in zip(parts, torch.split(target, sizes), strict=True):
            self._read_into(rows, name)
        return target

    def take_split(self, name: str, *shape: int, axis: int, num_parts: int = 1) -> Tensor:
        """Return this rank's share of a tensor that is `shape` in the file, split along one axis.

        `num_parts`: equal parts along that axis, each of which is split by itself.

        Raises:
            ModelLoadError: as `take`.
        """
        slices = self.shard.slices(shape[axis], num_parts)
        length = slices[0].stop - slices[0].start
        own = (*shape[:axis], num_parts * length, *shape[axis + 1 :])
        target = torch.empty(own, dtype=self.dtype, device=self.device)
        pairs = zip(torch.split(target, length, dim=axis), slices, strict=True)
        self._read_regions(name, shape, [(part, _region(shape, axis, where)) for part, where in pairs])
        return target

    def take_split_rows(self, parts: Sequence[tuple[str, int]], *columns: int) -> Tensor:
        """As `take_rows`, this rank's share of the rows of each part."""
        return torch.cat([self.take_split(name, rows, *columns, axis=0) for name, rows in parts])

    def take_vocabulary(self, name: str, num_rows: int, size: int) -> Tensor:
        """This rank's rows of `[num_rows, size]`, with zeros where it has fewer than the first rank."""
        own = self.shard.rows_of(num_rows)
        most = -(-num_rows // self.shard.size)
        target = torch.zeros((most, size), dtype=self.dtype, device=self.device)
        region = (slice(own.start, own.stop), slice(0, size))
        self._read_regions(name, (num_rows, size), [(target[: len(own)], region)])
        return target

    def take_coded(
        self, parts: Sequence[tuple[str, int]], num_inputs: int, *, split_axis: int | None = None
    ) -> QuantisedWeight | Float8Weight | None:
        """Stack weights that are stored as codes; None, and nothing taken, where their values are to be.

        Args:
            parts: name and number of outputs of each, as in the file.
            num_inputs: of each, as in the file.
            split_axis: Of which this rank takes its share, of each part.

        Raises:
            ModelLoadError: as `take`.
        """
        if not self._keeps_codes or not all(self._is_coded_weight(name) for name, _ in parts):
            return None
        coded = [self._read_coded(name, (rows, num_inputs), split_axis) for name, rows in parts]
        weight = _stack(coded, self.device)
        if weight is not None:
            for name, rows in parts:
                self._pop(name)
                self.num_elements += rows * num_inputs
            self.on_read(weight.nbytes)
        return weight

    def finish(self, *, ignored_endings: tuple[str, ...]) -> None:
        """Check that nothing was left behind.

        Args:
            ignored_endings: names ending so hold nothing that the model computes with.

        Raises:
            ModelLoadError: a tensor that the model has no place for.
        """
        extra = sorted(
            name
            for name, entry in self._entries.items()
            if not name.endswith(ignored_endings) and not self._is_empty_bias(name, entry)
        )
        if extra:
            raise ModelLoadError(
                str(self._entries[extra[0]].file.path),
                f"holds {len(extra)} tensor(s) that the model has no place for, the first is {extra[0]}",
            )

    def _is_empty_bias(self, name: str, entry: _Entry) -> bool:
        """AutoGPTQ gives each of its layers a bias, zeros where the model has none."""
        return self._is_coded and name.endswith(".bias") and not entry.file.read(entry.full_name).any()

    def _is_coded_weight(self, name: str) -> bool:
        entry = self._entries.get(name)
        return entry is not None and isinstance(entry.file, CodedFile)

    def _read_coded(
        self, name: str, shape: tuple[int, int], split_axis: int | None
    ) -> CodedWeight | Float8Part:
        entry = self._entries[name]
        assert isinstance(entry.file, CodedFile)
        _check(entry, name, entry.file.stored.shape, shape, self.dtype)
        if split_axis is None:
            return entry.file.stored.read()
        (own,) = self.shard.slices(shape[split_axis])
        return entry.file.stored.read(*_region(shape, split_axis, own))

    def _read_into(self, target: Tensor, name: str) -> None:
        entry = self._pop(name)
        source = entry.file.read(entry.full_name)
        _check(entry, name, tuple(source.shape), tuple(target.shape), source.dtype)
        target.copy_(source)
        self.num_elements += source.numel()
        self.on_read(entry.stored_bytes(source))

    def _read_regions(
        self, name: str, shape: tuple[int, ...], wanted: Sequence[tuple[Tensor, Region]]
    ) -> None:
        entry = self._pop(name)
        found = entry.file.shape(entry.full_name)
        for target, region in wanted:
            source = entry.file.read_region(entry.full_name, region)
            _check(entry, name, found, shape, source.dtype)
            target.copy_(source)
            self.on_read(entry.stored_bytes(source))
        self.num_elements += math.prod(shape)

    def _pop(self, name: str) -> _Entry:
        entry = self._entries.pop(name, None)
        if entry is None:
            raise ModelLoadError(self._source, f"tensor {name} is missing")
        return entry


def _check(
    entry: _Entry, name: str, found: tuple[int, ...], wanted: tuple[int, ...], dtype: torch.dtype
) -> None:
    where = str(entry.file.path)
    if found != wanted:
        raise ModelLoadError(
            where, f"tensor {name} has shape {list(found)}, the config asks for {list(wanted)}"
        )
    if dtype not in _FLOAT_DTYPES:
        raise ModelLoadError(where, f"tensor {name} is {dtype}, which is not supported")


def _region(shape: tuple[int, ...], axis: int, own: slice) -> Region:
    return tuple(own if index == axis else slice(0, length) for index, length in enumerate(shape))


def _stack(
    parts: Sequence[CodedWeight | Float8Part], device: torch.device
) -> QuantisedWeight | Float8Weight | None:
    coded = [part for part in parts if isinstance(part, CodedWeight)]
    if not coded:
        return stack_float8([part for part in parts if isinstance(part, Float8Part)], device)
    stacked = stack(coded)
    return None if stacked is None else stacked.lay_out(device)


def _with_coded(entries: Mapping[str, _Entry], quantisation: Quantisation) -> dict[str, _Entry]:
    """Put what belongs to each layer's weight together under its name."""
    make: type[StoredCodes | StoredFloat8]
    parts: tuple[str, ...]
    if quantisation.method == "fp8":
        mark, parts, make = "weight_scale", ("weight", "weight_scale", "input_scale"), StoredFloat8
    else:
        mark, parts, make = "qweight", ("qweight", "qzeros", "scales", "g_idx"), StoredCodes
    layers = [name.removesuffix(f".{mark}") for name in entries if name.endswith(f".{mark}")]
    if not layers:
        folder = next(iter(entries.values())).path.parent
        raise ModelLoadError(str(folder), f"holds no {mark}, the config says {quantisation}")
    shown = dict(entries)
    for layer in layers:
        tensors = {part: shown.pop(f"{layer}.{part}") for part in parts if f"{layer}.{part}" in entries}
        shown[f"{layer}.weight"] = _Entry(CodedFile(make(layer, tensors, quantisation)), layer)
    return shown


def _find_files(folder: Path) -> list[TensorFile]:
    if (path := folder / "model.safetensors").is_file():
        return [SafetensorsFile(path)]
    if (path := folder / "model.safetensors.index.json").is_file():
        return [SafetensorsFile(part) for part in _parts_of(path)]
    if (path := folder / "pytorch_model.bin.index.json").is_file():
        return [TorchFile(part) for part in _parts_of(path)]
    if (path := folder / "pytorch_model.bin").is_file():
        return [TorchFile(path)]
    raise ModelLoadError(
        str(folder), "holds no weights: neither model.safetensors, pytorch_model.bin nor an index of parts"
    )


def _parts_of(index: Path) -> list[Path]:
    part_of = ConfigFields.from_file(index).nested("weight_map").raw
    parts = [index.parent / str(part) for part in sorted(set(part_of.values()), key=str)]
    if not parts:
        raise ModelLoadError(str(index), "weight_map names no files")
    for part in parts:
        if not part.is_file():
            raise ModelLoadError(str(part), f"the file is missing, {index.name} names it")
    return parts


@contextmanager
def _open_safetensors(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(str(path), f"is not a whole safetensors file: {error}") from error


def _load_pickled(path: Path) -> Mapping[str, Tensor]:
    try:
        tensors = _load_mapped_or_whole(path)
    except (RuntimeError, UnpicklingError, OSError, EOFError) as error:
        problem = str(error).partition("\n")[0]
        raise ModelLoadError(str(path), f"is not a whole file of tensors: {problem}") from error
    if not isinstance(tensors, Mapping) or not all(isinstance(item, Tensor) for item in tensors.values()):
        raise ModelLoadError(str(path), "must hold a mapping from names to tensors")
    return tensors


def _load_mapped_or_whole(path: Path) -> object:
    # Files from before torch 1.6 are no zip archives, and cannot be mapped.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
