"""Scripts that several threads want at once, in one round trip.

    thread 1 ──▶ sends ─────────────▶ ◀─ reply
    thread 2 ──▶ waits ─┐
    thread 3 ──▶ waits ─┴─ 2 sends for both ─▶ ◀─ replies ─▶ 3

Who comes while nothing is under way sends at once; whoever comes meanwhile waits, and the first of them
sends for all. There is no thread and no pause for it: a call that comes alone is not delayed.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis
from redis.exceptions import NoScriptError

from jobs import scripts
from jobs.errors import StoreUnavailable
from jobs.redis_connection import STORE_ERRORS, as_unavailable

MAX_TOGETHER = 64
"""Calls of one round trip; their replies are parsed by one thread while the others wait."""

GatheredScript = Callable[[Sequence[str], Sequence[Any]], Any]
"""Called with the script's keys and arguments; answers its reply, or raises StoreUnavailable."""


@dataclass(slots=True)
class _Call:
    """`gate` is held until the call is answered, or is the one to send."""

    source: str
    digest: str
    keys: Sequence[str]
    args: Sequence[Any]
    gate: threading.Lock = field(default_factory=threading.Lock)
    is_answered: bool = False
    reply: Any = None
    """A failure where it is an exception."""

    def answer(self, reply: Any) -> None:
        self.reply, self.is_answered = reply, True


class GatheredScripts:
    """Safe from any thread, which is what it is for."""

    def __init__(self, client: redis.Redis) -> None:
        """`client` decodes its replies."""
        self._client = client
        self._lock = threading.Lock()
        self._waiting: list[_Call] = []
        self._is_under_way = False

    def script(self, name: str) -> GatheredScript:
        """The script `jobs/lua/{name}.lua`, to be called from any thread.

        A script may have run although its call raised: it must bear being repeated.
        """
        source = scripts.source(name)
        digest = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
        return lambda keys, args: self._run(_Call(source, digest, keys, args))

    def _run(self, call: _Call) -> Any:
        call.gate.acquire()
        with self._lock:
            self._waiting.append(call)
            must_wait, self._is_under_way = self._is_under_way, True
        if must_wait:
            call.gate.acquire()
        if not call.is_answered:
            self._send_waiting()
        if isinstance(call.reply, STORE_ERRORS):
            raise as_unavailable(call.reply) from call.reply
        if isinstance(call.reply, Exception):
            raise call.reply
        return call.reply

    def _send_waiting(self) -> None:
        """The caller's own call is the first of those that wait."""
        with self._lock:
            calls, self._waiting = self._waiting[:MAX_TOGETHER], self._waiting[MAX_TOGETHER:]
        replies: list[Any] = [StoreUnavailable("the call was not made")] * len(calls)
        try:
            replies = self._send(calls)
        except Exception as error:  # told to each of them
            replies = [error] * len(calls)
        finally:
            self._pass_on()
            for call, reply in zip(calls, replies, strict=True):
                call.answer(reply)
                call.gate.release()

    def _pass_on(self) -> None:
        with self._lock:
            self._is_under_way = bool(self._waiting)
            if self._waiting:
                self._waiting[0].gate.release()

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
