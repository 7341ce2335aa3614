"""Runs the GPU's kernels on the CPU: the same sources, compiled by g++ against an emulator of our own."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cuda_ops.cuda.compiler import KERNEL_FOLDER
from cuda_ops.cuda.launcher import Argument, Counters, Launcher, LaunchShape, Variant
from cuda_ops.cuda.library import register
from cuda_ops.native import use_kernels

FOLDER = Path(__file__).parent / "emulator"
SANITIZE_VARIABLE = "EMULATOR_SANITIZES"
"""Set where the process runs under the address sanitizer's library: kernels are then built with it."""

_FLAGS = (
    "-std=c++20", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing", "-fvisibility-inlines-hidden",
    "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas",
)  # fmt: skip
_SANITIZING = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_LETTERS = {ctypes.c_int: "i", ctypes.c_longlong: "l", ctypes.c_float: "f"}
_CANARY = 0xA5


@dataclass(slots=True)
class EmulatedLauncher:
    """Runs launches on CPU tensors at once, each tensor's storage moved between guard pages meanwhile.

    Attributes:
        is_reversed: whether warps and blocks take turns from last to first.
        num_multiprocessors: what the kernels' host side is told.
        arch: the same; the emulator knows the instructions of all.
        counters: on the CPU.
    """

    is_reversed: bool = False
    num_multiprocessors: int = 3
    arch: str = "sm_80"
    counters: Counters = field(default_factory=Counters)

    def launch(self, variant: Variant, shape: LaunchShape, arguments: tuple[Argument, ...]) -> None:
        library = _library(variant)
        given = "".join(_LETTERS.get(type(argument), "p") for argument in arguments)
        expected = library.emulator_signature().decode()
        assert given == expected, f"{variant}: arguments are {given}, parameters {expected}"
        assert 0 < shape.threads <= 1024
        assert shape.blocks[1] <= 65535
        assert shape.blocks[2] <= 65535
        with guarded(arguments) as native:
            packed = (ctypes.c_void_p * len(native))(*(ctypes.addressof(cell) for cell in native))
            blocks = (ctypes.c_uint * 3)(*shape.blocks)
            library.emulator_run(
                blocks, shape.threads, shape.shared_bytes, self.is_reversed, str(variant).encode(), packed
            )


@contextmanager
def registered(launcher: Launcher) -> Iterator[None]:
    """Let the ops on CPU tensors run the GPU's kernels by this launcher."""
    use_kernels("reference")
    library = register(launcher, "CPU")
    try:
        yield
    finally:
        library._destroy()


def require_compiler() -> str:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no g++ to build the emulator with")
    return compiler


@contextmanager
def guarded(arguments: Sequence[Argument]) -> Iterator[list[ctypes._SimpleCData[object]]]:
    """Copy each storage to where the next page cannot be touched; give back what was written."""
    regions: dict[int, _Region] = {}
    native: list[ctypes._SimpleCData[object]] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            storage = argument.untyped_storage()
            region = regions.setdefault(storage.data_ptr(), _Region(storage))
            native.append(ctypes.c_void_p(region.start + argument.data_ptr() - storage.data_ptr()))
        else:
            native.append(argument if argument is not None else ctypes.c_void_p(None))
    yield native
    for region in regions.values():
        region.close()


class _Region:
    """A storage's bytes in pages of their own, ending (but for alignment) where a guard page begins."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._storage = storage
        self._num_bytes = storage.nbytes()
        room = -(-max(self._num_bytes, 1) // 16) * 16
        pages = -(-room // mmap.PAGESIZE) * mmap.PAGESIZE
        self._map = mmap.mmap(-1, pages + mmap.PAGESIZE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        ctypes.memset(first, _CANARY, pages)
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(first + pages), mmap.PAGESIZE, 0) != 0:
            raise OSError("no guard page could be made")
        self._before = first
        self.start = first + pages - room
        self._end = first + pages
        ctypes.memmove(self.start, storage.data_ptr(), self._num_bytes)

    def close(self) -> None:
        ctypes.memmove(self._storage.data_ptr(), self.start, self._num_bytes)
        after = self.start + self._num_bytes
        around = ctypes.string_at(self._before, self.start - self._before) + ctypes.string_at(
            after, self._end - after
        )
        assert around.count(_CANARY) == len(around), "a kernel wrote outside its tensors"


@functools.cache
def _library(variant: Variant) -> ctypes.CDLL:
    library = ctypes.CDLL(str(_build(variant)))
    library.emulator_signature.restype = ctypes.c_char_p
    library.emulator_run.argtypes = [
        ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_bool, ctypes.c_char_p, ctypes.c_void_p,
    ]  # fmt: skip
    library.emulator_run.restype = None
    return library


def _build(variant: Variant) -> Path:
    flags = (*_FLAGS, *(_SANITIZING if os.environ.get(SANITIZE_VARIABLE) else ()))
    options = (
        *flags, *variant.macros,
        f'-DKERNEL_FILE="{variant.source}.cu"', f"-DKERNEL_ENTRY={variant.entry}",
    )  # fmt: skip
    # The emulator's folder comes first: its ptx.cuh takes the place of the kernels'.
    options += (f"-I{FOLDER}", f"-I{KERNEL_FOLDER}", "-x", "c++", str(FOLDER / "run.cpp"))
    digest = hashlib.sha256("\0".join(options).encode())
    for path in (*sorted(FOLDER.glob("*.*")), *sorted(KERNEL_FOLDER.glob("*.cuh"))):
        digest.update(path.read_bytes())
    # Else it is the emulator's own, for a test.
    if (kernel := KERNEL_FOLDER / f"{variant.source}.cu").exists():
        digest.update(kernel.read_bytes())
    built = FOLDER / "build" / f"{variant.source}-{digest.hexdigest()[:24]}.so"
    if not built.exists():
        built.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as scratch:
            fresh = Path(scratch) / built.name
            done = subprocess.run(
                [require_compiler(), *options, "-o", str(fresh)], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            os.replace(fresh, built)
    return built
