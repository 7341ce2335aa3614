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

from cuda_ops.memory import LargePages
from engine.errors import ModelLoadError
from engine.model_config import ConfigFields
from engine.shard import WHOLE, Shard

WeightLayout = Literal["dense", "packed", "int8"]
"""Of dense layers: as in the file, in panels for the CPU's kernels, or that and rounded to int8."""

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
class _Entry:
    file: TensorFile
    full_name: str


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
    ) -> None:
        self._entries = dict(entries)
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
    ) -> Checkpoint:
        """Find the folder's tensors.

        Args:
            folder: a model folder.
            name_prefix: cut off the names that have it; checkpoints of a bare decoder lack it.
            dtype: of every tensor taken.
            device: of every tensor taken.
            layout: of dense layers.
            shard: of split tensors.

        Raises:
            ModelLoadError: no checkpoint, a part is missing, or a file is broken.
        """
        entries = {
            name.removeprefix(name_prefix): _Entry(file, name)
            for file in _find_files(folder)
            for name in file.names()
        }
        return cls(entries, str(folder), dtype=dtype, device=device, layout=layout, shard=shard)

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

    def finish(self, *, ignored_endings: tuple[str, ...]) -> None:
        """Check that nothing was left behind.

        Args:
            ignored_endings: names ending so hold nothing that the model computes with.

        Raises:
            ModelLoadError: a tensor that the model has no place for.
        """
        extra = sorted(name for name in self._entries if not name.endswith(ignored_endings))
        if extra:
            raise ModelLoadError(
                str(self._entries[extra[0]].file.path),
                f"holds {len(extra)} tensor(s) that the model has no place for, the first is {extra[0]}",
            )

    def _read_into(self, target: Tensor, name: str) -> None:
        entry = self._pop(name)
        source = entry.file.read(entry.full_name)
        _check(entry, name, tuple(source.shape), tuple(target.shape), source.dtype)
        target.copy_(source)
        self.num_elements += source.numel()
        self.on_read(source.nbytes)

    def _read_regions(
        self, name: str, shape: tuple[int, ...], wanted: Sequence[tuple[Tensor, Region]]
    ) -> None:
        entry = self._pop(name)
        found = entry.file.shape(entry.full_name)
        for target, region in wanted:
            source = entry.file.read_region(entry.full_name, region)
            _check(entry, name, found, shape, source.dtype)
            target.copy_(source)
            self.on_read(source.nbytes)
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
