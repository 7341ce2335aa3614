"""Which implementation the ops run: the plain-torch reference, or the native kernels at one level.

A choice holds for the whole process and is made before ops run, by `Engine.from_config` or a test. Nothing is
compiled here: `make` does that (`cuda_ops/cpu/build.py`), a wheel carries the result.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

import torch

from cuda_ops.cpu.build import failure_path, library_path
from cuda_ops.errors import KernelsUnavailableError

KernelChoice = Literal["auto", "native", "reference"]
"""`auto` takes native kernels where they are, `native` insists on them."""

KERNEL_CHOICES: Final[tuple[KernelChoice, ...]] = get_args(KernelChoice)


@dataclass(frozen=True, slots=True)
class KernelsInUse:
    """What ops on the CPU run from now on.

    Attributes:
        level: the instructions that the native kernels use; None is the reference.
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


def native_levels() -> tuple[str, ...]:
    """Name the levels that this machine's kernels can run at, best first.

    Raises:
        KernelsUnavailableError: there is no library, or torch cannot load it.
    """
    names: bytes = _load(library_path()).throughline_cpu_levels()
    return tuple(names.decode().split())


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
    return library
