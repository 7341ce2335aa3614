"""Launching through cuda-core at a driver that takes notes, and choosing kernels where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cuda_ops.errors import KernelsUnavailableError
from cuda_ops.native import use_cuda_kernels
from tests.support.emulated_kernels import require_compiler
from tests.support.stand_in_driver import build_driver

# One process for all of it: cuda-core looks for a driver once.
SCRIPT = """
import ctypes, sys
from pathlib import Path
import torch
from tests.support.stand_in_driver import StandInDriver
driver = StandInDriver(Path(sys.argv[1]))
from cuda_ops.cuda.compiler import Compiler
from cuda_ops.cuda.device import CudaLauncher
from cuda_ops.cuda.launcher import LaunchShape, Variant

streams = iter([0x70, 0x71, 0x70])
launcher = CudaLauncher(0, Compiler("sm_90a", None), 132, lambda device: next(streams))
variant = Variant.of("activation", "activate_and_mul", ELEMENT="BFloat16", COUNT=8, THREADS=128, IS_GELU=0)
x = torch.zeros(8)
arguments = (x[2:], None, ctypes.c_longlong(-5), ctypes.c_int(7), ctypes.c_float(1.5))
driver.expect(len(arguments))

launcher.launch(variant, LaunchShape((3, 2, 1), 128), arguments)

latest = driver.latest
assert list(latest.config.blocks) == [3, 2, 1]
assert list(latest.config.threads) == [128, 1, 1]
assert latest.config.shared_bytes == 0
assert latest.config.stream == 0x70
pointer, null, wide, narrow, real = latest.arguments[:5]
assert pointer == x.data_ptr() + 8
assert null == 0
assert wide == 2**64 - 5
assert narrow % 2**32 == 7
assert ctypes.c_float.from_buffer_copy(real.to_bytes(8, "little")).value == 1.5
assert driver.allowed_shared_bytes == 0

launcher.launch(variant, LaunchShape((1, 1, 1), 128), arguments)
assert driver.latest.config.stream == 0x71, "the stream is asked for at every launch"
assert driver.num_libraries == 1, "a kernel is loaded once"

launcher.launch(variant, LaunchShape((1, 1, 1), 128, 100_000), arguments)
assert driver.latest.config.stream == 0x70
assert driver.latest.config.shared_bytes == 100_000
assert driver.allowed_shared_bytes == 100_000, "more than 48 KiB is to be allowed first"
assert driver.num_launches == 3
print("as it should be")
"""


def test_launch_hands_the_driver_shape_stream_and_packed_arguments() -> None:
    driver = build_driver(require_compiler())
    environ = {**os.environ, "PYTHONPATH": os.getcwd()}

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(driver)], env=environ, capture_output=True, text=True
    )

    assert done.stdout == "as it should be\n", done.stderr


def test_without_a_device_auto_is_the_reference_and_native_says_why() -> None:
    in_use = use_cuda_kernels("auto")

    assert in_use.level is None
    assert "sees no CUDA device" in in_use.reason
    assert use_cuda_kernels("reference").level is None
    with pytest.raises(KernelsUnavailableError, match="sees no CUDA device"):
        use_cuda_kernels("native")
