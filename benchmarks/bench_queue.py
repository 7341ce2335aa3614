"""What the queue costs: the real API, Valkey and worker around an engine that computes nothing.

    python -m benchmarks queue [--sections drain sync …] [--clients 32] [--jobs 1000] [--rounds 3]

In the same run, in turns, on the same server: Celery alone with the features that ours has (late
acknowledgement, task events, OpenTelemetry), and a plain Redis list that promises nothing.

drain   jobs/s of one worker process that finds its queue full; CPU of it a job
sync    POST /v1/completions while an engine answers after 250 to 750 ms: the time beyond that
submit  POST /v1/jobs from clients that pause as long
flood   the same two without any pause: what all processes together can do on this machine
items   prompts/s of jobs with 64 prompts each, through the API
memory  of the server for a queued job, of the API for a waiting client
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import redis.asyncio
from kombu.transport import redis as redis_transport
from rich.console import Console
from rich.table import Table

from benchmarks.measure import percentile, positive
from benchmarks.noop import plain_list
from benchmarks.noop.http_client import HttpConnection
from benchmarks.noop.stack import Process, Stack, running_stack
from engine import builtin
from jobs import broker_channel
from jobs.clock import SystemClock
from jobs.keys import Keys
from jobs.message import MessageMaker
from jobs.model import JobRequest, NewJob, Prompt, new_job_id
from jobs.queue import create_celery
from jobs.redis_connection import connect_async
from jobs.redis_store import RedisSubmissionStore
from jobs.registry import queue_name

SECTIONS = ("drain", "sync", "submit", "flood", "items", "memory")
PROMPT = tuple(range(300, 310))
TOKEN_SECONDS = 0.01
QUEUE = queue_name(builtin.NAME, "batch")
QUEUES = (QUEUE, queue_name(builtin.NAME, "interactive"))
PROMPTS_A_JOB = 64
NUM_WARM_UP = 100
MAX_OPEN = 10**6


@dataclass(slots=True)
class Figures:
    """One line of the report: a value a round, the median is quoted."""

    section: str
    way: str
    what: str
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Report:
    figures: dict[tuple[str, str, str], Figures] = field(default_factory=dict)

    def add(self, section: str, way: str, what: str, value: float) -> None:
        key = (section, way, what)
        self.figures.setdefault(key, Figures(*key)).values.append(value)

    def show(self) -> None:
        table = Table("section", "way", "what", "median", "rounds", title=f"load {os.getloadavg()[0]:.1f}")
        for line in self.figures.values():
            rounds = ", ".join(f"{value:.4g}" for value in line.values)
            table.add_row(line.section, line.way, line.what, f"{statistics.median(line.values):.4g}", rounds)
        Console(width=130).print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--clients", type=positive, default=32)
    parser.add_argument("--jobs", type=positive, default=1000, help="a way and round")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--workers", type=positive, default=1)
    arguments = parser.parse_args(argv)
    report = Report()
    measures: dict[str, Callable[[Stack, argparse.Namespace, Report], None]] = {
        "drain": drain,
        "flood": flood,
        "items": items,
        "memory": memory,
        "sync": sync,
        "submit": submit,
    }
    instant = [name for name in arguments.sections if name not in ("sync", "submit")]
    paced = [name for name in arguments.sections if name in ("sync", "submit")]
    for names, token_seconds in ((instant, 0.0), (paced, TOKEN_SECONDS)):
        if names:
            with running_stack(num_workers=arguments.workers, token_seconds=token_seconds) as stack:
                warm_up(stack)
                for _ in range(arguments.rounds):
                    for name in names:
                        measures[name](stack, arguments, report)
    report.show()


def warm_up(stack: Stack) -> None:
    for fill in (fill_ours, fill_bare, fill_list):
        fill(stack, NUM_WARM_UP)
    wait_drained(stack)
    asyncio.run(closed_loop(stack.url, 4, NUM_WARM_UP, complete, pauses=False))


def drain(stack: Stack, arguments: argparse.Namespace, report: Report) -> None:
    ways: dict[str, tuple[tuple[Process, ...], Callable[[Stack, int], None]]] = {
        "ours": (stack.workers, fill_ours),
        "bare Celery": ((stack.bare,), fill_bare),
        "plain list": ((stack.plain_list,), fill_list),
    }
    for way, (processes, fill) in ways.items():
        for process in processes:
            process.pause()
        fill(stack, arguments.jobs)
        cpu = cpu_seconds(processes)
        for process in processes:
            process.resume()
        started = time.perf_counter()
        wait_drained(stack)
        seconds = time.perf_counter() - started
        report.add("drain", way, "jobs/s", arguments.jobs / seconds)
        report.add("drain", way, "worker CPU ms a job", (cpu_seconds(processes) - cpu) / arguments.jobs * 1e3)


def fill_ours(stack: Stack, num_jobs: int) -> None:
    asyncio.run(submit_jobs(stack, num_jobs))


async def submit_jobs(stack: Stack, num_jobs: int) -> None:
    client = connect_async(stack.settings)
    messages = MessageMaker(create_celery(stack.settings), SystemClock())
    store = RedisSubmissionStore(client, stack.settings, messages)
    for _ in range(num_jobs):
        await store.create(new_job(), max_open=MAX_OPEN)
    await client.aclose()


def new_job() -> NewJob:
    sampling = {"max_tokens": 16, "temperature": 0.0}
    request = JobRequest(model=builtin.NAME, prompts=(Prompt(token_ids=PROMPT),), sampling=sampling)
    parent = f"00-{random.getrandbits(128):032x}-{random.getrandbits(64):016x}-01"
    return NewJob(
        id=new_job_id(),
        request=request,
        queue=QUEUE,
        priority="batch",
        created_at=time.time(),
        traceparent=parent,
    )


def fill_bare(stack: Stack, num_jobs: int) -> None:
    broker_channel.use(redis_transport.Channel)  # kombu's own
    app = create_celery(stack.bare_settings)
    headers = {"traceparent": f"00-{random.getrandbits(128):032x}-{random.getrandbits(64):016x}-01"}
    with app.producer_or_acquire() as producer:
        for _ in range(num_jobs):
            app.send_task(
                "bare.nothing",
                (new_job_id(),),
                queue="bare",
                ignore_result=True,
                headers=headers,
                producer=producer,
            )


def fill_list(stack: Stack, num_jobs: int) -> None:
    body = {"client": "none", "prompt": PROMPT, "sampling": {"max_tokens": 16}}
    for _ in range(num_jobs):
        stack.client.lpush(plain_list.QUEUE, json.dumps({**body, "id": new_job_id()}))


def wait_drained(stack: Stack) -> None:
    while (
        stack.num_in_broker(stack.settings, QUEUES)
        or stack.num_in_broker(stack.bare_settings, ("bare",))
        or stack.client.llen(plain_list.QUEUE)
    ):
        time.sleep(0.005)
    stack.client.delete(plain_list.ANSWERS + "none")


def cpu_seconds(processes: Sequence[Process]) -> float:
    return sum(process.cpu_seconds() for process in processes)


Ask = Callable[[HttpConnection, random.Random], Awaitable[float]]
"""Answers how many seconds it took, the engine's left out."""


async def complete(connection: HttpConnection, draw: random.Random) -> float:
    num_tokens = draw.randint(25, 75)
    started = time.perf_counter()
    await connection.post("/v1/completions", body(num_tokens))
    return time.perf_counter() - started - num_tokens * TOKEN_SECONDS


async def complete_at_once(connection: HttpConnection, draw: random.Random) -> float:
    started = time.perf_counter()
    await connection.post("/v1/completions", body(16))
    return time.perf_counter() - started


async def submit_one(connection: HttpConnection, draw: random.Random) -> float:
    started = time.perf_counter()
    await connection.post("/v1/jobs", body(16))
    return time.perf_counter() - started


def body(num_tokens: int, num_prompts: int = 1) -> dict[str, object]:
    prompt = list(PROMPT) if num_prompts == 1 else [list(PROMPT)] * num_prompts
    return {"model": builtin.NAME, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0}


async def closed_loop(
    url: str, num_clients: int, num_requests: int, ask: Ask, *, pauses: bool
) -> list[float]:
    """Each client asks again when it was answered, after a pause of 250 to 750 ms if it makes any."""
    seconds: list[float] = []
    left = iter(range(num_requests))

    async def client(number: int) -> None:
        draw = random.Random(number)
        async with HttpConnection(url) as connection:
            await asyncio.sleep(number / num_clients / 2)  # else all of them ask at once, again and again
            for _ in left:
                seconds.append(await ask(connection, draw))
                if pauses:
                    await asyncio.sleep(draw.uniform(0.25, 0.75))

    await asyncio.gather(*map(client, range(num_clients)))
    return seconds


def add_latency(report: Report, section: str, way: str, seconds: list[float]) -> None:
    report.add(section, way, "p50 ms", percentile(seconds, 0.5) * 1e3)
    report.add(section, way, "p99 ms", percentile(seconds, 0.99) * 1e3)


def sync(stack: Stack, arguments: argparse.Namespace, report: Report) -> None:
    cpu = {process.name: process.cpu_seconds() for process in stack.processes}
    for num_clients in sorted({1, arguments.clients}):
        num_requests = arguments.jobs if num_clients > 1 else max(20, arguments.jobs // 20)
        found = asyncio.run(closed_loop(stack.url, num_clients, num_requests, complete, pauses=False))
        add_latency(report, "sync", f"ours, {num_clients} clients", found)
    num_all = arguments.jobs + max(20, arguments.jobs // 20)
    for process in (stack.api, *stack.workers):
        used = process.cpu_seconds() - cpu[process.name]
        report.add("sync", f"ours, {process.name}", "CPU ms a request", used / num_all * 1e3)
    found = asyncio.run(ask_list(stack, arguments.clients, arguments.jobs))
    add_latency(report, "sync", f"plain list, {arguments.clients} clients", found)


async def ask_list(stack: Stack, num_clients: int, num_requests: int) -> list[float]:
    """Push, and wait for the answer; clients pause, for this engine answers at once."""
    client: redis.asyncio.Redis = redis.asyncio.Redis.from_url(
        stack.settings.redis_url.get_secret_value(), max_connections=2 * num_clients
    )
    seconds: list[float] = []
    left = iter(range(num_requests))

    async def one(number: int) -> None:
        draw = random.Random(number)
        await asyncio.sleep(number / num_clients / 2)
        for _ in left:
            started = time.perf_counter()
            job = {"id": new_job_id(), "client": str(number), "prompt": PROMPT}
            await client.lpush(plain_list.QUEUE, json.dumps(job))
            await client.brpop([plain_list.ANSWERS + str(number)], timeout=5)
            seconds.append(time.perf_counter() - started)
            await asyncio.sleep(draw.uniform(0.25, 0.75))

    await asyncio.gather(*map(one, range(num_clients)))
    await client.aclose()
    return seconds


def submit(stack: Stack, arguments: argparse.Namespace, report: Report) -> None:
    found = asyncio.run(closed_loop(stack.url, arguments.clients, arguments.jobs, submit_one, pauses=True))
    add_latency(report, "submit", "ours", found)
    add_latency(report, "submit", "bare Celery", publish_bare(stack, arguments))
    wait_drained(stack)


def publish_bare(stack: Stack, arguments: argparse.Namespace) -> list[float]:
    """`send_task` in a thread a client, with the same pauses."""
    broker_channel.use(redis_transport.Channel)
    app = create_celery(stack.bare_settings)
    app.conf.broker_pool_limit = arguments.clients
    seconds: list[float] = []
    left = iter(range(arguments.jobs))

    def client(number: int) -> None:
        draw = random.Random(number)
        time.sleep(number / arguments.clients / 2)
        for _ in left:
            started = time.perf_counter()
            app.send_task("bare.nothing", (new_job_id(),), queue="bare", ignore_result=True)
            seconds.append(time.perf_counter() - started)
            time.sleep(draw.uniform(0.25, 0.75))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(arguments.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds


def flood(stack: Stack, arguments: argparse.Namespace, report: Report) -> None:
    for way, ask in (("completions", complete_at_once), ("jobs", submit_one)):
        processes = (stack.api, *stack.workers)
        cpu = {process.name: process.cpu_seconds() for process in processes}
        started = time.perf_counter()
        found = asyncio.run(closed_loop(stack.url, arguments.clients, arguments.jobs, ask, pauses=False))
        asked = time.perf_counter() - started
        wait_drained(stack)
        report.add("flood", way, "requests/s", arguments.jobs / asked)
        report.add("flood", way, "jobs/s until drained", arguments.jobs / (time.perf_counter() - started))
        add_latency(report, "flood", way, found)
        for process in processes:
            used = process.cpu_seconds() - cpu[process.name]
            report.add("flood", way, f"{process.name} CPU ms a job", used / arguments.jobs * 1e3)


def items(stack: Stack, arguments: argparse.Namespace, report: Report) -> None:
    num_jobs = max(8, arguments.jobs // 10)

    async def ask(connection: HttpConnection, draw: random.Random) -> float:
        await connection.post("/v1/jobs", body(16, PROMPTS_A_JOB))
        return 0.0

    processes = (stack.api, *stack.workers)
    cpu = {process.name: process.cpu_seconds() for process in processes}
    started = time.perf_counter()
    asyncio.run(closed_loop(stack.url, 4, num_jobs, ask, pauses=False))
    wait_drained(stack)
    num_items = num_jobs * PROMPTS_A_JOB
    report.add("items", "ours", "items/s", num_items / (time.perf_counter() - started))
    for process in processes:
        used = process.cpu_seconds() - cpu[process.name]
        report.add("items", "ours", f"{process.name} CPU ms an item", used / num_items * 1e3)


def memory(stack: Stack, arguments: argparse.Namespace, report: Report) -> None:
    for way, processes, fill in (
        ("ours", stack.workers, fill_ours),
        ("bare Celery", (stack.bare,), fill_bare),
    ):
        for process in processes:
            process.pause()
        before = stack.client.info("memory")["used_memory"]
        fill(stack, arguments.jobs)
        used = stack.client.info("memory")["used_memory"] - before
        report.add("memory", way, "server bytes a queued job", used / arguments.jobs)
        for process in processes:
            process.resume()
        wait_drained(stack)
    asyncio.run(hold_waiters(stack, min(arguments.jobs, 500), report))


async def hold_waiters(stack: Stack, num_waiters: int, report: Report) -> None:
    """Clients that wait while no worker runs."""
    for process in stack.workers:
        process.pause()
    before = stack.api.resident_bytes()
    waiting = [asyncio.create_task(wait_once(stack.url)) for _ in range(num_waiters)]
    while num_open(stack) < num_waiters:
        await asyncio.sleep(0.05)
    report.add(
        "memory", "ours", "API bytes a waiting client", (stack.api.resident_bytes() - before) / num_waiters
    )
    for process in stack.workers:
        process.resume()
    await asyncio.gather(*waiting)


def num_open(stack: Stack) -> int:
    """Of the ledger: a paused worker has one message that is in no list of the broker's."""
    keys = Keys(stack.settings.key_prefix)
    return sum(stack.client.zcard(keys.open(queue)) for queue in QUEUES)


async def wait_once(url: str) -> None:
    async with HttpConnection(url) as connection:
        await connection.post("/v1/completions", body(16))


if __name__ == "__main__":
    main()
