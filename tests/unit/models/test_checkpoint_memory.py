"""What loading takes of memory: each weight once, and beside it no more than one tensor on its way in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.kernels import built_levels
from tests.support.model_folders import make_model_folder

# Of 64 MiB in eight layers, so that a whole second copy stands out and one layer's does not.
WIDE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}

_MEASURE = """
import json, resource, sys, threading, torch
from pathlib import Path
from cuda_ops.native import use_kernels
from engine.weights import load_model

torch.set_num_threads(1)
use_kernels("auto")
folder, dtype, layout, small = sys.argv[1:]

def load(folder):
    return load_model(folder, dtype=getattr(torch, dtype), device=torch.device("cpu"), layout=layout)

load(small)  # libraries, oneDNN's and the allocator's own needs come with the first model
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
def field(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
before = field("VmRSS")
model = load(folder)
print(json.dumps({"peak": field("VmHWM") - before, "kept": field("VmRSS") - before}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wide model in parts, stored in bfloat16, and a small one."""
    wide = tmp_path_factory.mktemp("wide")
    make_model_folder("llama", wide, dtype=torch.bfloat16, max_shard_size="10MB", **WIDE)
    return wide, make_model_folder("llama", tmp_path_factory.mktemp("small"))


def measure(folders: tuple[Path, Path], dtype: str, layout: str) -> dict[str, int]:
    wide, small = folders
    ended = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(wide), dtype, layout, str(small)],
        capture_output=True,
        text=True,
        check=True,
    )
    figures: dict[str, int] = json.loads(ended.stdout)
    return figures


@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark from /proc")
@pytest.mark.parametrize(
    ("dtype", "layout", "share"),
    [
        ("bfloat16", "dense", 1.0),
        ("bfloat16", "packed", 1.0),
        ("bfloat16", "int8", 0.5),
        ("float32", "packed", 2.0),
    ],
)
def test_loading_takes_no_more_than_the_weights_and_a_part_of_them(
    folders: tuple[Path, Path], dtype: str, layout: str, share: float
) -> None:
    """`share`: of the file's bytes that the model in memory has, in this dtype and layout."""
    if layout != "dense":
        built_levels()
    num_bytes = sum(path.stat().st_size for path in folders[0].glob("*.safetensors"))

    figures = measure(folders, dtype, layout)

    assert len(list(folders[0].glob("*.safetensors"))) > 4
    assert figures["kept"] < 1.1 * share * num_bytes
    # The largest product, gate and up, is a sixteenth of the file.
    assert figures["peak"] < (share + 0.35) * num_bytes
