"""What must hold when the dust has settled. Each function yields the breaches of one claim."""

from __future__ import annotations

import json
import re
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jobs.model import Job
from jobs.record import JOB_FIELDS, to_job
from jobs.states import JobState
from tests.chaos.load import Answer, Key
from tests.chaos.rig import Rig
from tests.support.processes import wait_until
from tests.support.queue_lab import ROOT

ALWAYS_THERE = frozenset({"queues", "models", "tokenizer", "beats", "celery"})
"""Kept for ever, or by kombu; everything else has a time to live once its job has ended."""


def read_jobs(rig: Rig) -> dict[str, Job]:
    """Every job in the store, whoever knows of it."""
    fields = [*JOB_FIELDS, "result"]
    jobs = {}
    for key in rig.client.scan_iter(match=rig.keys.job("*"), count=1000):  # type: ignore[arg-type]  # a pattern
        values: Any = rig.client.hmget(key, fields)
        job = to_job(dict(zip(fields, values, strict=True)))
        jobs[str(job.id)] = job
    return jobs


def promises(answers: Sequence[Answer], jobs: Mapping[str, Job]) -> Iterator[str]:
    """Every accepted job is there and completed; nothing at all is left unfinished."""
    for answer in answers:
        job = jobs.get(answer.job_id)
        if job is None:
            yield f"an accepted job is gone: {answer.job_id}"
        elif job.state is not JobState.COMPLETED:
            reason = job.failure.reason if job.failure else "no reason"
            yield f"an accepted job is {job.state.value}, not completed: {job.id} ({reason})"
    for job in jobs.values():
        if not job.state.is_final:
            yield f"a job is left {job.state.value}: {job.id}"
    doubled = [number for number, count in Counter(a.order.number for a in answers).items() if count > 1]
    if doubled:
        yield f"orders answered twice: {doubled}"


def results(answers: Sequence[Answer], jobs: Mapping[str, Job], texts: Mapping[Key, str]) -> Iterator[str]:
    """One result each, of the same words as in the calm, its tokens counted once."""
    for answer in answers:
        job = jobs.get(answer.job_id)
        if job is None or job.result is None:
            continue  # told by `promises`
        wanted = tuple(texts[key] for key in answer.order.keys)
        stored = tuple(choice.text for item in job.result.items for choice in item.choices)
        num_tokens = answer.order.max_tokens * len(answer.order.prompts)
        if stored != wanted:
            yield f"{job.id}: stored text differs from the calm one"
        if answer.texts is not None and answer.texts != wanted:
            yield f"{job.id}: delivered text differs from the calm one"
        if job.usage is None or job.usage.completion_tokens != num_tokens:
            yield f"{job.id}: usage is not {num_tokens} tokens: {job.usage}"
        if answer.completion_tokens not in (None, num_tokens):
            yield f"{job.id}: delivered usage is not {num_tokens} tokens: {answer.completion_tokens}"


def broker(rig: Rig) -> Iterator[str]:
    """Ledger, queues and unacknowledged messages are empty."""
    client: Any = rig.client
    for queue in client.smembers(rig.keys.queues):
        if count := client.zcard(rig.keys.open(queue)):
            yield f"the ledger of {queue} still has {count} jobs"
        if count := sum(client.llen(key) for key in rig.keys.broker_queue(queue)):
            yield f"the broker still has {count} messages for {queue}"
    for tag, message in client.hgetall(rig.keys.broker_unacked).items():
        id = json.loads(message)[0]["headers"]["id"]
        state, attempts = client.hmget(rig.keys.job(id), "state", "attempts")
        yield f"the message {tag} of {id} ({state}, {attempts} attempts) was never acknowledged"
    if count := client.zcard(rig.keys.broker_unacked_index):
        yield f"{count} messages are still indexed as unacknowledged"


def keys(rig: Rig, *, readme: Path = ROOT / "jobs/README.md") -> Iterator[str]:
    """Every key is one of the documented ones, and those that should end will end."""
    client: Any = rig.client
    documented = re.findall(r"^\| `tl:([a-z]+)", readme.read_text(encoding="utf-8"), re.MULTILINE)
    for key in client.scan_iter(match="*", count=1000):
        kind = key.removeprefix(rig.keys.prefix).partition(":")[0]
        if not key.startswith(rig.keys.prefix) or kind not in documented:
            yield f"no such key in jobs/README.md: {key}"
        elif kind not in ALWAYS_THERE and client.ttl(key) == -1:
            yield f"a key without an end: {key}"


def engines(rig: Rig) -> Iterator[str]:
    """No engine holds a block when nothing runs."""
    for port in rig.metrics_ports:
        used = read_gauge(port, "throughline_engine_kv_cache_blocks_used")
        if used is None:
            yield f"the worker on port {port} tells nothing of its blocks"
        elif used:
            yield f"the engine of the worker on port {port} keeps {used:g} blocks"


def read_gauge(port: int, name: str) -> float | None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        text = reply.read().decode()
    found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    return float(found.group(1)) if found else None


def wait_settled(rig: Rig, *, timeout_seconds: float) -> None:
    """Return when ledger and broker are empty, or the time is over: what is left is told by the checks."""
    with suppress(AssertionError):
        wait_until(lambda: not any(broker(rig)), timeout_seconds=timeout_seconds, what="all settled")


def num_refused_results(rig: Rig) -> int:
    """Results of attempts that had lost their lease, as the workers' logs tell."""
    return sum(text.count("lease lost") for text in rig.logs().values())


def num_failed_exports(rig: Rig) -> int:
    """Batches of spans that a process gave up: each tears traces, and none should be."""
    return sum(
        text.count("Failed to export") + text.count("Gave up on exporting") for text in rig.logs().values()
    )
