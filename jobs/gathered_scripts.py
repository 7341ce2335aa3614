"""Scripts that many attempts call at once, in one round trip.

    attempt 1 ──▶ sends ─────────────▶ ◀─ reply
    attempt 2 ──▶ waits ─┐
    attempt 3 ──▶ waits ─┴─ 2 and 3 in one ─▶ ◀─ replies

The calls come from one event loop. Those of one turn of it leave together; whoever comes while a round trip
is under way shares the next. A thread makes the round trips: a slow server holds up nobody but its callers.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import redis
from redis.exceptions import NoScriptError

from jobs import scripts
from jobs.redis_connection import STORE_ERRORS, as_unavailable

MAX_TOGETHER = 64
"""Calls of one round trip; the first of them waits until the last is answered."""

GatheredScript = Callable[[Sequence[str], Sequence[Any]], Awaitable[Any]]
"""Called with the script's keys and arguments; answers its reply, or raises StoreUnavailable."""


@dataclass(slots=True)
class _Call:
    source: str
    digest: str
    keys: Sequence[str]
    args: Sequence[Any]
    reply: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop

    def answer(self, reply: Any) -> None:
        if self.reply.done():  # its attempt was ended meanwhile
            return
        if isinstance(reply, STORE_ERRORS):
            error = as_unavailable(reply)
            error.__cause__ = reply
            self.reply.set_exception(error)
        elif isinstance(reply, Exception):
            self.reply.set_exception(reply)
        else:
            self.reply.set_result(reply)


class GatheredScripts:
    """To be called in one event loop."""

    def __init__(self, client: redis.Redis) -> None:
        """`client` decodes its replies."""
        self._client = client
        self._sender = ThreadPoolExecutor(1, "store-sender")
        self._waiting: deque[_Call] = deque()
        self._is_under_way = False

    def script(self, name: str) -> GatheredScript:
        """The script `jobs/lua/{name}.lua`.

        A script may have run although its call raised: it must bear being repeated.
        """
        source = scripts.source(name)
        digest = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()

        async def call(keys: Sequence[str], args: Sequence[Any]) -> Any:
            loop = asyncio.get_running_loop()
            call = _Call(source, digest, keys, args, loop.create_future(), loop)
            self._waiting.append(call)
            if not self._is_under_way:
                self._is_under_way = True
                loop.call_soon(self._send_waiting)  # with those that others make before it comes to that
            return await call.reply

        return call

    def _send_waiting(self) -> None:
        calls = [self._waiting.popleft() for _ in range(min(MAX_TOGETHER, len(self._waiting)))]
        self._is_under_way = bool(calls)
        if calls:
            loop = calls[0].loop
            sent = self._sender.submit(self._send, calls)
            sent.add_done_callback(lambda sent: loop.call_soon_threadsafe(self._answer, calls, sent))

    def _answer(self, calls: list[_Call], sent: Future[list[Any]]) -> None:
        self._send_waiting()
        error = sent.exception()
        replies = sent.result() if error is None else [error] * len(calls)
        for call, reply in zip(calls, replies, strict=True):
            call.answer(reply)

    def _send(self, calls: list[_Call]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for call in calls:
            pipeline.evalsha(call.digest, len(call.keys), *call.keys, *call.args)
        replies = pipeline.execute(raise_on_error=False)
        return [
            self._teach(call) if isinstance(reply, NoScriptError) else reply
            for call, reply in zip(calls, replies, strict=True)
        ]

    def _teach(self, call: _Call) -> Any:
        """The server, restarted maybe, knows the script afterwards."""
        try:
            return self._client.eval(call.source, len(call.keys), *call.keys, *call.args)
        except STORE_ERRORS as error:
            return error
