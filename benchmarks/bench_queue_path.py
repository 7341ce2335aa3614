"""What the queue adds to a synchronous completion, against the engine alone.

    python -m benchmarks.bench_queue_path [--requests 200] [--clients 1 32] [--rounds 3]

Both ways use the built-in model in an engine process of the same configuration, on the same machine, with the
same request. "Direct" hands the request to the engine process and waits for its output; "queue" is POST
/v1/completions of a stack started for this run: HTTP, Valkey, Celery, engine, reply stream. They take turns.
The client's own time (httpx, JSON) counts as the queue's.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.measure import percentile, positive
from engine import builtin
from engine.config import EngineConfig
from engine.sampling import SamplingParams
from tests.support.stack import RunningStack
from workers.engines.child_runtime import ChildRuntime
from workers.engines.protocol import EngineRequest

PROMPT_TOKEN_IDS = tuple(range(300, 310))
MAX_TOKENS = 16
NUM_WARM_UP = 20

Ask = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Sample:
    way: str
    num_clients: int
    seconds: list[float]

    def percentile(self, share: float) -> float:
        """In milliseconds."""
        return percentile(self.seconds, share) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=positive, default=200, help="a client count and way, each round")
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=positive, default=3)
    arguments = parser.parse_args()
    with running_stack() as url, running_engine() as runtime:
        samples = asyncio.run(measure(url, runtime, arguments))
    report(samples, arguments.clients)


async def measure(url: str, runtime: ChildRuntime, arguments: argparse.Namespace) -> list[Sample]:
    limits = httpx.Limits(max_connections=max(arguments.clients))
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        ways: dict[str, Ask] = {"direct": lambda: ask_engine(runtime), "queue": lambda: ask_api(client)}
        for ask in ways.values():
            await run_clients(ask, 1, NUM_WARM_UP)
        return [
            Sample(way, num_clients, await run_clients(ask, num_clients, arguments.requests))
            for _ in range(arguments.rounds)
            for num_clients in arguments.clients
            for way, ask in ways.items()
        ]


async def ask_engine(runtime: ChildRuntime) -> None:
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    generation = runtime.submit((EngineRequest(uuid.uuid4().hex, PROMPT_TOKEN_IDS, params),))
    await asyncio.wrap_future(generation.future)


async def ask_api(client: httpx.AsyncClient) -> None:
    body = {
        "model": builtin.NAME,
        "prompt": list(PROMPT_TOKEN_IDS),
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    (await client.post("/v1/completions", json=body)).raise_for_status()


async def run_clients(ask: Ask, num_clients: int, num_requests: int) -> list[float]:
    """Closed loop: each client asks again as soon as it is answered. Seconds of each request."""
    seconds: list[float] = []
    left = iter(range(num_requests))

    async def client() -> None:
        for _ in left:
            started = time.perf_counter()
            await ask()
            seconds.append(time.perf_counter() - started)

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return seconds


@contextmanager
def running_engine() -> Iterator[ChildRuntime]:
    config = EngineConfig(model=str(builtin.path()), max_num_sequences=64, num_threads=1)
    runtime = ChildRuntime(config, start_seconds=120, stall_seconds=60, on_fatal=print)
    runtime.start()
    try:
        yield runtime
    finally:
        runtime.stop()


@contextmanager
def running_stack() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        stack = RunningStack(Path(folder))
        try:
            stack.wait_until_ready()
            yield stack.url
            stack.stop()
        finally:
            stack.kill_everything()


def report(samples: list[Sample], client_counts: list[int]) -> None:
    table = Table(
        "clients", "way", "p50 ms", "p99 ms", "mean ms", "rounds' p50 ms", title="Synchronous completion"
    )
    for num_clients in client_counts:
        merged = {}
        for way in ("direct", "queue"):
            rounds = [s for s in samples if s.way == way and s.num_clients == num_clients]
            total = Sample(way, num_clients, [second for s in rounds for second in s.seconds])
            merged[way] = total
            table.add_row(
                str(num_clients),
                way,
                f"{total.percentile(0.5):.1f}",
                f"{total.percentile(0.99):.1f}",
                f"{statistics.mean(total.seconds) * 1e3:.1f}",
                ", ".join(f"{s.percentile(0.5):.1f}" for s in rounds),
            )
        added = [
            merged["queue"].percentile(share) - merged["direct"].percentile(share) for share in (0.5, 0.99)
        ]
        table.add_row(str(num_clients), "[bold]added[/]", f"{added[0]:.1f}", f"{added[1]:.1f}", "", "")
    Console().print(table)


if __name__ == "__main__":
    main()
