"""GPU kernels without a GPU: compiled for all architectures, emulated, launched at a stand-in driver."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from cuda_ops.native import use_kernels
from tests.support.borrowed_gpu import BorrowedGpu
from tests.support.emulated_kernels import EmulatedLauncher, registered, require_compiler


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    """In place of the choice among the CPU's implementations, which nothing here runs."""
    if sys.platform != "linux":
        pytest.skip("NVIDIA's compiler and the emulator are there for Linux")
    torch.set_num_threads(1)
    yield
    use_kernels("reference")


@pytest.fixture(params=["forward", "reversed", pytest.param("gpu", marks=pytest.mark.gpu)])
def launcher(request: pytest.FixtureRequest) -> Iterator[EmulatedLauncher | BorrowedGpu]:
    """Whoever runs the kernels: the emulator, in two orders, and a GPU where there is one."""
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device")
        running: EmulatedLauncher | BorrowedGpu = BorrowedGpu()
    else:
        require_compiler()
        running = EmulatedLauncher(is_reversed=request.param == "reversed")
    with registered(running):
        yield running
