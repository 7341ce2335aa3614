"""The emulator finds the bugs that it is there to find: each in a process of its own, which it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.emulated_kernels import require_compiler

SCRIPT = """
import faulthandler, sys
from ctypes import c_int
from pathlib import Path
import torch
from cuda_ops.cuda.launcher import LaunchShape, Variant
from tests.support import emulated_kernels
emulated_kernels.KERNEL_FOLDER = Path(sys.argv[1])
values = torch.arange(64.0)
emulated_kernels.EmulatedLauncher().launch(
    Variant.of("broken", "broken"), LaunchShape((1, 1, 1), 64, 256), (values, c_int(int(sys.argv[2]))))
print("sum", values.sum().item())
"""
KERNEL = """
#include <ptx.cuh>
extern "C" __global__ void broken(float* values, int step) {{
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  const int i = threadIdx.x;
  {body}
}}
"""


ALL_KERNELS = """
import itertools
import torch
from cuda_ops.cuda.library import OPS
from tests.support.emulated_kernels import EmulatedLauncher
from tests.support.kernel_calls import ModelShape, attention_calls, row_calls, sampling_calls
torch.set_num_threads(1)
model = ModelShape("odd", 100, 36, 6, 2, 80)
for is_reversed in (False, True):
    launcher = EmulatedLauncher(is_reversed=is_reversed)
    calls = row_calls(model, 3, torch.bfloat16), attention_calls(model, torch.bfloat16), sampling_calls()
    for op, arguments in itertools.chain(*calls):
        OPS[op](launcher, *arguments)
print("clean")
"""


def sanitizing(environ: dict[str, str]) -> dict[str, str]:
    find = [require_compiler(), "-print-file-name=libasan.so"]
    library = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    return {**environ, "EMULATOR_SANITIZES": "1", "LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}


def run(
    tmp_path: Path, body: str, step: int = 0, *, sanitizes: bool = False
) -> subprocess.CompletedProcess[str]:
    require_compiler()
    (tmp_path / "broken.cu").write_text(KERNEL.format(body=body))
    environ = {**os.environ, "PYTHONPATH": os.getcwd()}
    if sanitizes:
        environ = sanitizing(environ)
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(step)], env=environ, capture_output=True, text=True
    )


EXCHANGE = "shared[i] = values[i]; {barrier} values[i] = shared[63 - i] * 2;"


def test_emulator_runs_a_kernel_that_is_right(tmp_path: Path) -> None:
    done = run(tmp_path, EXCHANGE.format(barrier="__syncthreads();"))

    assert done.stdout == f"sum {float(sum(range(64)) * 2)}\n", done.stderr


def test_emulator_shows_a_missing_barrier_as_nan(tmp_path: Path) -> None:
    assert run(tmp_path, EXCHANGE.format(barrier="")).stdout == "sum nan\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (i < 32) __syncthreads();", "__syncthreads that not all threads come to"),
        ("if (i < 32) __syncthreads();\nelse __syncthreads();", "different __syncthreads"),
        ("if (i % 2) __syncwarp();\nelse __syncwarp();", "different barriers"),
        ("if (i % 2) return; values[i] = __shfl_xor_sync(0xffffffffu, i, 1);", "not all its lanes come to"),
        ("if (i < 32) __syncwarp(0x0000ffffu);", "the mask must be full"),
        ("cp_async_16(shared + 1, values, true);", "not a multiple of 16"),
    ],
)
def test_emulator_ends_at_a_barrier_that_diverges_and_at_what_hardware_refuses(
    tmp_path: Path, body: str, message: str
) -> None:
    done = run(tmp_path, body)

    assert done.returncode == -6
    assert message in done.stderr


def test_emulator_copies_no_sooner_than_it_is_waited_for(tmp_path: Path) -> None:
    copy = "if (i == 0) { cp_async_16(shared, values + 4, true); cp_async_commit(); "
    copy += "{wait} values[i] = shared[1]; }"
    wait = "cp_async_wait<0>();"

    assert run(tmp_path, copy.replace("{wait}", wait)).stdout == f"sum {float(sum(range(64)) + 5)}\n"
    assert run(tmp_path, copy.replace("{wait}", "")).stdout == "sum nan\n"


def test_emulator_faults_at_the_page_after_a_tensor_and_tells_of_writes_beside_it(tmp_path: Path) -> None:
    write = "if (i == 0) values[step] = 1;"

    assert run(tmp_path, write, 64).returncode == -11
    assert "wrote outside its tensors" in run(tmp_path, write, -1).stderr


def test_sanitizer_tells_of_a_step_past_shared_memory(tmp_path: Path) -> None:
    body = "shared[i + step] = 1;"

    assert run(tmp_path, body, 0, sanitizes=True).returncode == 0
    done = run(tmp_path, body, 1, sanitizes=True)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_every_kernel_is_clean_under_address_and_undefined_behaviour_sanitizers() -> None:
    environ = sanitizing({**os.environ, "PYTHONPATH": os.getcwd()})

    done = subprocess.run([sys.executable, "-c", ALL_KERNELS], env=environ, capture_output=True, text=True)

    assert done.stdout == "clean\n", done.stderr
