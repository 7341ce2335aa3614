"""How much the worker beside it slows an engine that is never out of work.

    python -m benchmarks engine_beside_worker [--jobs 400] [--tokens 32] [--rounds 5]

Two engine processes of one configuration take turns at the same requests. "Alone": all requests are handed
over at once, and whoever handed them over only listens. "Beside": as many jobs lie in the queue of a real
stack, whose worker claims, feeds, settles and draws spans while the engine computes. What counts is the
engine's CPU a token, its pipe included, and the length of a step; each of the two needs a core of its own.

A third way tells the machine's own share: the engine of "alone" while a process on another core only
counts. What a busy neighbour costs whatever it does (clock, shared caches, the host's other guests) is in it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import httpx
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from benchmarks.bench_queue import PROMPT, QUEUES
from benchmarks.measure import cpu_seconds, positive
from cuda_ops.native import use_kernels
from engine import builtin
from engine.config import EngineConfig
from engine.sampling import SamplingParams
from jobs.keys import Keys
from jobs.model import WorkerId
from jobs.redis_connection import connect
from jobs.redis_registry import RedisModelAnnouncer
from jobs.settings import JobsSettings
from tests.support.processes import wait_until
from tests.support.stack import RunningStack, command_line
from tests.support.valkey import free_port
from workers.engines.child_runtime import ChildRuntime
from workers.engines.protocol import EngineRequest, StepTally

ENGINE = "workers.engines.engine_process"
STEPS = re.compile(r"^throughline_engine_step_duration_seconds_(sum|count)(?:\{.*\})? (\S+)$", re.MULTILINE)
NUM_WARM_UP = 100
NUM_CLIENTS = 8
MAX_SUBMIT_SECONDS = 120
MAX_DRAIN_SECONDS = 600


@dataclass(frozen=True, slots=True)
class Steps:
    """Of one engine so far."""

    num: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Round:
    """Metadata is the figure's name in the report."""

    cpu_ms_a_token: float = field(metadata={"name": "engine's CPU, ms a token"})
    step_ms: float = field(metadata={"name": "mean step, ms"})
    num_steps: float = field(metadata={"name": "steps"})


@dataclass(frozen=True, slots=True)
class Way:
    """`serve` returns when that many requests of that many tokens are done."""

    name: str
    engine_pid: int
    steps: Callable[[], Steps]
    serve: Callable[[int, int], None]

    def measure(self, num_jobs: int, num_tokens: int) -> Round:
        before, cpu = self.steps(), cpu_seconds(self.engine_pid)
        self.serve(num_jobs, num_tokens)
        used, after = cpu_seconds(self.engine_pid) - cpu, self.steps()
        num_steps = after.num - before.num
        step_ms = (after.seconds - before.seconds) / num_steps * 1e3
        return Round(used / num_jobs / num_tokens * 1e3, step_ms, num_steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=positive, default=400, help="a way and round")
    parser.add_argument("--tokens", type=positive, default=32, help="a job")
    parser.add_argument("--rounds", type=positive, default=5)
    arguments = parser.parse_args()
    with alone() as first, beside() as second:
        ways = (first, beside_a_count(first), second)
        for way in ways:
            way.serve(NUM_WARM_UP, arguments.tokens)
        rounds = [
            [way.measure(arguments.jobs, arguments.tokens) for way in ways] for _ in range(arguments.rounds)
        ]
    report(ways, rounds)


@contextmanager
def alone() -> Iterator[Way]:
    total = Steps(0, 0.0)

    def add(tally: StepTally) -> None:
        nonlocal total
        durations = tally.durations_seconds
        total = Steps(total.num + len(durations), total.seconds + sum(durations))

    def serve(num_jobs: int, num_tokens: int) -> None:
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        ids = [uuid.uuid4().hex for _ in range(num_jobs)]
        runtime.submit(tuple(EngineRequest(id, PROMPT, params) for id in ids)).future.result()

    config = EngineConfig(model=str(builtin.path()), max_num_sequences=64, num_threads=1)
    runtime = ChildRuntime(config, start_seconds=300, stall_seconds=60, on_fatal=print, on_steps=add)
    runtime.start()
    try:
        yield Way("alone", _engine_of(os.getpid()), lambda: total, serve)
    finally:
        runtime.stop()


def beside_a_count(way: Way) -> Way:
    """The same engine, while another process counts."""

    def serve(num_jobs: int, num_tokens: int) -> None:
        counting = subprocess.Popen([sys.executable, "-c", "for _ in iter(int, 1): pass"])
        try:
            way.serve(num_jobs, num_tokens)
        finally:
            counting.kill()
            counting.wait()

    return replace(way, name="beside a count", serve=serve)


@contextmanager
def beside() -> Iterator[Way]:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        stack = RunningStack(Path(folder), environ={"THROUGHLINE_METRICS_PORT": str(port)})
        try:
            stack.wait_until_ready()
            (engine_pid,) = stack.pids_of(ENGINE)
            worker_pid = int(Path(f"/proc/{engine_pid}/stat").read_text().rpartition(")")[2].split()[1])
            yield Way(
                "beside the worker",
                engine_pid,
                lambda: _read_steps(port),
                lambda num_jobs, num_tokens: _drain(stack, worker_pid, num_jobs, num_tokens),
            )
            stack.stop()
        finally:
            stack.kill_everything()


def _drain(stack: RunningStack, worker_pid: int, num_jobs: int, num_tokens: int) -> None:
    """The jobs lie in the queue before the worker may look at it, so that nobody else computes meanwhile."""
    settings = JobsSettings(redis_url=SecretStr(stack.redis_url))
    client, ledgers = connect(settings), [Keys(settings.key_prefix).open(queue) for queue in QUEUES]
    os.kill(worker_pid, signal.SIGSTOP)
    try:
        # In its place: a model whose workers are silent for ALIVE_SECONDS gets no jobs.
        beat_at = time.time() + MAX_SUBMIT_SECONDS
        RedisModelAnnouncer(client, settings).beat(builtin.NAME, WorkerId("stopped"), now=beat_at)
        asyncio.run(_submit(stack.url, num_jobs, num_tokens))
    finally:
        os.kill(worker_pid, signal.SIGCONT)
    wait_until(
        lambda: not any(client.zcard(ledger) for ledger in ledgers),
        timeout_seconds=MAX_DRAIN_SECONDS,
        what="every job is done",
    )
    client.close()


async def _submit(url: str, num_jobs: int, num_tokens: int) -> None:
    body = {
        "model": builtin.NAME,
        "prompt": list(PROMPT),
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    left = iter(range(num_jobs))
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def submit() -> None:
            for _ in left:
                (await client.post("/v1/jobs", json=body)).raise_for_status()

        await asyncio.gather(*(submit() for _ in range(NUM_CLIENTS)))


def _read_steps(port: int) -> Steps:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        found = dict(STEPS.findall(reply.read().decode()))
    return Steps(float(found.get("count", 0)), float(found.get("sum", 0)))


def _engine_of(pid: int) -> int:
    """The process's child that is an engine; there is one."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return next(int(child) for child in children if ENGINE in command_line(int(child)))


def report(ways: tuple[Way, ...], rounds: list[list[Round]]) -> None:
    """Ratios are of one round's values."""
    table = Table("what", "way", "median", "to alone", "to beside a count", "rounds, to alone")
    for figure in fields(Round):
        values = [[getattr(found, figure.name) for found in row] for row in rounds]
        for place, way in enumerate(ways):
            ratios, apart = [row[place] / row[0] for row in values], [row[place] / row[1] for row in values]
            table.add_row(
                figure.metadata["name"],
                way.name,
                f"{statistics.median(row[place] for row in values):.4g}",
                f"{statistics.median(ratios):.3f}",
                f"{statistics.median(apart):.3f}",
                ", ".join(f"{ratio:.3f}" for ratio in ratios),
            )
    Console(width=130).print(
        table, f"load {os.getloadavg()[0]:.1f}, kernels {use_kernels('auto').level or 'plain'}"
    )


if __name__ == "__main__":
    main()
