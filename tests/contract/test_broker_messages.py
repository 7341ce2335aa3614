"""The broker's messages as our scripts handle them, in kombu's own layout."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import pytest

from jobs.clock import SystemClock
from jobs.errors import StoreUnavailable
from jobs.keys import Keys
from jobs.ledger import Ledger
from jobs.message import MessageMaker
from jobs.model import Failure, JobId, LeaseToken, NewJob, WorkerId, new_job_id
from jobs.queue import ENQUEUED_AT_HEADER, CeleryPublisher, create_celery
from jobs.redis_connection import connect, connect_async
from jobs.redis_store import RedisAttemptStore, RedisSubmissionStore
from jobs.schedule import RedisSchedule
from jobs.settings import JobsSettings
from jobs.store import SettleOutcome
from tests.support.job_factory import NOW, completed, new_job
from tests.support.valkey import valkey_server
from workers.broker.channel import MessageTaker

FIRST, SECOND = "model.interactive", "model.batch"


@dataclass
class Broker:
    settings: JobsSettings
    client: Any

    def __post_init__(self) -> None:
        self.keys = Keys(self.settings.key_prefix)
        app = create_celery(self.settings)
        self._publisher = CeleryPublisher(app)
        self._messages = MessageMaker(app, SystemClock())
        self._taker = MessageTaker(self.client, self.keys)

    def publish(self, queue: str, count: int) -> list[JobId]:
        ids = [new_job_id() for _ in range(count)]
        for id in ids:
            self._publisher.publish(id, queue, enqueued_at_ns=1)
        return ids

    def create(self, *jobs: NewJob) -> None:
        """As the API does it: each job and its message in one act."""

        async def create_all() -> None:
            async with aclosing(connect_async(self.settings)) as client:
                store = RedisSubmissionStore(client, self.settings, self._messages)
                for job in jobs:
                    await store.create(job, max_open=10)

        asyncio.run(create_all())

    def take(self, *, max_more: int) -> list[str]:
        """Pop one message of FIRST as kombu does, and more with it; the job ids, in the order of delivery."""
        raw = self.client.rpop(self.keys.broker_queue(FIRST)[0])
        message = json.loads(raw)
        tag = message["properties"]["delivery_tag"]
        more = self._taker.take(tag, json.dumps([message, "", FIRST]), [SECOND, FIRST], max_more=max_more)
        return [message["headers"]["id"], *(json.loads(body)["headers"]["id"] for _, body in more)]

    async def claimed(self, store: RedisAttemptStore) -> tuple[JobId, LeaseToken, str]:
        """A job that a worker has at work: its id, lease token and its message's delivery tag."""
        job, token = new_job(queue=FIRST), LeaseToken("ours")
        await asyncio.to_thread(self.create, job)
        await store.claim(job.id, token, WorkerId("w"), now=NOW, lease_seconds=9)
        self.take(max_more=0)
        (tag,) = self.held()
        return job.id, token, tag

    def held(self) -> dict[str, list[Any]]:
        """By delivery tag: message, exchange and routing key, from which kombu restores."""
        entries = self.client.hgetall(self.keys.broker_unacked)
        assert set(entries) == set(self.client.zrange(self.keys.broker_unacked_index, 0, -1))
        return {tag: json.loads(entry) for tag, entry in entries.items()}

    def num_queued(self, queue: str) -> int:
        return int(self.client.llen(self.keys.broker_queue(queue)[0]))


@pytest.fixture
def broker() -> Iterator[Broker]:
    with valkey_server() as url:
        settings = JobsSettings(redis_url=url)
        yield Broker(settings, connect(settings))


def test_taken_messages_are_held_in_kombus_layout_when_more_are_taken_than_were_popped(
    broker: Broker,
) -> None:
    ids = broker.publish(FIRST, 4)

    taken = broker.take(max_more=2)

    assert taken == ids[:3]
    assert broker.num_queued(FIRST) == 1
    held = broker.held()
    assert {message["headers"]["id"] for message, _, _ in held.values()} == set(taken)
    for tag, (message, exchange, routing_key) in held.items():
        info = message["properties"]["delivery_info"]
        assert (tag, routing_key) == (message["properties"]["delivery_tag"], FIRST)
        assert exchange in ("", info["exchange"])


def test_message_of_a_created_job_has_kombus_own_layout(broker: Broker) -> None:
    """Any worker can take it, and any kombu restore it."""
    job, published = new_job(queue=FIRST), broker.publish(FIRST, 1)[0]
    broker.create(job)

    theirs, ours = (json.loads(broker.client.rpop(broker.keys.broker_queue(FIRST)[0])) for _ in range(2))

    assert (ours["headers"]["id"], theirs["headers"]["id"]) == (job.id, published)
    assert base64.b64decode(ours["body"]) == base64.b64decode(theirs["body"]).replace(
        published.encode(), job.id.encode()
    )
    for message, id in ((ours, job.id), (theirs, published)):
        assert message["headers"].pop(ENQUEUED_AT_HEADER)
        assert message["properties"].pop("delivery_tag")
        del message["body"]
        assert id in json.dumps(message)
    assert json.dumps(ours).replace(job.id, published) == json.dumps(theirs)


@pytest.mark.parametrize(
    ("refuse", "allow"),
    [
        (["CONFIG", "SET", "maxmemory", "1mb"], ["CONFIG", "SET", "maxmemory", "0"]),
        (["REPLICAOF", "127.0.0.1", "1"], ["REPLICAOF", "NO", "ONE"]),
        (["ACL", "SETUSER", "default", "-lpush"], ["ACL", "SETUSER", "default", "+lpush"]),
    ],
    ids=["full", "read-only", "no right to push"],
)
def test_redis_that_refuses_a_job_keeps_nothing_of_it(
    broker: Broker, refuse: list[str], allow: list[str]
) -> None:
    """A script is not undone where it fails, so what may be refused must be its first word."""
    job = new_job(queue=FIRST, idempotency_key="k", fingerprint="f", expires_at=NOW + 60)

    broker.client.execute_command(*refuse)
    with pytest.raises(StoreUnavailable):
        broker.create(job)
    left = broker.client.keys("*")
    broker.client.execute_command(*allow)

    assert left == []
    broker.create(job)
    assert broker.num_queued(FIRST) == 1


def test_queues_take_turns_when_more_is_taken(broker: Broker) -> None:
    first, second = broker.publish(FIRST, 3), broker.publish(SECOND, 3)

    assert broker.take(max_more=3) == [first[0], second[0], first[1], second[1]]


def test_nothing_more_is_taken_when_there_is_no_room(broker: Broker) -> None:
    ids = broker.publish(FIRST, 2)

    assert broker.take(max_more=0) == ids[:1]
    assert broker.num_queued(FIRST) == 1


async def test_settling_removes_the_message_when_it_decides_and_leaves_it_when_refused(
    broker: Broker,
) -> None:
    store = RedisAttemptStore(broker.client, broker.settings)
    id, token, tag = await broker.claimed(store)

    refused = await store.settle(id, LeaseToken("another's"), completed(), now=NOW, message_tag=tag)
    assert (refused, list(broker.held())) == (SettleOutcome.LOST, [tag])
    settled = await store.settle(id, token, completed(), now=NOW, message_tag=tag)
    assert (settled, broker.held()) == (SettleOutcome.SETTLED, {})


async def test_message_of_a_job_that_waits_is_kept_and_comes_back_as_it_was_but_redelivered(
    broker: Broker,
) -> None:
    store, schedule = (
        RedisAttemptStore(broker.client, broker.settings),
        RedisSchedule(broker.client, broker.settings),
    )
    id, token, tag = await broker.claimed(store)
    ((held, _, _),) = broker.held().values()
    behind = broker.publish(FIRST, 1)
    crash = Failure(reason="engine_crashed", message="signal 9", retryable=True)

    await store.release(id, token, now=NOW, failure=crash, next_attempt_at=NOW + 5, message_tag=tag)
    waiting = (broker.held(), broker.num_queued(FIRST))
    ledger = Ledger(broker.client, broker.settings)
    lost = ledger.lost_jobs(now=NOW + 60)
    schedule.advance(now=NOW + 5)

    assert waiting == ({}, 1)
    assert lost == [], "a job that waits is not lost"
    assert broker.num_queued(FIRST) == 2
    back = json.loads(broker.client.rpop(broker.keys.broker_queue(FIRST)[0]))
    assert back["headers"]["id"] != behind[0], "it was in the queue before"
    assert back["properties"]["delivery_info"].pop("redelivered") is True
    assert back == held


@pytest.mark.parametrize("by_api", [True, False])
def test_task_sent_events_arrive_together_when_several_jobs_are_sent(broker: Broker, by_api: bool) -> None:
    """Celery's own receiver, as Flower has it, reads what was gathered."""
    app = create_celery(broker.settings)
    heard: list[str] = []

    def hear(event: dict[str, Any]) -> None:
        heard.append(event["uuid"])
        receiver.should_stop = len(heard) == 3

    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"task-sent": hear})
        listening = receiver.itercapture(limit=None, timeout=10, wakeup=False)
        next(listening)  # subscribed
        if by_api:
            jobs = [new_job(queue=FIRST) for _ in range(3)]
            broker.create(*jobs)
            ids = [job.id for job in jobs]
        else:
            ids = broker.publish(FIRST, 3)
        for _ in listening:
            pass

    assert heard == ids
    assert broker.num_queued(FIRST) == 3
