"""The job store in Redis. All decisions are in `jobs/lua/`; here are their callers, async and blocking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import redis

from jobs import scripts
from jobs.errors import IdempotencyMismatch, QueueFull
from jobs.gathered_scripts import GatheredScripts
from jobs.keys import Keys
from jobs.message import MessageMaker
from jobs.model import Failure, ItemResult, Job, JobId, LeaseToken, NewJob, ReplicaId, WorkerId
from jobs.multiplexed import MultiplexedClient
from jobs.record import (
    JOB_FIELDS,
    item_fields,
    new_record,
    settlement_fields,
    to_claim,
    to_job,
    to_refusal,
    worker_lost_failure_json,
)
from jobs.redis_connection import store_errors
from jobs.settings import JobsSettings
from jobs.states import JobState
from jobs.store import (
    FORGIVEN_LIMIT,
    CancelOutcome,
    Claim,
    ClaimOutcome,
    Created,
    RenewOutcome,
    Reply,
    Settlement,
    SettleOutcome,
)

REPLIES_PER_READ = 500
ITEMS_PER_SCRIPT = 500
"""Lua takes some thousands of arguments at once."""


class RedisSubmissionStore:
    """`jobs.store.SubmissionStore` over the client that all requests of the process share."""

    def __init__(self, client: MultiplexedClient, settings: JobsSettings, messages: MessageMaker) -> None:
        self._client = client
        self._messages = messages
        self._keys = Keys(settings.key_prefix)
        self._ttl = settings.result_ttl_seconds
        self._create = client.script("create")
        self._cancel = client.script("cancel")
        self._watch = client.script("watch")

    async def create(self, job: NewJob, *, max_open: int) -> Created:
        keys, job_key = self._keys, self._keys.job(job.id)
        idempotency = keys.idempotency(job.idempotency_key) if job.idempotency_key else job_key
        fields: list[Any] = [part for pair in new_record(job).items() for part in pair]
        head: list[Any] = [
            keys.prefix,
            job.id,
            repr(job.created_at),
            max_open,
            job.queue,
            job.fingerprint or "",
            self._ttl,
        ]
        message = self._messages.make(job.id, job.queue)
        start_at = "" if job.start_at is None else repr(job.start_at)
        with store_errors():
            reply = await self._create(
                keys=[job_key, keys.open(job.queue), idempotency, keys.broker_queue(job.queue)[0]],
                args=[*head, message.payload, start_at, *fields],
            )
        created = _created(job, reply, max_open)
        if not created.replayed:
            self._messages.tell_sent(message)
        return created

    async def get(self, id: JobId, *, with_result: bool = False) -> Job | None:
        names = [*JOB_FIELDS, "result"] if with_result else [*JOB_FIELDS]
        with store_errors():
            values: Any = await self._client.call("HMGET", self._keys.job(id), *names)
        record = dict(zip(names, values, strict=True))
        return to_job(record) if record["id"] else None

    async def cancel(self, id: JobId, *, now: float) -> CancelOutcome:
        with store_errors():
            reply = await self._cancel(
                keys=[self._keys.job(id)], args=[self._keys.prefix, id, repr(now), self._ttl]
            )
        return CancelOutcome(reply)

    async def watch(self, id: JobId, replica: ReplicaId) -> JobState | None:
        with store_errors():
            state = await self._watch(keys=[self._keys.job(id)], args=[replica])
        return JobState(state) if state else None

    async def forget_replica(self, replica: ReplicaId) -> None:
        with store_errors():
            await self._client.call("DEL", self._keys.replies(replica))

    async def ping(self) -> None:
        with store_errors():
            await self._client.call("PING")

    async def close(self) -> None:
        await self._client.aclose()


class RedisReplyStream:
    """`jobs.store.ReplyStream` over a client that does nothing else, for it blocks."""

    def __init__(self, client: MultiplexedClient, settings: JobsSettings) -> None:
        self._client = client
        self._keys = Keys(settings.key_prefix)

    async def read_replies(self, replica: ReplicaId, after: str, *, block_seconds: float) -> list[Reply]:
        stream, block = self._keys.replies(replica), max(1, int(block_seconds * 1000))
        with store_errors():
            reply = await self._client.call(
                "XREAD", "COUNT", REPLIES_PER_READ, "BLOCK", block, "STREAMS", stream, after
            )
        return [_reply(position, entry) for position, entry in reply[0][1]] if reply else []


class RedisAttemptStore:
    """`jobs.store.AttemptStore` over one blocking client, shared by a worker's event loop and its threads."""

    def __init__(self, client: redis.Redis, settings: JobsSettings) -> None:
        self._client = client
        self._keys = Keys(settings.key_prefix)
        self._ttl = settings.result_ttl_seconds
        self._renew = client.register_script(scripts.source("renew"))
        gathered = GatheredScripts(client)
        self._claim = gathered.script("claim")
        self._settle = gathered.script("settle")
        self._release = gathered.script("release")
        self._alone = gathered.script("alone")
        self._keep = gathered.script("keep")

    async def claim(
        self,
        id: JobId,
        token: LeaseToken,
        worker: WorkerId,
        *,
        now: float,
        lease_seconds: float,
        traceparent: str | None = None,
    ) -> Claim:
        args: list[Any] = [
            self._keys.prefix,
            id,
            token,
            worker,
            repr(now),
            repr(now + lease_seconds),
            self._ttl,
            worker_lost_failure_json(),
            traceparent or "",
            FORGIVEN_LIMIT,
        ]
        outcome, *fields = await self._claim([self._keys.job(id)], args)
        if outcome != ClaimOutcome.CLAIMED:
            return to_refusal(outcome, *fields)
        *fields, items = fields
        return to_claim(*fields, items=items)

    def renew(
        self, held: dict[JobId, LeaseToken], *, now: float, lease_seconds: float
    ) -> dict[JobId, RenewOutcome]:
        if not held:
            return {}
        with store_errors():
            pipeline = self._client.pipeline(transaction=False)
            for id, token in held.items():
                self._renew(
                    keys=[self._keys.job(id)], args=[token, repr(now + lease_seconds)], client=pipeline
                )
            replies = pipeline.execute()
        return {id: RenewOutcome(reply) for id, reply in zip(held, replies, strict=True)}

    async def settle(
        self, id: JobId, token: LeaseToken, settlement: Settlement, *, now: float, message_tag: str = ""
    ) -> SettleOutcome:
        fields: list[Any] = [part for pair in settlement_fields(settlement).items() for part in pair]
        head: list[Any] = [self._keys.prefix, id, token, repr(now), settlement.state.value, self._ttl]
        reply = await self._settle([self._keys.job(id)], [*head, message_tag, *fields])
        return SettleOutcome(reply)

    async def keep(
        self, id: JobId, token: LeaseToken, items: Mapping[int, ItemResult], *, completed: int, failed: int
    ) -> bool:
        keys = [self._keys.job(id), self._keys.items(id)]
        fields = list(item_fields(items).items())
        for start in range(0, len(fields), ITEMS_PER_SCRIPT):
            some = [part for pair in fields[start : start + ITEMS_PER_SCRIPT] for part in pair]
            if not await self._keep(keys, [token, completed, failed, *some]):
                return False
        return True

    async def mark_alone(self, id: JobId, token: LeaseToken) -> bool:
        return bool(await self._alone([self._keys.job(id)], [token]))

    async def release(
        self,
        id: JobId,
        token: LeaseToken,
        *,
        now: float,
        failure: Failure | None = None,
        is_forgiven: bool = False,
        next_attempt_at: float | None = None,
        message_tag: str = "",
    ) -> SettleOutcome:
        args: list[Any] = [self._keys.prefix, id, token, repr(now), self._ttl]
        last = failure.model_dump_json() if failure else ""
        limit = FORGIVEN_LIMIT if is_forgiven else ""
        at = "" if next_attempt_at is None else repr(next_attempt_at)
        reply = await self._release([self._keys.job(id)], [*args, last, limit, at, message_tag])
        return SettleOutcome(reply)

    def read_cancels(self, worker: WorkerId, after: str, *, block_seconds: float) -> list[tuple[str, JobId]]:
        with store_errors():
            reply = self._client.xread(
                {self._keys.cancels(worker): after}, block=max(1, int(block_seconds * 1000))
            )
        return [(position, JobId(entry["id"])) for position, entry in _entries(reply)]

    def close(self) -> None:
        self._client.close()


def _created(job: NewJob, reply: list[Any], max_open: int) -> Created:
    match reply[0]:
        case "created":
            return Created(job.id, replayed=False)
        case "replayed":
            return Created(JobId(reply[1]), replayed=True)
        case "mismatch":
            raise IdempotencyMismatch(f"the idempotency key was used for job {reply[1]} with another body")
        case _:
            raise QueueFull(job.queue, int(reply[1]), max_open)


def _reply(position: str, entry: list[str]) -> Reply:
    """`entry` holds names and values in turns."""
    fields = dict(zip(entry[::2], entry[1::2], strict=True))
    return Reply(position=position, id=JobId(fields["id"]), state=JobState(fields["state"]))


def _entries(reply: Any) -> list[tuple[str, dict[str, str]]]:
    """The entries of the one stream that was read; redis-py answers a list (RESP2) or a dict (RESP3)."""
    if not reply:
        return []
    entries = next(iter(reply.values()))[0] if isinstance(reply, dict) else reply[0][1]
    return list(entries)
