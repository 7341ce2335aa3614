"""The clients of the job store in front of a Redis that accepts connections and answers nothing."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import SecretStr

from jobs.errors import StoreUnavailable
from jobs.redis_connection import connect, connect_async, connect_reader, store_errors
from jobs.settings import JobsSettings
from tests.support.valkey import running_valkey

DEADLINE_SECONDS = 20.0
"""Of a few time limits of 0.2 s each; a client that connects while it connects is at it for minutes."""


@pytest.mark.parametrize("kind", ["requests", "reader"])
async def test_first_connection_to_a_hung_redis_gives_up_in_bounded_time(kind: str) -> None:
    with running_valkey() as valkey:
        settings = JobsSettings(redis_url=SecretStr(valkey.url), socket_timeout_seconds=0.2)
        client = (
            connect_async(settings) if kind == "requests" else connect_reader(settings, block_seconds=0.1)
        )
        valkey.pause()
        async with asyncio.timeout(DEADLINE_SECONDS):
            with pytest.raises(StoreUnavailable), store_errors():
                await client.call("GET", "any")
        valkey.resume()
        with store_errors():
            assert await client.call("GET", "any") is None
        await client.aclose()


async def test_first_connection_of_a_worker_to_a_hung_redis_gives_up_in_bounded_time() -> None:
    with running_valkey() as valkey:
        settings = JobsSettings(redis_url=SecretStr(valkey.url), socket_timeout_seconds=0.2)
        client = connect(settings)

        def ask() -> None:
            with store_errors():
                client.get("any")

        valkey.pause()
        asking = asyncio.create_task(asyncio.to_thread(ask))
        try:
            done, _ = await asyncio.wait({asking}, timeout=DEADLINE_SECONDS)
        finally:
            valkey.resume()
            await asyncio.wait({asking})
            client.close()
        assert asking in done
        assert isinstance(asking.exception(), StoreUnavailable)
