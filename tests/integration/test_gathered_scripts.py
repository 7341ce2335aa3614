"""Scripts that many threads call at once, against a real Valkey."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import redis
from pydantic import SecretStr

from jobs.errors import StoreUnavailable
from jobs.gathered_scripts import GatheredScripts
from jobs.redis_connection import connect
from jobs.settings import JobsSettings
from tests.support.processes import wait_until
from tests.support.valkey import ValkeyServer, running_valkey

NUM_THREADS = 24
LEASE_END = "1900000000.0"


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    with running_valkey() as server:
        yield server


@pytest.fixture
def client(valkey: ValkeyServer) -> Iterator[redis.Redis]:
    client = connect(JobsSettings(redis_url=SecretStr(valkey.url), socket_timeout_seconds=5.0))
    client.flushdb()
    for number in range(NUM_THREADS):
        client.hset(f"job:{number}", mapping={"lease_token": f"token-{number}", "state": "in_progress"})
    yield client
    client.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        yield threads


def renew_all(threads: ThreadPoolExecutor, gathered: GatheredScripts) -> list[Future[Any]]:
    """Every thread renews a lease; those with an odd number do not hold it."""
    renew = gathered.script("renew")

    def renew_one(number: int) -> Any:
        return renew([f"job:{number}"], [f"token-{number - number % 2}", LEASE_END])

    return [threads.submit(renew_one, number) for number in range(NUM_THREADS)]


def is_outcome_of(number: int) -> str:
    return "lost" if number % 2 else "renewed"


def test_gathered_calls_take_two_round_trips_when_they_come_during_one(
    valkey: ValkeyServer, client: redis.Redis, threads: ThreadPoolExecutor
) -> None:
    gathered = GatheredScripts(client)
    gathered.script("renew")(["job:0"], ["token-0", LEASE_END])
    before = client.info("stats")["total_reads_processed"]
    valkey.pause()
    try:
        calls = renew_all(threads, gathered)
        wait_until(
            lambda: len(gathered._waiting) == NUM_THREADS - 1, timeout_seconds=10, what="all to gather"
        )
    finally:
        valkey.resume()
    outcomes = [call.result(10) for call in calls]
    num_reads = client.info("stats")["total_reads_processed"] - before
    assert outcomes == [is_outcome_of(number) for number in range(NUM_THREADS)]
    assert num_reads == 2 + 1  # and this question's own


def test_gathered_calls_are_all_answered_when_the_server_has_forgotten_the_script(
    client: redis.Redis, threads: ThreadPoolExecutor
) -> None:
    gathered = GatheredScripts(client)
    client.script_flush()
    outcomes = [call.result(10) for call in renew_all(threads, gathered)]
    assert outcomes == [is_outcome_of(number) for number in range(NUM_THREADS)]


def test_gathered_call_fails_alone_when_its_key_is_of_another_kind(
    client: redis.Redis, threads: ThreadPoolExecutor
) -> None:
    client.delete("job:3")
    client.set("job:3", "no hash")
    calls = renew_all(threads, GatheredScripts(client))
    assert isinstance(calls[3].exception(10), StoreUnavailable)
    others = [number for number in range(NUM_THREADS) if number != 3]
    assert [calls[number].result(10) for number in others] == [is_outcome_of(number) for number in others]


def test_gathered_calls_are_refused_while_the_server_is_away_and_served_afterwards(
    valkey: ValkeyServer, client: redis.Redis, threads: ThreadPoolExecutor
) -> None:
    gathered = GatheredScripts(client)
    valkey.kill()
    refused = [call.exception(30) for call in renew_all(threads, gathered)]
    assert all(isinstance(error, StoreUnavailable) for error in refused)
    valkey.start()
    outcomes = [call.result(30) for call in renew_all(threads, gathered)]
    assert outcomes == [is_outcome_of(number) for number in range(NUM_THREADS)]
