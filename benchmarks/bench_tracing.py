"""What tracing costs: jobs/s, tokens/s, CPU and latency with it off, at 10 % and at 100 %.

    throughline bench tracing [--jobs 200] [--clients 16] [--max-tokens 16] [--rounds 5]

Every way is a whole stack of its own (embedded Valkey, API, worker, engine with the built-in model), all of
them started before the first round and then asked in turns, so that a busy spell of the machine hits them
all. A round asks each way for `--jobs` synchronous completions by `--clients` at once (jobs/s, tokens/s,
CPU), then for `--single` of them one after another (latency). Ratios are taken within a round; shown is their
median.

    none     OTEL_SDK_DISABLED: neither spans nor metrics      refused   100 %, nobody listens
    off      no request is sampled; what others compare to     silent    100 %, taken and never answered
    10, 100  a share of the requests, to a healthy collector

The collector is a process that takes batches over gRPC and looks at none: what it does with them is not the
cost of tracing. Client and collector share the machine with the stack, so jobs/s understates what the stack
alone could do; CPU per job is the stack's own (API, worker, engine and Valkey) and the steadier figure. The
engine traces nothing, so what API and worker spend more tells most; ± is a 95 % interval of the rounds' mean.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import NormalDist

import grpc  # type: ignore[import-untyped]  # ships no types
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.measure import cpu_seconds, percentile, positive
from cli.settings import BUILTIN_MODEL
from tests.support.stack import RunningStack, command_line
from tests.support.valkey import free_port

BASE = "off"
PROMPT_TOKEN_IDS = list(range(300, 310))
NUM_WARM_UP = 60
EXPORT_PATH = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
ROLES = {
    "api": "cli api",
    "worker": "workers.main worker",
    "engine": "workers.engines.engine_process",
    "valkey": "valkey-server",
}
TRACING = ("api", "worker")
"""The roles that make spans."""


@dataclass(frozen=True, slots=True)
class Way:
    """A stack's environment, and the name under which it is compared."""

    name: str
    environ: dict[str, str]


@dataclass(slots=True)
class Round:
    """What one way did in one round."""

    jobs_per_second: float
    cpu_ms_per_job: float
    cpu_ms_by_role: dict[str, float]
    latencies_ms: list[float] = field(default_factory=list)

    @property
    def p50_ms(self) -> float:
        return statistics.median(self.latencies_ms)


class Contestant:
    """A running stack and the connections to it."""

    def __init__(self, way: Way, folder: Path) -> None:
        self.way = way
        self.metrics_port = free_port()
        environ = {**way.environ, "THROUGHLINE_METRICS_PORT": str(self.metrics_port)}
        self.stack = RunningStack(folder, environ=environ)

    def cpu_seconds(self) -> dict[str, float]:
        """Spent so far, by role; a process of no role (the supervisor) is left out."""
        spent = dict.fromkeys(ROLES, 0.0)
        for pid in self.stack.pids():
            line = command_line(pid)
            role = next((role for role, part in ROLES.items() if part in line), None)
            if role is not None:
                spent[role] += cpu_seconds(pid)
        return spent

    def spans(self) -> dict[str, float]:
        """Of API and worker: exported, and those that never were."""
        found = {"accepted": 0.0, "failed": 0.0, "dropped": 0.0}
        for url in (f"{self.stack.url}/metrics", f"http://127.0.0.1:{self.metrics_port}/metrics"):
            with urllib.request.urlopen(url, timeout=10) as reply:
                text = reply.read().decode()
            for name, labels, value in re.findall(r"^otel_sdk_(\w+)_total\{(.*)\} (\S+)$", text, re.M):
                is_error = re.search(r'error_type="[^"]', labels) is not None
                if name == "exporter_span_exported":
                    found["failed" if is_error else "accepted"] += float(value)
                elif is_error:
                    found["dropped"] += float(value)
        return found


class Client:
    """One keep-alive connection that asks for completions; as little client as HTTP allows."""

    def __init__(self, url: str, max_tokens: int) -> None:
        self._host, port = url.removeprefix("http://").split(":")
        self._port = int(port)
        body = json.dumps(
            {
                "model": BUILTIN_MODEL,
                "prompt": PROMPT_TOKEN_IDS,
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
        ).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        self._request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def __aenter__(self) -> Client:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def ask(self) -> float:
        """Seconds until the whole reply is there."""
        started = time.perf_counter()
        self._writer.write(self._request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        length = int(re.search(rb"content-length: (\d+)", head, re.I).group(1))  # type: ignore[union-attr]  # always sent
        reply = await self._reader.readexactly(length)
        if status != 200:
            raise SystemExit(f"a completion was answered with {status}: {reply.decode()[:300]}")
        return time.perf_counter() - started


async def ask_many(url: str, *, max_tokens: int, num_clients: int, num_jobs: int) -> list[float]:
    """Closed loop: each client asks again as soon as it is answered. Seconds of each request."""
    seconds: list[float] = []
    left = iter(range(num_jobs))

    async def run() -> None:
        async with Client(url, max_tokens) as client:
            for _ in left:
                seconds.append(await client.ask())

    await asyncio.gather(*(run() for _ in range(num_clients)))
    return seconds


def run_round(contestant: Contestant, arguments: argparse.Namespace) -> Round:
    def ask(num_clients: int, num_jobs: int) -> list[float]:
        return asyncio.run(
            ask_many(
                contestant.stack.url,
                max_tokens=arguments.max_tokens,
                num_clients=num_clients,
                num_jobs=num_jobs,
            )
        )

    before, started = contestant.cpu_seconds(), time.perf_counter()
    ask(arguments.clients, arguments.jobs)
    seconds, after = time.perf_counter() - started, contestant.cpu_seconds()
    by_role = {role: (after[role] - before[role]) * 1e3 / arguments.jobs for role in ROLES}
    latencies = [second * 1e3 for second in ask(1, arguments.single)]
    return Round(arguments.jobs / seconds, sum(by_role.values()), by_role, latencies)


def measure(contestants: list[Contestant], arguments: argparse.Namespace) -> dict[str, list[Round]]:
    """Each round begins with another way, so that none always follows the same one."""
    rounds: dict[str, list[Round]] = {contestant.way.name: [] for contestant in contestants}
    with Progress(console=Console(stderr=True)) as progress:
        warming = progress.add_task("warming up", total=len(contestants))
        for contestant in contestants:
            asyncio.run(
                ask_many(
                    contestant.stack.url, max_tokens=arguments.max_tokens, num_clients=4, num_jobs=NUM_WARM_UP
                )
            )
            progress.advance(warming)
        measuring = progress.add_task("measuring", total=arguments.rounds * len(contestants))
        for number in range(arguments.rounds):
            turn = number % len(contestants)
            for contestant in contestants[turn:] + contestants[:turn]:
                rounds[contestant.way.name].append(run_round(contestant, arguments))
                progress.advance(measuring)
    return rounds


def ways(healthy: str, refused: str, silent: str) -> list[Way]:
    def to(endpoint: str, **more: str) -> dict[str, str]:
        return {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": endpoint, **more}

    ratio = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.1"}
    return [
        Way("none", {"OTEL_SDK_DISABLED": "true"}),
        Way(BASE, to(healthy, OTEL_TRACES_SAMPLER="always_off")),
        Way("10", to(healthy, **ratio)),
        Way("100", to(healthy)),
        Way("refused", to(refused)),
        Way("silent", to(silent)),
    ]


@contextmanager
def black_hole() -> Iterator[str]:
    """Connections are taken by the kernel, and nobody ever reads them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"grpc://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def collector() -> Iterator[str]:
    """A process that says yes to every batch of spans."""
    spawning = get_context("spawn")
    mine, its = spawning.Pipe()
    process = spawning.Process(target=_collect, args=(its,), daemon=True)
    process.start()
    try:
        yield f"grpc://127.0.0.1:{mine.recv()}"
    finally:
        process.terminate()
        process.join()


def _collect(pipe: Connection) -> None:
    def take(request: bytes, context: grpc.ServicerContext) -> bytes:
        return b""

    handler = grpc.method_handlers_generic_handler(
        EXPORT_PATH.split("/")[1], {EXPORT_PATH.split("/")[2]: grpc.unary_unary_rpc_method_handler(take)}
    )
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    pipe.send(port)
    server.wait_for_termination()


@contextmanager
def running(every_way: list[Way]) -> Iterator[list[Contestant]]:
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as root, ExitStack() as exits:
        contestants = []
        for number, way in enumerate(every_way):
            folder = Path(root) / str(number)
            folder.mkdir()
            console.print(f"starting {number + 1} of {len(every_way)}: {way.name}")
            contestant = Contestant(way, folder)
            exits.callback(contestant.stack.kill_everything)
            contestant.stack.wait_until_ready()
            contestants.append(contestant)
        yield contestants


def report(
    contestants: list[Contestant], rounds: dict[str, list[Round]], arguments: argparse.Namespace
) -> None:
    console = Console(width=120)
    console.print(_throughput(rounds, arguments))
    console.print(_latency(rounds))
    console.print(_cpu(rounds))
    for contestant in contestants:
        counts = ", ".join(f"{name} {count:.0f}" for name, count in contestant.spans().items())
        console.print(f"spans, {contestant.way.name}: {counts}")
    console.print(
        f"{arguments.rounds} rounds of {arguments.jobs} jobs by {arguments.clients} clients and of"
        f" {arguments.single} by one, {arguments.max_tokens} tokens each; Python {sys.version.split()[0]},"
        f" load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )


def _throughput(rounds: dict[str, list[Round]], arguments: argparse.Namespace) -> Table:
    title = f"Throughput (ratios: median of the rounds', to {BASE}; the rounds' own in brackets)"
    table = Table("way", "jobs/s", "tokens/s", "ratio", "CPU ms a job", "CPU ratio", title=title)
    for name, own in rounds.items():
        jobs_per_second = statistics.median(turn.jobs_per_second for turn in own)
        table.add_row(
            name,
            f"{jobs_per_second:.1f}",
            f"{jobs_per_second * arguments.max_tokens:.0f}",
            _ratios(rounds, name, lambda turn: turn.jobs_per_second),
            f"{statistics.median(turn.cpu_ms_per_job for turn in own):.2f}",
            _ratios(rounds, name, lambda turn: turn.cpu_ms_per_job),
        )
    return table


def _ratios(rounds: dict[str, list[Round]], name: str, value: Callable[[Round], float]) -> str:
    ratios = [value(own) / value(base) for own, base in zip(rounds[name], rounds[BASE], strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.2f}-{max(ratios):.2f}; {_mean(ratios, '.3f')})"


def _mean(values: Sequence[float], form: str) -> str:
    """With the half width of its 95 % interval; a single round has none."""
    mean = format(statistics.mean(values), form)
    if len(values) < 2:
        return mean
    half = NormalDist().inv_cdf(0.975) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {format(half, form.removeprefix('+'))}"


def _latency(rounds: dict[str, list[Round]]) -> Table:
    title = f"One request at a time (added: median over the rounds of the difference of medians to {BASE})"
    table = Table("way", "p50 ms", "p99 ms", "added ms", "rounds' added ms", title=title)
    for name, own in rounds.items():
        merged = [latency for turn in own for latency in turn.latencies_ms]
        added = [turn.p50_ms - base.p50_ms for turn, base in zip(own, rounds[BASE], strict=True)]
        table.add_row(
            name,
            f"{statistics.median(merged):.1f}",
            f"{percentile(merged, 0.99):.1f}",
            f"{statistics.median(added):+.2f}",
            ", ".join(f"{difference:+.1f}" for difference in added),
        )
    return table


def _cpu(rounds: dict[str, list[Round]]) -> Table:
    title = f"CPU ms a job, by process (added to {BASE}: mean of the rounds' differences)"
    table = Table("way", *ROLES, *(f"{role} added" for role in TRACING), "both added", title=title)
    for name, own in rounds.items():
        medians = (statistics.median(turn.cpu_ms_by_role[role] for turn in own) for role in ROLES)
        added = [
            [
                sum(turn.cpu_ms_by_role[role] - base.cpu_ms_by_role[role] for role in roles)
                for turn, base in zip(own, rounds[BASE], strict=True)
            ]
            for roles in (*((role,) for role in TRACING), TRACING)
        ]
        table.add_row(
            name, *(f"{median:.2f}" for median in medians), *(_mean(each, "+.2f") for each in added)
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=positive, default=200, help="jobs of each way in each round (200)")
    parser.add_argument("--clients", type=positive, default=16, help="clients at once (16)")
    parser.add_argument("--single", type=positive, default=40, help="jobs one at a time, each round (40)")
    parser.add_argument("--max-tokens", type=positive, default=16, help="tokens of each job (16)")
    names = [way.name for way in ways("", "", "")]
    parser.add_argument("--ways", nargs="+", choices=names, default=names, help="all of them, see above")
    parser.add_argument("--rounds", type=positive, default=5, help="(5)")
    parser.add_argument("--model", metavar="FOLDER", help="instead of the built-in model, in bfloat16")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the stacks end with us
    if BASE not in arguments.ways:
        parser.error(f"--ways must hold {BASE}, which the others are compared to")
    with collector() as healthy, black_hole() as silent:
        every_way = ways(healthy, f"grpc://127.0.0.1:{free_port()}", silent)
        chosen = [_serving(way, arguments.model) for way in every_way if way.name in arguments.ways]
        with running(chosen) as contestants:
            rounds = measure(contestants, arguments)
            report(contestants, rounds, arguments)


def _serving(way: Way, folder: str | None) -> Way:
    """The model of the folder answers to the built-in one's name."""
    if folder is None:
        return way
    model = {
        "THROUGHLINE_MODEL": folder,
        "THROUGHLINE_SERVED_MODEL_NAMES": BUILTIN_MODEL,
        "THROUGHLINE_DTYPE": "bfloat16",
    }
    return replace(way, environ={**way.environ, **model})


if __name__ == "__main__":
    main()
