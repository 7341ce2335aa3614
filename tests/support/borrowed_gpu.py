"""Runs kernels on a GPU for ops on CPU tensors, so that the emulator's tests are the GPU's tests too."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from cuda_ops.cuda.compiler import cache_folder
from cuda_ops.cuda.device import launcher_of_current_device
from cuda_ops.cuda.launcher import Argument, Counters, LaunchShape, Variant


class BorrowedGpu:
    """Copies every storage to the device, launches, waits, and copies back.

    Attributes:
        num_multiprocessors: what the kernels' host side is told; small, as the emulator's.
        arch: the device's.
        counters: on the CPU; each launch has a copy on the device, and brings it back.
    """

    num_multiprocessors = 3

    def __init__(self) -> None:
        self.counters = Counters()
        self._launcher = launcher_of_current_device(cache_folder(os.environ))
        self.arch = self._launcher.arch

    def launch(self, variant: Variant, shape: LaunchShape, arguments: tuple[Argument, ...]) -> None:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        there = {place: _bytes_of(storage).cuda() for place, storage in storages.items()}
        self._launcher.launch(variant, shape, tuple(_moved(argument, there) for argument in arguments))
        torch.cuda.synchronize()
        for place, storage in storages.items():
            _bytes_of(storage).copy_(there[place])


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]


def _moved(argument: Argument, there: dict[int, Tensor]) -> Argument:
    """The same place in the copy; only its address is used."""
    if not isinstance(argument, Tensor):
        return argument
    start = argument.untyped_storage().data_ptr()
    return there[start][argument.data_ptr() - start :]
