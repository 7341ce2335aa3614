"""The connection that all commands of a loop share, against a real Valkey and the ways a connection ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
import redis
from pydantic import SecretStr

from jobs.errors import StoreUnavailable
from jobs.multiplexed import MultiplexedClient
from jobs.redis_connection import connect, connect_async, connect_reader, store_errors
from jobs.settings import JobsSettings
from tests.support.tcp_proxy import TcpProxy
from tests.support.valkey import ValkeyServer, running_valkey

NUM_CALLS = 200
SILENCE_SECONDS = 0.3
LONG_SECONDS = 20.0
"""Only a call that hangs takes so long."""


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    with running_valkey(tcp=True) as server:
        yield server


@pytest.fixture
def server(valkey: ValkeyServer) -> Iterator[redis.Redis]:
    """The server past the proxy."""
    client = connect(JobsSettings(redis_url=SecretStr(valkey.url)))
    client.flushdb()
    yield client
    client.close()


@pytest.fixture
def proxy(valkey: ValkeyServer) -> Iterator[TcpProxy]:
    with TcpProxy(int(valkey.url.rpartition(":")[2].partition("/")[0])) as proxy:
        yield proxy


@pytest.fixture
def settings(proxy: TcpProxy) -> JobsSettings:
    return JobsSettings(redis_url=SecretStr(proxy.url), socket_timeout_seconds=SILENCE_SECONDS)


@pytest.fixture
async def client(settings: JobsSettings) -> AsyncIterator[MultiplexedClient]:
    client = connect_async(settings)
    yield client
    await client.aclose()


@pytest.fixture
async def reader(settings: JobsSettings) -> AsyncIterator[MultiplexedClient]:
    client = connect_reader(settings, block_seconds=2 * LONG_SECONDS)  # its silence is no sign
    yield client
    await client.aclose()


def num_clients(server: redis.Redis) -> int:
    return len(server.client_list(_type="normal")) - 1


async def test_callers_of_one_moment_get_their_own_replies_over_one_connection(
    client: MultiplexedClient, server: redis.Redis
) -> None:
    before = num_clients(server)
    replies = await asyncio.gather(*(client.call("ECHO", number) for number in range(NUM_CALLS)))
    assert replies == [str(number) for number in range(NUM_CALLS)]
    assert num_clients(server) == before + 1


async def test_reply_of_a_caller_that_left_is_nobodys(client: MultiplexedClient) -> None:
    """redis-py closes the connection of a cancelled command; here the others need it."""
    await client.call("PING")
    calls = [asyncio.create_task(client.call("ECHO", number)) for number in range(NUM_CALLS)]
    await asyncio.sleep(0)  # all are written
    for call in calls[::2]:
        call.cancel()
    replies = await asyncio.gather(*calls, return_exceptions=True)
    assert replies[1::2] == [str(number) for number in range(1, NUM_CALLS, 2)]
    assert all(isinstance(reply, asyncio.CancelledError) for reply in replies[::2])


async def test_cancel_that_meets_the_reply_is_not_lost(
    client: MultiplexedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.call("PING")
    asking = asyncio.create_task(client.call("ECHO", "x"))
    await asyncio.sleep(0)
    lane = client._lane
    assert lane is not None
    answer = lane._answer

    def answer_and_cancel(owed: asyncio.Future[object], reply: object) -> None:
        answer(owed, reply)
        asking.cancel()

    monkeypatch.setattr(lane, "_answer", answer_and_cancel)
    await asyncio.wait({asking})
    assert asking.cancelled()


async def test_command_that_met_a_cut_is_sent_again_for_requests(
    client: MultiplexedClient, proxy: TcpProxy
) -> None:
    await client.call("PING")
    proxy.delay(0.05)
    calls = [asyncio.create_task(client.call("ECHO", number)) for number in range(5)]
    await asyncio.sleep(0.01)
    proxy.delay(0.0)
    await asyncio.to_thread(proxy.cut)
    async with asyncio.timeout(LONG_SECONDS):
        assert await asyncio.gather(*calls) == list("01234")


async def test_reader_is_told_of_a_cut_and_reads_on_when_asked_again(
    reader: MultiplexedClient, proxy: TcpProxy, server: redis.Redis
) -> None:
    read = ("XREAD", "BLOCK", 0, "STREAMS", "stream", "$")
    reading = asyncio.create_task(reader.call(*read))
    async with asyncio.timeout(LONG_SECONDS):
        while not server.info("clients")["blocked_clients"]:  # type: ignore[index]
            await asyncio.sleep(0.001)
        await asyncio.to_thread(proxy.cut)
        with pytest.raises(StoreUnavailable), store_errors():
            await reading
        server.xadd("stream", {"a": "b"})
        entries = await reader.call("XREAD", "STREAMS", "stream", "0")
    assert entries[0][1][0][1] == ["a", "b"]


@pytest.mark.parametrize("num_retries", [0, 1])
async def test_server_that_falls_silent_is_given_up_and_asked_again_later(
    settings: JobsSettings, proxy: TcpProxy, num_retries: int
) -> None:
    client = connect_async(settings) if num_retries else connect_reader(settings, block_seconds=0.1)
    await client.call("PING")
    proxy.freeze()
    async with asyncio.timeout(LONG_SECONDS):
        calls = [asyncio.create_task(client.call("ECHO", number)) for number in range(3)]
        await asyncio.wait(calls)
        for call in calls:
            with pytest.raises(StoreUnavailable), store_errors():
                call.result()
        await asyncio.to_thread(proxy.heal)
        assert await client.call("PING") == "PONG"
    await client.aclose()


async def test_idle_connection_is_not_taken_for_a_silent_one(client: MultiplexedClient) -> None:
    await client.call("PING")
    lane = client._lane
    assert lane is not None
    lane._heard_at -= LONG_SECONDS
    lane._look()
    asking = asyncio.create_task(client.call("PING"))
    await asyncio.sleep(0)
    lane._look()  # the reply is owed since this moment, not since the last one
    assert await asking == "PONG"
    assert client._lane is lane


async def test_refusal_is_one_callers_error_and_others_go_on(client: MultiplexedClient) -> None:
    await client.call("SET", "text", "a")
    refused, answered = await asyncio.gather(
        client.call("LPUSH", "text", "b"), client.call("GET", "text"), return_exceptions=True
    )
    assert isinstance(refused, redis.ResponseError)
    assert answered == "a"


async def test_script_that_the_server_forgot_is_told_again(
    client: MultiplexedClient, server: redis.Redis
) -> None:
    watch = client.script("watch")
    for _ in range(2):
        server.script_flush()
        server.hset("job", "state", "queued")
        assert await watch(keys=["job"], args=["api-1"]) == "queued"


async def test_server_that_became_a_replica_is_left_for_a_new_connection(
    client: MultiplexedClient, server: redis.Redis
) -> None:
    """Behind Sentinels the new connection leads to the new primary."""
    await client.call("PING")
    lane = client._lane
    server.replicaof("127.0.0.1", "1")
    try:
        with pytest.raises(StoreUnavailable), store_errors():
            await client.call("SET", "any", "thing")
    finally:
        server.replicaof("NO", "ONE")
    assert await client.call("SET", "any", "thing") == "OK"
    assert client._lane is not lane


async def test_nothing_is_left_when_it_was_closed(settings: JobsSettings, server: redis.Redis) -> None:
    before, client = num_clients(server), connect_async(settings)
    await client.call("PING")
    await client.aclose()
    async with asyncio.timeout(LONG_SECONDS):
        while num_clients(server) > before:
            await asyncio.sleep(0.001)
