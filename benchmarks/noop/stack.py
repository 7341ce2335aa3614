"""The processes of a run: one Valkey, our API and workers, bare Celery's worker, the plain list's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks import measure
from jobs.keys import Keys
from jobs.redis_connection import connect
from jobs.settings import JobsSettings
from tests.support.valkey import free_port, running_valkey

ROOT = Path(__file__).resolve().parents[2]
_CELERY_FLAGS = ("--without-mingle", "--without-gossip")


@dataclass(frozen=True, slots=True)
class Process:
    name: str
    popen: subprocess.Popen[bytes]

    def cpu_seconds(self) -> float:
        return measure.cpu_seconds(self.popen.pid)

    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.popen.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def pause(self) -> None:
        self.popen.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.popen.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.resume()
        self.popen.terminate()
        try:
            self.popen.wait(10)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()


@dataclass(frozen=True, slots=True)
class Stack:
    """Everything that runs; `settings` and `bare_settings` see the same server under two prefixes."""

    url: str
    settings: JobsSettings
    bare_settings: JobsSettings
    client: Any
    api: Process
    workers: tuple[Process, ...]
    bare: Process
    plain_list: Process
    valkey_pid: int
    processes: tuple[Process, ...] = field(repr=False)

    def num_in_broker(self, settings: JobsSettings, queues: tuple[str, ...]) -> int:
        """Messages that wait or are held."""
        keys, pipeline = Keys(settings.key_prefix), self.client.pipeline(transaction=False)
        for queue in queues:
            pipeline.llen(keys.broker_queue(queue)[0])
        pipeline.hlen(keys.broker_unacked)
        return sum(pipeline.execute())


@contextmanager
def running_stack(
    *, num_workers: int = 1, token_seconds: float = 0.0, concurrency: int = 80
) -> Iterator[Stack]:
    with ExitStack() as stack:
        server = stack.enter_context(running_valkey())
        environment = {
            **os.environ,
            "THROUGHLINE_REDIS_URL": server.url,
            "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
            "BENCH_TOKEN_SECONDS": repr(token_seconds),
            "BENCH_CONCURRENCY": str(concurrency),
            "THROUGHLINE_MAX_NUM_SEQUENCES": str(concurrency * 4 // 5),
        }
        started: list[Process] = []

        def start(name: str, *argv: str) -> Process:
            process = Process(
                name, start_python(argv, environment, Path(server.url[7:]).parent / f"{name}.log")
            )
            stack.callback(process.end)
            started.append(process)
            return process

        port = free_port()
        workers = tuple(
            start(f"worker{n or ''}", *celery("benchmarks.noop.worker", f"ours{n}"))
            for n in range(num_workers)
        )
        bare = start("bare", *celery("benchmarks.noop.bare", "bare"))
        plain_list = start("list", "-m", "benchmarks.noop.plain_list")
        api = start("api", "-m", "benchmarks.noop.api", "--port", str(port))
        url = f"http://127.0.0.1:{port}"
        settings = JobsSettings(redis_url=server.url)
        client = connect(settings)
        _wait_ready(url, client, settings, num_workers)
        valkey_pid = client.info("server")["process_id"]
        bare_settings = JobsSettings(redis_url=server.url, key_prefix="bare:")
        yield Stack(
            url, settings, bare_settings, client, api, workers, bare, plain_list, valkey_pid, tuple(started)
        )


def celery(app: str, name: str) -> tuple[str, ...]:
    return ("-W", "ignore", "-m", "celery", "-A", app, "worker", "-n", f"{name}@bench", *_CELERY_FLAGS)


def start_python(argv: tuple[str, ...], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, *argv],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )


def _wait_ready(url: str, client: Any, settings: JobsSettings, num_workers: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            is_ready = httpx.get(f"{url}/health/ready", timeout=2).status_code == 200
        except httpx.TransportError:
            is_ready = False
        beating = sum(client.zcard(key) for key in client.scan_iter(f"{settings.key_prefix}beats:*"))
        listening = client.client_list(_type="normal")
        if is_ready and beating >= num_workers and sum("brpop" in c["cmd"] for c in listening) > num_workers:
            return
        time.sleep(0.2)
    raise SystemExit("the stack did not become ready")
