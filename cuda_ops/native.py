"""Which implementation the ops run: the plain-torch reference, or the native kernels at one level.

A choice holds for the whole process and is made before ops run, by `Engine.from_config` or a test. The CPU's
kernels are not compiled here: `make` does that (`cuda_ops/cpu/build.py`), a wheel carries the result. A GPU's
are, one by one, when first launched.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch

from cuda_ops.cpu.build import failure_path, library_path
from cuda_ops.cuda.compiler import cache_folder
from cuda_ops.errors import KernelsUnavailableError
from cuda_ops.registry import NAMESPACE

KernelChoice = Literal["auto", "native", "reference"]
"""`auto` takes native kernels where they are, `native` insists on them."""

KERNEL_CHOICES: Final[tuple[KernelChoice, ...]] = get_args(KernelChoice)


_RECORDING_FUNCTIONS: Final[tuple[tuple[str, Any, list[Any]], ...]] = (
    ("arena_new", ctypes.c_void_p, []),
    ("arena_free", None, [ctypes.c_void_p]),
    ("arena_take", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int64]),
    ("arena_give", None, [ctypes.c_void_p, ctypes.c_void_p]),
    ("recording_new", ctypes.c_void_p, [ctypes.c_void_p]),
    ("recording_free", None, [ctypes.c_void_p]),
    ("record", None, [ctypes.c_void_p]),
    ("recording_size", ctypes.c_int64, [ctypes.c_void_p]),
    ("recording_keeps", ctypes.c_bool, [ctypes.c_void_p, ctypes.c_int64]),
    ("replay", ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]),
)


@dataclass(frozen=True, slots=True)
class KernelsInUse:
    """What ops on a kind of device run from now on.

    Attributes:
        level: the instructions that the native kernels use, for a GPU its architecture (`sm_90a`); None is
            the reference.
        reason: why it is the reference, for people to read; empty with native kernels.
    """

    level: str | None
    reason: str = ""

    @property
    def has_fast_linear(self) -> bool:
        """Whether `linear` beats torch's own products; without wide registers it does not."""
        return self.level is not None and self.level != "baseline"


def use_kernels(choice: KernelChoice, level: str | None = None) -> KernelsInUse:
    """Take this implementation for all ops on the CPU, until the next call; not while an op runs.

    Args:
        choice: what is wanted.
        level: of `native_levels`; None is the best one.

    Raises:
        KernelsUnavailableError: native kernels were insisted on and are not there, or not at this level.
    """
    if choice == "reference":
        # What was never loaded registered nothing.
        with contextlib.suppress(KernelsUnavailableError):
            _load(library_path()).throughline_cpu_release()
        return KernelsInUse(None, "the reference was asked for")
    try:
        chosen = level or native_levels()[0]
        if (refusal := _load(library_path()).throughline_cpu_use(chosen.encode())) != 0:
            why = "torch refused the registration" if refusal == 2 else "it does not exist here"
            raise KernelsUnavailableError(f"level {chosen} of the CPU kernels cannot be used: {why}")
    except KernelsUnavailableError as error:
        if choice == "native":
            raise
        return KernelsInUse(None, str(error))
    return KernelsInUse(chosen)


def use_cuda_kernels(choice: KernelChoice) -> KernelsInUse:
    """Take this implementation for all ops on torch's current CUDA device, until the next call.

    A kernel is compiled, or read from the cache on disk, and loaded when first launched, which must not be
    while a graph is captured: run what will be captured once before.

    Raises:
        KernelsUnavailableError: native kernels were insisted on, and a package, the compiler or a device that
            they can run on is not there.
    """
    if _cuda_kernels.cache_info().currsize:
        _cuda_kernels().registration._destroy()  # type: ignore[no-untyped-call]
        _cuda_kernels.cache_clear()
    if choice == "reference":
        return KernelsInUse(None, "the reference was asked for")
    try:
        return KernelsInUse(_cuda_kernels().arch)
    except KernelsUnavailableError as error:
        if choice == "native":
            raise
        return KernelsInUse(None, str(error))


def native_levels() -> tuple[str, ...]:
    """Name the levels that this machine's kernels can run at, best first.

    Raises:
        KernelsUnavailableError: there is no library, or torch cannot load it.
    """
    names: bytes = _load(library_path()).throughline_cpu_levels()
    return tuple(names.decode().split())


def has_native_kernels() -> bool:
    """Whether ops on the CPU run native kernels now."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::linear", "CPU"))


def loaded_library() -> ctypes.CDLL:
    """The CPU kernels' library.

    Raises:
        KernelsUnavailableError: it is not there, or torch cannot load it.
    """
    return _load(library_path())


@dataclass(frozen=True, slots=True)
class _CudaKernels:
    arch: str
    registration: torch.library.Library


@functools.cache
def _cuda_kernels() -> _CudaKernels:
    if not torch.cuda.is_available():
        raise KernelsUnavailableError(f"torch {torch.__version__} sees no CUDA device")
    # Only where a device is: the bindings cost memory and time that an engine on the CPU can do without.
    from cuda_ops.cuda.device import launcher_of_current_device
    from cuda_ops.cuda.library import register

    launcher = launcher_of_current_device(cache_folder(os.environ))
    return _CudaKernels(launcher.arch, register(launcher, "CUDA"))


@functools.lru_cache(maxsize=1)
def _load(path: Path) -> ctypes.CDLL:
    if not path.exists():
        failed = failure_path(path).exists()
        raise KernelsUnavailableError(
            f"the CPU kernels could not be compiled, see {failure_path(path)}"
            if failed
            else "the CPU kernels are not built; `make setup` does that where a C++ compiler is"
        )
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailableError(
            f"torch {torch.__version__} cannot load the CPU kernels; they need 2.11 or newer"
        ) from error
    library.throughline_cpu_levels.restype = ctypes.c_char_p
    library.throughline_cpu_use.argtypes = [ctypes.c_char_p]
    for name, result, arguments in _RECORDING_FUNCTIONS:
        function = getattr(library, f"throughline_cpu_{name}")
        function.restype, function.argtypes = result, arguments
    return library
