"""What stands between an op and its kernel: a variant, a launch's shape and arguments, and who runs them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

# More than a batch has (sequences times key heads), mostly, so that they are made once.
_FIRST_COUNTERS: Final = 16 * 1024

Argument = Tensor | ctypes.c_int | ctypes.c_longlong | ctypes.c_float | None
"""As the kernel's parameter is: a pointer (None is null), `int`, `long long`, `float`."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel with its constants filled in: what is compiled once and launched many times.

    Attributes:
        source: file in `kernels/`, without `.cu`.
        entry: name of the kernel in it.
        constants: macros, sorted by name.
    """

    source: str
    entry: str
    constants: tuple[tuple[str, str | int], ...]

    @classmethod
    def of(cls, source: str, entry: str, **constants: str | int) -> Variant:
        return cls(source, entry, tuple(sorted(constants.items())))

    @property
    def macros(self) -> tuple[str, ...]:
        """Compiler options, which NVRTC and g++ read alike."""
        return tuple(f"-D{name}={value}" for name, value in self.constants)

    def __str__(self) -> str:
        return " ".join((self.source, self.entry, *(f"{name}={value}" for name, value in self.constants)))


@dataclass(frozen=True, slots=True)
class LaunchShape:
    """Attributes:
    blocks: along x, y and z; a launch of none is not made.
    threads: of a block, along x.
    shared_bytes: dynamic shared memory of a block.
    """

    blocks: tuple[int, int, int]
    threads: int
    shared_bytes: int = 0


class Counters:
    """Whole numbers on a device that are zero, and that every kernel leaves at zero: who has arrived so far.

    One stream's: kernels that run side by side would count each other. What was handed out stays where it is,
    for captured graphs hold its address.
    """

    def __init__(self) -> None:
        self._held: list[Tensor] = []

    def take(self, count: int, device: torch.device) -> Tensor:
        """At least `count` int32; the same memory every time, unless more are wanted than ever before."""
        if not self._held or len(self._held[-1]) < count:
            self._held.append(torch.zeros(max(count, _FIRST_COUNTERS), dtype=torch.int32, device=device))
        return self._held[-1]


class Launcher(Protocol):
    """Runs kernels: on a GPU, or in tests on the CPU."""

    @property
    def num_multiprocessors(self) -> int:
        """How many blocks' worth of hardware there is to fill."""

    @property
    def arch(self) -> str:
        """The device's architecture, as the compiler calls it, e.g. `sm_90a`."""

    @property
    def counters(self) -> Counters:
        """Of the launcher's device."""

    def launch(self, variant: Variant, shape: LaunchShape, arguments: tuple[Argument, ...]) -> None:
        """Start the kernel on the stream that is torch's current one at this moment.

        Nothing is waited for. Tensors are on the launcher's device, and arguments match the kernel's
        parameters in number, order and width: only the tests' launcher checks that.

        Raises:
            KernelCompileError: the first launch of this variant compiles it, and the compiler refused.
        """
