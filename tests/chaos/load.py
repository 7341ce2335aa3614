"""Four clients that keep asking, whatever happens, and remember what they were promised."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.chaos.rig import MODEL

NUM_CLIENTS = 4
REQUESTS_AT_ONCE = 8
"""Of one client."""
PAUSE_SECONDS = 0.3
"""Before asking again after a refusal; its Retry-After would be polite, and a gentler drill."""
TIMEOUT_SECONDS = 60.0
MAX_PROMPTS = 8
TOKEN_COUNTS = (4, 16, 48)
SUBJECTS = (
    "Paris is",
    "Rome is",
    "San Francisco is a",
    "The capital of Japan is",
    "Two plus two is",
    "A cat",
)
ENDINGS = ("", " the", " a city", " in")
PROMPTS = tuple(subject + ending for subject, ending in itertools.product(SUBJECTS, ENDINGS))

Key = tuple[str, int]
"""A prompt and a number of tokens: what a greedy completion depends on."""


@dataclass(frozen=True, slots=True)
class Order:
    """One job that a client wants done."""

    number: int
    prompts: tuple[str, ...]
    max_tokens: int
    is_sync: bool

    @property
    def keys(self) -> tuple[Key, ...]:
        return tuple((prompt, self.max_tokens) for prompt in self.prompts)

    @property
    def kind(self) -> str:
        if self.is_sync:
            return "synchronous"
        return "asynchronous" if len(self.prompts) == 1 else "many prompts"

    def body(self) -> dict[str, Any]:
        prompt = self.prompts[0] if len(self.prompts) == 1 else list(self.prompts)
        return {"model": MODEL, "prompt": prompt, "max_tokens": self.max_tokens, **GREEDY}


GREEDY: Mapping[str, Any] = {"temperature": 0, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a 2xx said: a job's id, and at once its texts where the client waited."""

    order: Order
    job_id: str
    texts: tuple[str, ...] | None = None
    completion_tokens: int | None = None


@dataclass
class Log:
    """What the clients saw."""

    answers: list[Answer] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)
    """By status and code, or by the kind of a broken connection."""
    slowest_refusal_seconds: float = 0.0
    """Of those that blame the store; `stopping` comes when a wait is cut short."""

    def refuse(self, why: str, seconds: float) -> None:
        self.refusals[why] += 1
        if why == "503 store_unavailable":
            self.slowest_refusal_seconds = max(self.slowest_refusal_seconds, seconds)


def draw_orders(seed: int, count: int) -> list[Order]:
    """Half asynchronous with one prompt, three in eight synchronous, the rest with many prompts."""
    rng = random.Random(seed)
    orders = []
    for number in range(count):
        kind = rng.choices(("async", "sync", "many"), weights=(50, 38, 12))[0]
        num_prompts = rng.randint(2, MAX_PROMPTS) if kind == "many" else 1
        prompts = tuple(rng.choice(PROMPTS) for _ in range(num_prompts))
        orders.append(Order(number, prompts, rng.choice(TOKEN_COUNTS), is_sync=kind == "sync"))
    return orders


async def place(url: str, orders: Sequence[Order], *, tag: str, over_seconds: float = 0.0) -> Log:
    """Return when every order was accepted; the asynchronous ones may still be running.

    Args:
        url: the API's.
        orders: shared out among the clients.
        tag: makes the idempotency keys of this run its own.
        over_seconds: the orders are spread evenly over so long; a client that falls behind hurries.
    """
    log, began = Log(), time.monotonic()
    queue = iter(enumerate(orders))

    async def ask_on(client: httpx.AsyncClient) -> None:
        for index, order in queue:
            await asyncio.sleep(max(0.0, began + over_seconds * index / len(orders) - time.monotonic()))
            await _insist(client, order, log, tag)

    async with asyncio.TaskGroup() as group:
        for _ in range(NUM_CLIENTS):
            client = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS)
            group.create_task(_with_client(client, ask_on))
    return log


async def _with_client(client: httpx.AsyncClient, ask_on: Any) -> None:
    async with client:
        await asyncio.gather(*(ask_on(client) for _ in range(REQUESTS_AT_ONCE)))


async def _insist(client: httpx.AsyncClient, order: Order, log: Log, tag: str) -> None:
    while True:
        asked_at = time.monotonic()
        try:
            reply = await _ask(client, order, tag)
        except httpx.TransportError as error:
            log.refuse(type(error).__name__, time.monotonic() - asked_at)
        else:
            if reply.is_success:
                log.answers.append(_answer(order, reply))
                return
            log.refuse(_why(reply), time.monotonic() - asked_at)
        await asyncio.sleep(PAUSE_SECONDS)


async def _ask(client: httpx.AsyncClient, order: Order, tag: str) -> httpx.Response:
    if order.is_sync:
        return await client.post("/v1/completions", json=order.body())
    headers = {"Idempotency-Key": f"{tag}-{order.number}"}
    return await client.post("/v1/jobs", json=order.body(), headers=headers)


def _answer(order: Order, reply: httpx.Response) -> Answer:
    if not order.is_sync:
        return Answer(order, reply.json()["id"])
    document = reply.json()
    texts = tuple(choice["text"] for choice in document["choices"])
    return Answer(order, reply.headers["X-Job-Id"], texts, document["usage"]["completion_tokens"])


def _why(reply: httpx.Response) -> str:
    try:
        code = reply.json()["error"]["code"]
    except (ValueError, KeyError, TypeError):
        code = "no error object"
    return f"{reply.status_code} {code}"
