"""The emulator finds the bugs that it is there to find: each ends a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.emulated_kernels import require_compiler

# Forks for each kernel, so that torch is loaded once; tells how each process ended and what it said.
SCRIPT = """
import json, os, sys, tempfile
from ctypes import c_int
from pathlib import Path
import torch
from cuda_ops.cuda.launcher import LaunchShape, Variant
from tests.support import emulated_kernels
torch.set_num_threads(1)
emulated_kernels.KERNEL_FOLDER = Path(sys.argv[1])

def run(name, step):
    values = torch.arange(64.0)
    emulated_kernels.EmulatedLauncher().launch(
        Variant.of(name, "broken"), LaunchShape((1, 1, 1), 64, 16384), (values, c_int(step)))
    os.write(2, f"sum {values.sum().item()}".encode())

ended = {}
for name, step in json.loads(sys.argv[2]).items():
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            try:
                run(name, step)
            except BaseException as error:
                os.write(2, str(error).encode())
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        ended[name] = (status, said.read().decode())
print(json.dumps(ended))
"""
KERNEL = """
#include <ptx.cuh>
#include <ptx_hopper.cuh>
extern "C" __global__ void broken(float* values, int step) {{
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  const int i = threadIdx.x;
  {body}
}}
"""
EXCHANGE = "shared[i] = values[i]; {barrier} values[i] = shared[63 - i] * 2;"
COPY = (
    "if (i == 0) {{ cp_async_16(shared, values + 4, true); cp_async_commit();"
    " {wait} values[i] = shared[1]; }}"
)
WRITE = "if (i == 0) values[step] = 1;"
# Each thread's sums of a tile of ones by itself, the first run of each row having been copied.
PRODUCT = """
  unsigned char* tile = aligned_dynamic_shared();
  values[i] = __uint_as_float(0x3f803f80u);
  for (int k = i; k < 64 * 64; k += 64) reinterpret_cast<unsigned short*>(tile)[k] = 0x3f80;
  __syncthreads();
  cp_async_16(tile + i * 128, values, true);
  cp_async_commit();
  cp_async_wait<0>();
  {fence}
  __syncthreads();
  float sums[8][4];
  {begin}
  wgmma_bf16(sums, tile_descriptor(tile), tile_descriptor(tile), true);
  {meanwhile}
  {finish}
  values[i] = sums[0][0] + sums[7][3];
"""


def product(
    fence: str = "fence_for_wgmma();",
    begin: str = "wgmma_begin();",
    meanwhile: str = "",
    finish: str = "wgmma_finish(sums);",
) -> str:
    return PRODUCT.format(fence=fence, begin=begin, meanwhile=meanwhile, finish=finish)


BODIES = {
    "right": EXCHANGE.format(barrier="__syncthreads();"),
    "no_barrier": EXCHANGE.format(barrier=""),
    "half_a_block": "if (i < 32) __syncthreads();",
    "two_barriers": "if (i < 32) __syncthreads();\nelse __syncthreads();",
    "two_warp_barriers": "if (i % 2) __syncwarp();\nelse __syncwarp();",
    "lanes_that_ended": "if (i % 2) return; values[i] = __shfl_xor_sync(0xffffffffu, i, 1);",
    "half_a_mask": "if (i < 32) __syncwarp(0x0000ffffu);",
    "odd_address": "cp_async_16(shared + 1, values, true);",
    "awaited_copy": COPY.format(wait="cp_async_wait<0>();"),
    "copy_not_awaited": COPY.format(wait=""),
    "product": product(),
    "product_not_fenced": product(fence=""),
    "product_not_begun": product(begin=""),
    "product_overwritten": product(meanwhile="__syncthreads(); tile[0] = 0;"),
    "product_not_awaited": product(meanwhile="values[i] = sums[0][0];", finish="return;"),
    "write_past_the_tensor": WRITE,
    "write_before_the_tensor": WRITE,
}
STEPS = {"write_past_the_tensor": 64, "write_before_the_tensor": -1}
KERNELS_OF = """
import sys
import torch
from cuda_ops.cuda.library import OPS
from tests.support.emulated_kernels import EmulatedLauncher
from tests.support import kernel_calls as made
torch.set_num_threads(1)
model = made.ModelShape("odd", 100, 36, 6, 2, 80)
for is_reversed in (False, True):
    launcher = EmulatedLauncher(is_reversed=is_reversed)
    hopper = EmulatedLauncher(is_reversed=is_reversed, arch="sm_90a")
    calls = {
        "rows": lambda: made.row_calls(model, 3, torch.bfloat16),
        "float8": lambda: made.float8_calls(model, 3, torch.bfloat16),
        "quantised": lambda: made.quantised_calls(model, 3, torch.bfloat16),
        "attention": lambda: made.attention_calls(model, torch.bfloat16),
        "hopper": lambda: made.attention_calls(made.ModelShape("odd", 0, 0, 2, 1, 64), torch.bfloat16),
        "sampling": made.sampling_calls,
        "float8 products": made.float8_linear_calls,
        "products of codes": lambda: made.coded_calls(torch.bfloat16),
    }
    for op, arguments in calls[sys.argv[1]]():
        OPS[op](hopper if sys.argv[1] == "hopper" else launcher, *arguments)
print("clean")
"""


@dataclass(frozen=True, slots=True)
class Ended:
    status: int
    said: str


def run_all(folder: Path, bodies: Mapping[str, str], steps: Mapping[str, int]) -> dict[str, Ended]:
    for name, body in bodies.items():
        (folder / f"{name}.cu").write_text(KERNEL.format(body=body))
    wanted = json.dumps({name: steps.get(name, 0) for name in bodies})
    done = run_script(SCRIPT, str(folder), wanted)
    assert done.returncode == 0, done.stderr
    return {name: Ended(*ended) for name, ended in json.loads(done.stdout).items()}


def run_script(script: str, *arguments: str, sanitizes: bool = False) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": os.getcwd()}
    if sanitizes:
        find = [require_compiler(), "-print-file-name=libasan.so"]
        library = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
        environ |= {"EMULATOR_SANITIZES": "1", "LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        env=environ,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ended]:
    require_compiler()
    return run_all(tmp_path_factory.mktemp("kernels"), BODIES, STEPS).__getitem__


def test_emulator_runs_a_kernel_that_is_right(ended: Callable[[str], Ended]) -> None:
    assert ended("right") == Ended(0, f"sum {float(sum(range(64)) * 2)}")


def test_emulator_shows_a_missing_barrier_as_nan(ended: Callable[[str], Ended]) -> None:
    assert ended("no_barrier") == Ended(0, "sum nan")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("half_a_block", "__syncthreads that not all threads come to"),
        ("two_barriers", "different __syncthreads"),
        ("two_warp_barriers", "different barriers"),
        ("lanes_that_ended", "not all its lanes come to"),
        ("half_a_mask", "the mask must be full"),
        ("odd_address", "not a multiple of 16"),
        ("product_not_fenced", "without fence.proxy.async"),
        ("product_not_begun", "without wgmma.fence"),
        ("product_overwritten", "was written before it was waited for"),
    ],
)
def test_emulator_ends_at_a_barrier_that_diverges_and_at_what_hardware_refuses(
    name: str, message: str, ended: Callable[[str], Ended]
) -> None:
    assert ended(name).status == -6
    assert message in ended(name).said


def test_emulator_copies_no_sooner_than_it_is_waited_for(ended: Callable[[str], Ended]) -> None:
    assert ended("awaited_copy") == Ended(0, f"sum {float(sum(range(64)) + 5)}")
    assert ended("copy_not_awaited") == Ended(0, "sum nan")


def test_emulator_shows_a_product_no_sooner_than_it_is_waited_for(ended: Callable[[str], Ended]) -> None:
    # Two sums of 16 products of ones in each of 64 threads.
    assert ended("product") == Ended(0, f"sum {64.0 * 32}")
    assert ended("product_not_awaited") == Ended(0, "sum nan")


def test_emulator_faults_at_the_page_after_a_tensor_and_tells_of_writes_beside_it(
    ended: Callable[[str], Ended],
) -> None:
    assert ended("write_past_the_tensor").status == -11
    assert "wrote outside its tensors" in ended("write_before_the_tensor").said


def test_sanitizer_tells_of_a_step_past_shared_memory(tmp_path: Path) -> None:
    (tmp_path / "past.cu").write_text(KERNEL.format(body="shared[4096 - 64 + i + step] = 1;"))

    done = run_script(SCRIPT, str(tmp_path), '{"past": 1}', sanitizes=True)

    assert "heap-buffer-overflow" in done.stdout


FAMILIES = (
    "rows", "float8", "quantised", "attention", "hopper", "sampling", "float8 products", "products of codes",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_is_clean_under_address_and_undefined_behaviour_sanitizers(family: str) -> None:
    done = run_script(KERNELS_OF, family, sanitizes=True)

    assert done.stdout == "clean\n", done.stderr
