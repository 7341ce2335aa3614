"""How the path scales: workers, models and API replicas added one after another on one Valkey.

    python -m benchmarks scaling [--sections device] [--workers 1 2 4 8] [--jobs 100] [--rounds 3]

What is scaled is the path, so the engines are stand-ins that compute nothing and say so:

drain   an engine that answers at once: what the worker processes can do where only the host limits them
device  an engine that is busy for `--step-ms` a step, as a GPU is, and leaves the host's cores alone: 10 jobs
        at a time and a worker, so each can end 10 / (tokens * step) of them a second; shown against that
api     the same fleet behind 1, 2 and 4 replicas of the API, each client at one of them
idle    what a worker without work costs itself and Valkey

On a machine with few cores jobs/s says what the cores allow, CPU a job what they need: whether that
stays the same as processes are added is what decides about a machine with more. The last table is arithmetic
on these figures, and no measurement.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from benchmarks.measure import positive
from benchmarks.noop.fleet import Fleet, running_fleet
from benchmarks.noop.http_client import HttpConnection
from jobs.clock import SystemClock
from jobs.message import MessageMaker
from jobs.model import JobRequest, NewJob, Prompt, new_job_id
from jobs.queue import create_celery
from jobs.redis_connection import connect_async
from jobs.redis_store import RedisSubmissionStore

SECTIONS = ("drain", "device")
CONCURRENCY = 10
"""Jobs that one worker holds: eight sequences and a quarter more."""
PROMPT = tuple(range(300, 310))
MODELS = ("stand-in-a", "stand-in-b")
REPLICAS = (1, 2, 4)
CLIENTS_A_WORKER = 10
IDLE_SECONDS = 6.0
MAX_OPEN = 10**6
WORKER, VALKEY, API = "worker", "valkey", "api"


@dataclass(frozen=True, slots=True)
class Setting:
    section: str
    num_models: int
    num_workers: int
    num_apis: int = 0


@dataclass(slots=True)
class Line:
    """One setting's rounds; medians are quoted."""

    jobs_per_second: list[float] = field(default_factory=list)
    ideal: list[float] = field(default_factory=list)
    """Of what the engines could do; empty where they do not limit."""
    cpu_ms: dict[str, list[float]] = field(default_factory=dict)
    """A job, by role; when idle a second and a worker."""
    load: list[float] = field(default_factory=list)


Report = dict[Setting, Line]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--models", type=positive, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--workers", type=positive, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--jobs", type=positive, default=100, help="a worker and round")
    parser.add_argument("--step-ms", type=positive, default=10)
    parser.add_argument("--tokens", type=positive, default=80, help="of each answer of the device")
    parser.add_argument("--rounds", type=positive, default=3)
    arguments = parser.parse_args(argv)
    report: Report = {}
    for num_models in arguments.models:
        for section in arguments.sections:
            (measure_drain if section == "drain" else measure_device)(num_models, arguments, report)
    show(report)
    show_capacity(report)


def measure_drain(num_models: int, arguments: argparse.Namespace, report: Report) -> None:
    with running_fleet(concurrency=CONCURRENCY, token_seconds=0.0) as fleet:
        for num_workers in grown(fleet, num_models, arguments.workers):
            setting = Setting("drain", num_models, num_workers)
            line = report.setdefault(setting, Line())
            for _ in range(arguments.rounds):
                drain(fleet, arguments.jobs * num_workers, arguments.tokens, line)
            tell(setting, line)


def measure_device(num_models: int, arguments: argparse.Namespace, report: Report) -> None:
    step_seconds = arguments.step_ms / 1e3
    with running_fleet(concurrency=CONCURRENCY, token_seconds=step_seconds) as fleet:
        for num_workers in grown(fleet, num_models, arguments.workers):
            limit = num_workers * CONCURRENCY / (arguments.tokens * step_seconds)
            setting = Setting("device", num_models, num_workers)
            line = report.setdefault(setting, Line())
            for _ in range(arguments.rounds):
                drain(fleet, arguments.jobs * num_workers, arguments.tokens, line)
            line.ideal = [rate / limit for rate in line.jobs_per_second]
            tell(setting, line)
            setting = Setting("idle", num_models, num_workers)
            rest(fleet, report.setdefault(setting, Line()))
            tell(setting, report[setting])
        for num_apis in REPLICAS:
            fleet.add_apis(num_apis - len(fleet.apis))
            setting = Setting("api", num_models, len(fleet.workers), num_apis)
            line = report.setdefault(setting, Line())
            for _ in range(arguments.rounds):
                ask_apis(fleet, arguments, line)
            line.ideal = [rate / limit for rate in line.jobs_per_second]
            tell(setting, line)


def grown(fleet: Fleet, num_models: int, sizes: Sequence[int]) -> Iterator[int]:
    """Each size in turn, the fleet grown to it: models take turns, and each has a worker."""
    for size in sorted(size for size in sizes if size >= num_models):
        present = len(fleet.workers)
        fleet.add_workers([MODELS[number % num_models] for number in range(present, size)])
        warm_up(fleet)
        yield size


def warm_up(fleet: Fleet) -> None:
    fill(fleet, 5 * len(fleet.workers), num_tokens=1)
    fleet.wait_drained()


def drain(fleet: Fleet, num_jobs: int, num_tokens: int, line: Line) -> None:
    """From a queue that is being filled to an empty one; the filling is this process's own CPU."""
    with measured(fleet, num_jobs, line):
        fill(fleet, num_jobs, num_tokens)
        fleet.wait_drained()


def rest(fleet: Fleet, line: Line) -> None:
    with measured(fleet, round(IDLE_SECONDS * len(fleet.workers)), line):
        time.sleep(IDLE_SECONDS)


@contextmanager
def measured(fleet: Fleet, num_jobs: int, line: Line) -> Iterator[None]:
    before, began = cpu_by_role(fleet), time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    line.jobs_per_second.append(num_jobs / seconds)
    line.load.append(os.getloadavg()[0])
    for role, used in cpu_by_role(fleet).items():
        line.cpu_ms.setdefault(role, []).append((used - before[role]) / num_jobs * 1e3)


def cpu_by_role(fleet: Fleet) -> dict[str, float]:
    return {
        WORKER: sum(process.cpu_seconds() for process in fleet.workers),
        VALKEY: fleet.valkey_seconds(),
        API: sum(process.cpu_seconds() for process in fleet.apis),
    }


def fill(fleet: Fleet, num_jobs: int, num_tokens: int) -> None:
    """Store and publish as the API does, to each model in turn."""
    asyncio.run(store_jobs(fleet, num_jobs, num_tokens))


async def store_jobs(fleet: Fleet, num_jobs: int, num_tokens: int) -> None:
    client = connect_async(fleet.settings)
    messages = MessageMaker(create_celery(fleet.settings), SystemClock())
    store = RedisSubmissionStore(client, fleet.settings, messages)
    queues = fleet.queues
    jobs = [new_job(queues[number % len(queues)], num_tokens) for number in range(num_jobs)]
    for job in jobs:
        await store.create(job, max_open=MAX_OPEN)
    await client.aclose()


def new_job(queue: str, num_tokens: int) -> NewJob:
    model = queue.rpartition(".")[0]
    sampling = {"max_tokens": num_tokens, "temperature": 0.0}
    return NewJob(
        id=new_job_id(),
        request=JobRequest(model=model, prompts=(Prompt(token_ids=PROMPT),), sampling=sampling),
        queue=queue,
        priority="batch",
        created_at=time.time(),
        traceparent=f"00-{random.getrandbits(128):032x}-{random.getrandbits(64):016x}-01",
    )


def ask_apis(fleet: Fleet, arguments: argparse.Namespace, line: Line) -> None:
    """Synchronous completions; as many clients as the workers hold jobs."""
    num_requests = arguments.jobs * len(fleet.workers) // 2
    with measured(fleet, num_requests, line):
        asyncio.run(closed_loop(fleet, num_requests, arguments.tokens))


async def closed_loop(fleet: Fleet, num_requests: int, num_tokens: int) -> None:
    left = iter(range(num_requests))
    models = [queue.rpartition(".")[0] for queue in fleet.queues]

    async def client(number: int) -> None:
        url = fleet.urls[number % len(fleet.urls)]
        body = {"model": models[number % len(models)], "prompt": list(PROMPT), "max_tokens": num_tokens}
        async with HttpConnection(url) as connection:
            for _ in left:
                await connection.post("/v1/completions", body)

    await asyncio.gather(*map(client, range(CLIENTS_A_WORKER * len(fleet.workers))))


def tell(setting: Setting, line: Line) -> None:
    """At once: the whole takes minutes."""
    print(*row(setting, line), flush=True)


def show(report: Report) -> None:
    names = ("section", "models", "workers", "APIs", "jobs/s", "of ideal", "worker ms", "valkey ms", "api ms")
    table = Table(*names, "load", title="CPU ms a job; of the idle: a worker and second")
    for setting, line in report.items():
        table.add_row(*row(setting, line))
    Console(width=120).print(table)


def row(setting: Setting, line: Line) -> tuple[str, ...]:
    return (
        setting.section,
        str(setting.num_models),
        str(setting.num_workers),
        str(setting.num_apis or "-"),
        "-" if setting.section == "idle" else f"{statistics.median(line.jobs_per_second):.1f}",
        f"{statistics.median(line.ideal):.2f}" if line.ideal else "-",
        *(f"{statistics.median(line.cpu_ms[role]):.2f}" for role in (WORKER, VALKEY)),
        f"{statistics.median(line.cpu_ms[API]):.2f}" if setting.num_apis else "-",
        f"{statistics.median(line.load):.1f}",
    )


def show_capacity(report: Report) -> None:
    """What one core carries, from the dearest setting of each section."""
    table = Table("part", "its work", "CPU ms", "one core carries", title="Computed from the figures above")
    parts = (
        ("worker process", "drain", WORKER, "a job", "jobs/s"),
        ("API process", "api", API, "a synchronous completion", "completions/s"),
        ("Redis", "drain", VALKEY, "a job, stored, sent and settled", "jobs/s"),
        ("Redis", "api", VALKEY, "a synchronous completion", "completions/s"),
        ("Redis", "idle", VALKEY, "an idle worker for a second", "idle workers"),
    )
    for part, section, role, work, unit in parts:
        found = [
            statistics.median(line.cpu_ms[role])
            for setting, line in report.items()
            if setting.section == section
        ]
        if not found:
            continue
        dearest = max(found)
        carries = f"{1e3 / dearest:,.0f} {unit}" if dearest else "no limit seen"
        table.add_row(part, work, f"{dearest:.2f}", carries)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
