"""Scripts that many attempts call at once, against a real Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from pydantic import SecretStr

from jobs.errors import StoreUnavailable
from jobs.gathered_scripts import GatheredScripts
from jobs.redis_connection import connect
from jobs.settings import JobsSettings
from tests.support.valkey import ValkeyServer, running_valkey

NUM_CALLS = 24
LEASE_END = "1900000000.0"


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    with running_valkey() as server:
        yield server


@pytest.fixture
def client(valkey: ValkeyServer) -> Iterator[redis.Redis]:
    client = connect(JobsSettings(redis_url=SecretStr(valkey.url), socket_timeout_seconds=5.0))
    client.flushdb()
    for number in range(NUM_CALLS):
        client.hset(f"job:{number}", mapping={"lease_token": f"token-{number}", "state": "in_progress"})
    yield client
    client.close()


def renew_all(gathered: GatheredScripts) -> list[asyncio.Task[Any]]:
    """Leases are renewed at once; those with an odd number are another's."""
    renew = gathered.script("renew")

    async def renew_one(number: int) -> Any:
        return await renew([f"job:{number}"], [f"token-{number - number % 2}", LEASE_END])

    return [asyncio.create_task(renew_one(number)) for number in range(NUM_CALLS)]


def is_outcome_of(number: int) -> str:
    return "lost" if number % 2 else "renewed"


def num_reads(client: redis.Redis) -> int:
    """Of the server, this question among them."""
    stats: Any = client.info("stats")
    return int(stats["total_reads_processed"])


async def test_calls_of_one_moment_take_one_round_trip(client: redis.Redis) -> None:
    gathered = GatheredScripts(client)
    await gathered.script("renew")(["job:0"], ["token-0", LEASE_END])
    before = num_reads(client)

    outcomes = await asyncio.gather(*renew_all(gathered))

    assert outcomes == [is_outcome_of(number) for number in range(NUM_CALLS)]
    assert num_reads(client) - before == 1 + 1


async def test_calls_that_come_during_a_round_trip_share_the_next(
    valkey: ValkeyServer, client: redis.Redis
) -> None:
    gathered = GatheredScripts(client)
    await gathered.script("renew")(["job:0"], ["token-0", LEASE_END])
    before = num_reads(client)
    valkey.pause()
    try:
        first = asyncio.ensure_future(gathered.script("renew")(["job:0"], ["token-0", LEASE_END]))
        while gathered._waiting or not gathered._is_under_way:
            await asyncio.sleep(0)
        calls = renew_all(gathered)
        while len(gathered._waiting) < NUM_CALLS:
            await asyncio.sleep(0)
    finally:
        valkey.resume()

    assert await first == "renewed"
    assert await asyncio.gather(*calls) == [is_outcome_of(number) for number in range(NUM_CALLS)]
    assert num_reads(client) - before == 2 + 1


async def test_gathered_calls_are_all_answered_when_the_server_has_forgotten_the_script(
    client: redis.Redis,
) -> None:
    gathered = GatheredScripts(client)
    client.script_flush()
    outcomes = await asyncio.gather(*renew_all(gathered))
    assert outcomes == [is_outcome_of(number) for number in range(NUM_CALLS)]


async def test_gathered_call_fails_alone_when_its_key_is_of_another_kind(client: redis.Redis) -> None:
    client.delete("job:3")
    client.set("job:3", "no hash")
    outcomes = await asyncio.gather(*renew_all(GatheredScripts(client)), return_exceptions=True)
    assert isinstance(outcomes.pop(3), StoreUnavailable)
    assert outcomes == [is_outcome_of(number) for number in range(NUM_CALLS) if number != 3]


async def test_gathered_calls_are_refused_while_the_server_is_away_and_served_afterwards(
    valkey: ValkeyServer, client: redis.Redis
) -> None:
    gathered = GatheredScripts(client)
    valkey.kill()
    refused = await asyncio.gather(*renew_all(gathered), return_exceptions=True)
    assert all(isinstance(error, StoreUnavailable) for error in refused)
    await asyncio.to_thread(valkey.start)
    outcomes = await asyncio.gather(*renew_all(gathered))
    assert outcomes == [is_outcome_of(number) for number in range(NUM_CALLS)]
