"""Four clients that keep asking, whatever happens, and remember what they were promised."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True, slots=True)
class Ask:
    """One request as its client knows it; the client's span is never sent, and the root of the trace."""

    order: Order
    trace_id: str
    span_id: str
    is_sampled: bool
    asked_at: float
    """Unix seconds."""
    ended_at: float
    status: int | None = None
    """None where the connection broke, or never was."""
    job_id: str | None = None


@dataclass
class Log:
    """What the clients saw."""

    asks: list[Ask] = field(default_factory=list)
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


async def place(
    url: str, orders: Sequence[Order], *, tag: str, over_seconds: float = 0.0, sample_ratio: float = 1.0
) -> Log:
    """Return when every order was accepted; the asynchronous ones may still be running.

    Args:
        url: the API's.
        orders: shared out among the clients.
        tag: makes the idempotency keys and the trace ids of this run its own.
        over_seconds: the orders are spread evenly over so long; a client that falls behind hurries.
        sample_ratio: of the requests whose trace is to be kept.
    """
    began = time.monotonic()
    clients = _Clients(tag, sample_ratio)
    queue = iter(enumerate(orders))

    async def ask_on(client: httpx.AsyncClient) -> None:
        for index, order in queue:
            await asyncio.sleep(max(0.0, began + over_seconds * index / len(orders) - time.monotonic()))
            await clients.insist(client, order)

    async with asyncio.TaskGroup() as group:
        for _ in range(NUM_CLIENTS):
            client = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS)
            group.create_task(_with_client(client, ask_on))
    return clients.log


async def _with_client(client: httpx.AsyncClient, ask_on: Any) -> None:
    async with client:
        await asyncio.gather(*(ask_on(client) for _ in range(REQUESTS_AT_ONCE)))


class _Clients:
    """Asks for orders until they are accepted, and keeps the log."""

    def __init__(self, tag: str, sample_ratio: float) -> None:
        self.log = Log()
        self._tag, self._sample_ratio = tag, sample_ratio
        self._random = random.Random(tag)

    async def insist(self, client: httpx.AsyncClient, order: Order) -> None:
        while not await self._ask(client, order):
            await asyncio.sleep(PAUSE_SECONDS)

    async def _ask(self, client: httpx.AsyncClient, order: Order) -> bool:
        """Whether the order was accepted; either way the request is in the log."""
        now = time.time()
        is_sampled = self._random.random() < self._sample_ratio
        trace_id, span_id = f"{self._random.getrandbits(128):032x}", f"{self._random.getrandbits(64):016x}"
        ask = Ask(order, trace_id, span_id, is_sampled, asked_at=now, ended_at=now)
        try:
            reply = await self._post(client, ask)
        except httpx.TransportError as error:
            self._note(ask, why=type(error).__name__)
            return False
        if not reply.is_success:
            self._note(ask, status=reply.status_code, why=_why(reply))
            return False
        answer = _answer(order, reply)
        self._note(ask, status=reply.status_code, job_id=answer.job_id)
        self.log.answers.append(answer)
        return True

    async def _post(self, client: httpx.AsyncClient, ask: Ask) -> httpx.Response:
        headers = {"traceparent": f"00-{ask.trace_id}-{ask.span_id}-{int(ask.is_sampled):02x}"}
        if ask.order.is_sync:
            return await client.post("/v1/completions", json=ask.order.body(), headers=headers)
        headers["Idempotency-Key"] = f"{self._tag}-{ask.order.number}"
        return await client.post("/v1/jobs", json=ask.order.body(), headers=headers)

    def _note(
        self, ask: Ask, *, status: int | None = None, job_id: str | None = None, why: str | None = None
    ) -> None:
        ended = replace(ask, ended_at=time.time(), status=status, job_id=job_id)
        self.log.asks.append(ended)
        if why is not None:
            self.log.refuse(why, ended.ended_at - ended.asked_at)


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
