"""Workers of several models and several API replicas on one Valkey, added while it runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks import measure
from benchmarks.noop.stack import ROOT, Process, celery, start_python
from jobs.keys import Keys
from jobs.redis_connection import connect
from jobs.registry import queue_name
from jobs.settings import JobsSettings
from tests.support.processes import wait_until
from tests.support.valkey import free_port, running_valkey

READY_SECONDS = 180.0


class Fleet:
    """What runs so far. Each engine takes `token_seconds` for a step and leaves the host's cores alone."""

    def __init__(
        self, url: str, exits: ExitStack, folder: Path, *, concurrency: int, token_seconds: float
    ) -> None:
        self.settings = JobsSettings(redis_url=url)  # type: ignore[arg-type]  # pydantic makes a secret of it
        self.keys = Keys(self.settings.key_prefix)
        self.client: Any = connect(self.settings)
        self.workers: list[Process] = []
        self.apis: list[Process] = []
        self.urls: list[str] = []
        self._models: list[str] = []
        self._valkey_pid: int = self.client.info("server")["process_id"]
        self._exits, self._folder = exits, folder
        self._environment = {
            **os.environ,
            "THROUGHLINE_REDIS_URL": url,
            "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
            "THROUGHLINE_MAX_NUM_SEQUENCES": str(concurrency * 4 // 5),
            "BENCH_TOKEN_SECONDS": repr(token_seconds),
        }

    @property
    def queues(self) -> list[str]:
        return [queue_name(model, "batch") for model in dict.fromkeys(self._models)]

    def add_workers(self, models: Sequence[str]) -> None:
        """One worker each; return when all of them take jobs."""
        for model in models:
            name = f"worker{len(self.workers)}"
            self._models.append(model)
            self._environment["THROUGHLINE_SERVED_MODEL_NAMES"] = model
            self.workers.append(self._start(name, celery("benchmarks.noop.worker", name)))
        self._wait(self._all_consume, "every worker takes jobs")

    def add_apis(self, count: int) -> None:
        for _ in range(count):
            port = str(free_port())
            self.urls.append(f"http://127.0.0.1:{port}")
            argv = ("-m", "benchmarks.noop.api", "--port", port)
            self.apis.append(self._start(f"api{len(self.apis)}", argv))
        self._wait(lambda: all(map(_is_ready, self.urls)), "every API answers")

    def valkey_seconds(self) -> float:
        return measure.cpu_seconds(self._valkey_pid)

    def num_in_broker(self) -> int:
        pipeline = self.client.pipeline(transaction=False)
        for queue in self.queues:
            pipeline.llen(self.keys.broker_queue(queue)[0])
        pipeline.hlen(self.keys.broker_unacked)
        return int(sum(pipeline.execute()))

    def wait_drained(self) -> None:
        self._wait(lambda: self.num_in_broker() == 0, "every job is done")

    def _all_consume(self) -> bool:
        blocked = sum("brpop" in client["cmd"] for client in self.client.client_list(_type="normal"))
        return blocked >= len(self.workers)

    def _start(self, name: str, argv: tuple[str, ...]) -> Process:
        process = Process(name, start_python(argv, self._environment, self._folder / f"{name}.log"))
        self._exits.callback(process.end)
        return process

    def _wait(self, holds: Callable[[], bool], what: str) -> None:
        wait_until(holds, timeout_seconds=READY_SECONDS, what=f"{what}; see {self._folder}")


@contextmanager
def running_fleet(*, concurrency: int, token_seconds: float) -> Iterator[Fleet]:
    with ExitStack() as exits:
        server = exits.enter_context(running_valkey())
        folder = Path(server.url[7:]).parent
        yield Fleet(server.url, exits, folder, concurrency=concurrency, token_seconds=token_seconds)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=2).status_code == 200
    except httpx.TransportError:
        return False
