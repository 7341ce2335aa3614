"""One decode step of the engine with native kernels, by dtype, and with their plain-torch reference in turns.

    python -m benchmarks decode --model FOLDER [--sequences 1 64] [--rounds 5]

Engines decode the same sequences, with prompts of 16 to 128 tokens, in turns of a few steps: all are at the
same length, and a busy spell of the machine hits all. A figure is the median over all steps; CPU time is of
this process, all threads. `OMP_WAIT_POLICY=PASSIVE`, which a worker sets for its engine, has to stand in the
environment here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.bench_engine import Timing
from benchmarks.workload import make_workload
from cuda_ops.native import use_kernels
from engine.config import Dtype, EngineConfig, Kernels
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
        reference = statistics.median(timing.wall_seconds for timing in next(iter(timings.values())))
        for name, runs in timings.items():
            wall = [timing.wall_seconds for timing in runs]
            cpu = statistics.median(timing.cpu_seconds for timing in runs)
            cells = (statistics.median(wall), min(wall), cpu)
            ratio = reference / statistics.median(wall)
            table.add_row(str(num_sequences), name, *(f"{cell * 1e3:.1f}" for cell in cells), f"{ratio:.2f}")
    console.print(table)
    console.print(
        f"{arguments.threads} threads, {arguments.rounds} rounds of {STEPS_IN_TURN} steps,"
        f" OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')},"
        f" load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, torch {torch.__version__}"
    )


def measure(arguments: argparse.Namespace, num_sequences: int) -> dict[str, list[Timing]]:
    """Time steps in which every sequence decodes one token, by contestant."""
    contestants = {f"reference, {arguments.dtypes[0]}": _decoding(arguments, "reference", num_sequences)}
    for dtype in arguments.dtypes:
        contestants[f"native, {dtype}"] = _decoding(arguments, "native", num_sequences, dtype)
    timings: dict[str, list[Timing]] = {name: [] for name in contestants}
    for _ in range(arguments.rounds):
        for name, engine in contestants.items():
            use_kernels("reference" if name.startswith("reference") else "native")
            timings[name].extend(_time_steps(engine))
    return timings


def _decoding(
    arguments: argparse.Namespace, kernels: Kernels, num_sequences: int, dtype: Dtype | None = None
) -> Engine:
    """Make an engine in which this many sequences have come to decoding."""
    engine = Engine.from_config(
        EngineConfig(
            model=str(arguments.model),
            dtype=dtype or arguments.dtypes[0],
            num_threads=arguments.threads,
            kernels=kernels,
        )
    )
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    for request in make_workload(num_sequences):
        engine.add_request(request.request_id, request.prompt_ids, params)
    while engine.step().stats.num_prefill_tokens:
        pass
    return engine


def _time_steps(engine: Engine) -> list[Timing]:
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
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=get_args(Dtype),
        default=["bfloat16", "int8"],
        help="of native kernels, one after the other; the reference runs the first",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    return parser.parse_args()


if __name__ == "__main__":
    main()
