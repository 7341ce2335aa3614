"""One decode step of the engine with its native kernels and with their plain-torch reference, in one run.

    python -m benchmarks decode --model FOLDER [--sequences 1 64] [--rounds 5]

Makes the same engine decode sequences with prompts of 16 to 128 tokens. The two take turns every few steps on
the same sequences, so that both see the same contexts, and a busy spell of the machine hits both. A figure is
the median over all steps; CPU time is of this process, all threads. `OMP_WAIT_POLICY=PASSIVE`, which a worker
sets for its engine, has to stand in the environment here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.bench_engine import Timing, make_workload
from cuda_ops.native import KernelsInUse, use_kernels
from engine.config import EngineConfig
from engine.core import Engine
from engine.sampling import SamplingParams

STEPS_IN_TURN = 4
MAX_TOKENS = 1024
"""More than is ever measured: nothing finishes meanwhile."""


def main() -> None:
    arguments = _parse_arguments()
    console = Console(width=110)
    table = Table("sequences", "kernels", "ms a step", "fastest", "CPU ms a step", "times the reference")
    for num_sequences in arguments.sequences:
        timings = measure(arguments, num_sequences)
        reference = statistics.median(timing.wall_seconds for timing in timings["reference"])
        for name, runs in timings.items():
            wall = [timing.wall_seconds for timing in runs]
            cpu = statistics.median(timing.cpu_seconds for timing in runs)
            cells = (statistics.median(wall), min(wall), cpu)
            ratio = reference / statistics.median(wall)
            table.add_row(str(num_sequences), name, *(f"{cell * 1e3:.1f}" for cell in cells), f"{ratio:.2f}")
    console.print(table)
    console.print(
        f"{arguments.dtype}, {arguments.threads} threads, {arguments.rounds} rounds of {STEPS_IN_TURN} steps,"
        f" OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')},"
        f" load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, torch {torch.__version__}"
    )


def measure(arguments: argparse.Namespace, num_sequences: int) -> dict[str, list[Timing]]:
    """Time steps in which every sequence decodes one token."""
    engine = Engine.from_config(
        EngineConfig(
            model=str(arguments.model),
            dtype=arguments.dtype,
            num_threads=arguments.threads,
            kernels="native",
        )
    )
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    for request in make_workload(num_sequences):
        engine.add_request(request.request_id, request.prompt_ids, params)
    while engine.step().stats.num_prefill_tokens:
        pass
    timings: dict[str, list[Timing]] = {}
    for _ in range(arguments.rounds):
        for in_use in (use_kernels("reference"), use_kernels("native")):
            timings.setdefault(in_use.level or "reference", []).extend(_time_steps(engine, in_use))
    return timings


def _time_steps(engine: Engine, in_use: KernelsInUse) -> list[Timing]:
    use_kernels("reference" if in_use.level is None else "native", in_use.level)
    engine.step()  # what the other left in the caches is gone after it
    timings = []
    for _ in range(STEPS_IN_TURN):
        wall, cpu = time.perf_counter(), time.process_time()
        engine.step()
        timings.append(Timing(time.perf_counter() - wall, time.process_time() - cpu))
    return timings


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    return parser.parse_args()


if __name__ == "__main__":
    main()
