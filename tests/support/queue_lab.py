"""A queue with real parts for the workers' tests: one Valkey, real worker processes, a client of the store.

with queue_lab(model_folder) as lab:
    worker = lab.start_worker()
    id = lab.submit(max_tokens=20)
    job = lab.wait_final([id])[0]
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import redis
from pydantic import SecretStr

from jobs.keys import Keys
from jobs.model import Job, JobId, JobRequest, NewJob, Prompt, new_job_id
from jobs.queue import CeleryPublisher, create_celery
from jobs.record import JOB_FIELDS, new_record, to_job
from jobs.redis_connection import connect
from jobs.registry import queue_name
from jobs.settings import JobsSettings
from tests.support.processes import children, wait_until
from tests.support.valkey import ValkeyServer, running_valkey

ROOT = Path(__file__).resolve().parents[2]
MODEL = "lab-model"
START_SECONDS = 120
"""The first import of torch after an install takes long on two busy cores."""


class WorkerProcess:
    """`celery -A workers.main worker`, in a process group of its own."""

    def __init__(self, name: str, environment: dict[str, str], log_path: Path) -> None:
        self.name, self.log_path = name, log_path
        argv = [sys.executable, "-m", "celery", "-A", "workers.main", "worker", "-n", f"{name}@lab"]
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*argv, "--without-mingle", "--without-gossip"],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        wait_until(
            lambda: "ready." in self.log() or self.process.poll() is not None,
            timeout_seconds=START_SECONDS,
            what="the worker is ready",
        )
        assert self.process.poll() is None, self.log()

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def engine_pid(self) -> int:
        found = children(self.process.pid)
        assert len(found) == 1, found
        return found[0]

    def has_engine(self) -> bool:
        return len(children(self.process.pid)) == 1

    def kill(self) -> None:
        """SIGKILL to the worker and, by its own arrangement, the end of its engine."""
        self.process.kill()
        self.process.wait(10)

    def stop(self, timeout_seconds: float = 40) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_seconds)


@dataclass
class QueueLab:
    server: ValkeyServer
    model: str
    folder: Path
    settings: JobsSettings
    client: Any
    environment: dict[str, str] = field(default_factory=dict)
    workers: list[WorkerProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.keys = Keys(self.settings.key_prefix)
        self._publisher = CeleryPublisher(create_celery(self.settings))

    def start_worker(self, *, wait: bool = True, **environment: str) -> WorkerProcess:
        name = f"w{len(self.workers)}"
        worker = WorkerProcess(name, {**self.environment, **environment}, self.folder / f"{name}.log")
        self.workers.append(worker)
        if wait:
            worker.wait_ready()
        return worker

    def submit(
        self,
        *,
        num_prompts: int = 1,
        prompt_length: int = 10,
        lengths: Mapping[int, int] = MappingProxyType({}),
        first_token: int = 5,
        expires_in: float | None = None,
        publish: bool = True,
        max_attempts: int = 3,
        **sampling: Any,
    ) -> JobId:
        """Store and publish a job, as the API does; its prompts differ in their first token.

        `lengths` are those of single prompts, by their place, where they differ from `prompt_length`.
        """
        now = time.time()
        prompts = tuple(
            Prompt(
                token_ids=(
                    first_token + i % 200,
                    *(20 + k % 50 for k in range(lengths.get(i, prompt_length) - 1)),
                )
            )
            for i in range(num_prompts)
        )
        given = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, **sampling}
        job = NewJob(
            id=new_job_id(),
            request=JobRequest(model=self.model, prompts=prompts, sampling=given),
            queue=queue_name(self.model, "batch"),
            priority="batch",
            created_at=now,
            expires_at=None if expires_in is None else now + expires_in,
            max_attempts=max_attempts,
        )
        record = new_record(job)
        self.client.hset(self.keys.job(job.id), mapping=record)
        self.client.zadd(self.keys.open(job.queue), {job.id: now})
        self.client.sadd(self.keys.queues, job.queue)
        if job.expires_at is not None:
            self.client.zadd(self.keys.deadlines, {job.id: job.expires_at})
        if publish:
            self._publisher.publish(job.id, job.queue, enqueued_at_ns=time.time_ns())
        return job.id

    def read(self, id: JobId) -> Job:
        names = [*JOB_FIELDS, "result"]
        return to_job(dict(zip(names, self.client.hmget(self.keys.job(id), names), strict=True)))

    def wait_final(self, ids: Iterable[JobId], timeout_seconds: float = 60) -> list[Job]:
        ids = list(ids)
        wait_until(
            lambda: all(self.read(id).state.is_final for id in ids),
            timeout_seconds=timeout_seconds,
            what=f"all final; the workers said: {[worker.log()[-3000:] for worker in self.workers]}",
        )
        return [self.read(id) for id in ids]

    def wait_state(self, id: JobId, state: str, timeout_seconds: float = 30) -> None:
        wait_until(
            lambda: self.read(id).state == state, timeout_seconds=timeout_seconds, what=f"{id} is {state}"
        )

    def num_held_by_broker(self) -> int:
        """Messages queued or unacknowledged."""
        queues = self.client.smembers(self.keys.queues)
        queued = sum(self.client.llen(key) for queue in queues for key in self.keys.broker_queue(queue))
        return int(queued + self.client.hlen(self.keys.broker_unacked))

    def num_open(self) -> int:
        return sum(len(self.open_ids(queue)) for queue in self.client.smembers(self.keys.queues))

    def open_ids(self, queue: str) -> list[JobId]:
        """The ledger of a queue."""
        return [JobId(id) for id in self.client.zrange(self.keys.open(queue), 0, -1)]


@contextmanager
def queue_lab(model_folder: Path, folder: Path, *, lease_seconds: float = 3.0) -> Iterator[QueueLab]:
    with (
        running_valkey() as server,
        lab_on(server, server.url, model_folder, folder, lease_seconds=lease_seconds) as lab,
    ):
        yield lab


@contextmanager
def lab_on(
    server: ValkeyServer, url: str, model_folder: Path, folder: Path, *, lease_seconds: float = 3.0
) -> Iterator[QueueLab]:
    """A lab whose processes reach the server by any URL that leads there."""
    settings = JobsSettings(redis_url=SecretStr(url), lease_seconds=lease_seconds)
    client: redis.Redis = connect(settings)
    environment = {
        "THROUGHLINE_REDIS_URL": url,
        "THROUGHLINE_LEASE_SECONDS": str(lease_seconds),
        "THROUGHLINE_MODEL": str(model_folder),
        "THROUGHLINE_SERVED_MODEL_NAMES": MODEL,
        "THROUGHLINE_NUM_THREADS": "1",
        "OTEL_SDK_DISABLED": "",
    }
    lab = QueueLab(server, MODEL, folder, settings, client, environment)
    try:
        yield lab
    finally:
        for worker in lab.workers:
            if worker.process.poll() is None:
                worker.kill()
        client.close()


def get_json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=5) as reply:
        return json.loads(reply.read())
