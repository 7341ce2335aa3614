"""What GPU kernels take of each architecture; `python -m tests.support.kernel_resources` writes the table."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cuda_ops.cuda.compiler import Compiler
from cuda_ops.cuda.launcher import Argument, Counters, LaunchShape, Variant
from cuda_ops.cuda.library import OPS
from tests.support.kernel_calls import calls_of_models

TABLE = Path("cuda_ops/cuda/resources.json")
HOPPER = "sm_90a"
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")
NUM_PROCESSES = 2
# By content: only what changed is compiled again.
CACHE = Path("tests/support/emulator/build/cubins")

Resources = dict[str, dict[str, dict[str, int]]]
"""By variant and architecture: registers a thread, bytes spilled, bytes of static shared memory."""

_USED = re.compile(r"Used (\d+) registers")
_SPILLED = re.compile(r"(\d+) bytes spill (?:stores|loads)")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(slots=True)
class VariantRecorder:
    """A launcher that runs nothing and remembers what was asked for."""

    arch: str = "sm_80"
    num_multiprocessors: int = 132
    counters: Counters = field(default_factory=Counters)
    variants: dict[Variant, None] = field(default_factory=dict)
    shapes: list[LaunchShape] = field(default_factory=list)

    def launch(self, variant: Variant, shape: LaunchShape, arguments: tuple[Argument, ...]) -> None:
        self.variants[variant] = None
        self.shapes.append(shape)


def variants_of_models() -> list[Variant]:
    """Every variant that the models' shapes ask for, as the ops choose them."""
    return sorted(set(_variants("sm_80")) | set(_variants(HOPPER)), key=str)


def architectures_of(variant: Variant) -> tuple[str, ...]:
    """All, but for what is written in Hopper's own instructions."""
    return (HOPPER,) if variant.source.endswith("_hopper") else ARCHITECTURES


def _variants(arch: str) -> Iterable[Variant]:
    recorder = VariantRecorder(arch)
    for op, arguments in calls_of_models():
        OPS[op](recorder, *arguments)
    return recorder.variants


def compile_everywhere(variants: Iterable[Variant]) -> Resources:
    """Compile for every architecture, in processes side by side; raises KernelCompileError."""
    jobs = [(variant, arch) for variant in variants for arch in architectures_of(variant)]
    resources: Resources = {}
    with ProcessPoolExecutor(NUM_PROCESSES) as pool:
        for (variant, arch), used in zip(jobs, pool.map(_resources, jobs, chunksize=8), strict=True):
            resources.setdefault(str(variant), {})[arch] = used
    return resources


def read_table() -> Mapping[str, Any]:
    table: Mapping[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def nvrtc_version() -> str:
    return ".".join(map(str, Compiler("sm_80", None).version))


def _resources(job: tuple[Variant, str]) -> dict[str, int]:
    variant, arch = job
    # A file's kernels are all in its log; the variant is one of them.
    log = Compiler(arch, CACHE).compile(variant).log.partition(f"entry function '{variant.entry}'")[2]
    log = log.partition("entry function")[0]
    shared = _SHARED.search(log)
    used = _USED.search(log)
    assert used is not None, log
    return {
        "registers": int(used.group(1)),
        "spilled": sum(map(int, _SPILLED.findall(log))),
        "shared": int(shared.group(1)) if shared else 0,
    }


def _write(echo: Callable[[str], None]) -> None:
    torch.set_num_threads(1)
    resources = compile_everywhere(variants_of_models())
    lines = [f"    {json.dumps(name)}: {json.dumps(by_arch)}" for name, by_arch in sorted(resources.items())]
    body = ",\n".join(lines)
    TABLE.write_text(
        f'{{\n  "nvrtc": "{nvrtc_version()}",\n  "kernels": {{\n{body}\n  }}\n}}\n', encoding="utf-8"
    )
    echo(f"{TABLE}: {len(resources)} kernels for {len(ARCHITECTURES)} architectures")


if __name__ == "__main__":
    _write(print)
