"""The model registry in Redis."""

from __future__ import annotations

import asyncio

import redis

from jobs.keys import Keys
from jobs.model import WorkerId
from jobs.multiplexed import MultiplexedClient
from jobs.redis_connection import store_errors
from jobs.registry import ALIVE_SECONDS, ModelCard, ServedModel
from jobs.settings import JobsSettings


class RedisModelDirectory:
    """`jobs.registry.ModelDirectory` over the client that all requests of the process share."""

    def __init__(self, client: MultiplexedClient, settings: JobsSettings) -> None:
        self._client = client
        self._keys = Keys(settings.key_prefix)

    async def list_models(self, *, now: float) -> list[ServedModel]:
        with store_errors():
            stored = await self._client.call("HGETALL", self._keys.models)  # names and cards in turns
            cards = [ModelCard.model_validate_json(text) for text in stored[1::2]]
            counts = await asyncio.gather(*(self._num_beating(card.name, now) for card in cards))
        return [ServedModel(card, count) for card, count in zip(cards, counts, strict=True)]

    async def tokenizer_json(self, digest: str) -> str | None:
        with store_errors():
            text: str | None = await self._client.call("GET", self._keys.tokenizer(digest))
        return text

    async def _num_beating(self, model: str, now: float) -> int:
        count = await self._client.call("ZCOUNT", self._keys.beats(model), now - ALIVE_SECONDS, "+inf")
        return int(count)


class RedisModelAnnouncer:
    """`jobs.registry.ModelAnnouncer` over a blocking client."""

    def __init__(self, client: redis.Redis, settings: JobsSettings) -> None:
        self._client = client
        self._keys = Keys(settings.key_prefix)

    def announce(self, card: ModelCard, tokenizer_json: str) -> None:
        with store_errors():
            pipeline = self._client.pipeline(transaction=True)
            pipeline.set(self._keys.tokenizer(card.tokenizer_digest), tokenizer_json)
            pipeline.hset(self._keys.models, card.name, card.model_dump_json())
            pipeline.execute()

    def beat(self, model: str, worker: WorkerId, *, now: float) -> None:
        with store_errors():
            pipeline = self._client.pipeline(transaction=False)
            pipeline.zadd(self._keys.beats(model), {worker: now})
            pipeline.zremrangebyscore(self._keys.beats(model), "-inf", now - 60 * ALIVE_SECONDS)
            pipeline.execute()

    def leave(self, model: str, worker: WorkerId) -> None:
        with store_errors():
            self._client.zrem(self._keys.beats(model), worker)
