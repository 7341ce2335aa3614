"""One connection for all commands of an event loop.

    request 1 ──▶ command ─┐                            ┌─▶ reply to 1
    request 2 ──▶ command ─┼─ one write a turn ─▶ … ─▶ ─┼─▶ reply to 2
    request 3 ──▶ command ─┘                            └─▶ reply to 3

The server answers a connection's commands in their order, so nobody waits for another's round trip, and a
caller that leaves is a reply that nobody reads. redis-py's asyncio client gives each command a connection of
its own and a dozen coroutines; here it makes the one (address, TLS, login, Sentinels), and leaves it to us.

Not for commands that block, unless the connection is their caller's alone.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from typing import Any

import redis.asyncio
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from jobs import scripts
from jobs.resp import ReplyParser, pack

RETRY_PAUSE_SECONDS = 0.05
_CUTS = (RedisConnectionError, OSError, TimeoutError)
"""What may have hit a command that the server never saw, or answered in vain."""
_ELSEWHERE = ("READONLY", "LOADING", "MASTERDOWN")
"""Refusals of a server that is not, or not yet, the one to ask."""

Part = str | int | float


class MultiplexedClient:
    """Belongs to one event loop. Connects at the first command, and again after each cut.

    Args:
        connections: makes the connection, with its limit of time for connecting; speaks RESP2.
        silence_seconds: a server that owes an answer and says nothing for so long counts as gone.
        num_retries: how often a command that met a cut is sent again. It may have run: it must bear that.
    """

    def __init__(
        self, connections: redis.asyncio.ConnectionPool, *, silence_seconds: float, num_retries: int
    ) -> None:
        self._pool = connections
        self._connection: Any = None  # redis-py's, whose parts are not all typed
        self._silence_seconds = silence_seconds
        self._num_retries = num_retries
        self._lane: _Lane | None = None
        self._connecting: asyncio.Task[_Lane] | None = None

    async def call(self, *parts: Part) -> Any:
        """The reply to one command: str, int, None, or a list of these.

        Raises:
            redis.exceptions.RedisError, OSError, TimeoutError: as `jobs.redis_connection.store_errors` wants.
        """
        return await self.send(pack(*parts))

    async def send(self, command: bytes) -> Any:
        """As `call`, for a command that is packed already."""
        for remaining in reversed(range(self._num_retries + 1)):
            try:
                lane = self._lane
                if lane is None or lane.is_lost:
                    lane = await self._connect()
                return await lane.ask(command)
            except _CUTS:
                if not remaining:
                    raise
                await asyncio.sleep(RETRY_PAUSE_SECONDS)
        raise AssertionError("unreachable")

    def script(self, name: str) -> MultiplexedScript:
        """The script `jobs/lua/{name}.lua`; it must bear being repeated."""
        return MultiplexedScript(self, scripts.source(name))

    async def aclose(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait({self._connecting})
        if self._lane is not None:
            self._lane.close()
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)
        await self._pool.disconnect()

    async def _connect(self) -> _Lane:
        """One attempt at a time, which all who ask meanwhile share; who is cancelled does not end it."""
        task = self._connecting
        if task is None:
            task = self._connecting = asyncio.get_running_loop().create_task(self._new_lane())
            task.add_done_callback(self._connected)
        return await asyncio.shield(task)

    def _connected(self, task: asyncio.Task[_Lane]) -> None:
        self._connecting = None
        if not task.cancelled() and task.exception() is None:  # else told to those who asked
            self._lane = task.result()

    async def _new_lane(self) -> _Lane:
        if self._connection is None:
            self._connection = self._pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py's
        await self._connection.disconnect(nowait=True)  # what is left of the one before
        await self._connection.connect()
        return _Lane(self._connection._writer.transport, self._silence_seconds)


class MultiplexedScript:
    def __init__(self, client: MultiplexedClient, source: str) -> None:
        self._client = client
        self._source = source
        self._digest = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, *, keys: list[str], args: list[Any]) -> Any:
        try:
            return await self._client.call("EVALSHA", self._digest, len(keys), *keys, *args)
        except NoScriptError:  # a server that was started since; it knows the script afterwards
            return await self._client.call("EVAL", self._source, len(keys), *keys, *args)


class _Lane(asyncio.Protocol):
    """One connection, from its first command of ours to its loss."""

    def __init__(self, transport: Any, silence_seconds: float) -> None:
        """Takes the transport over; nothing is owed on it."""
        self.is_lost = False
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._silence_seconds = silence_seconds
        self._parser = ReplyParser()
        self._outgoing: list[bytes] = []
        self._owed: deque[asyncio.Future[Any]] = deque()
        self._heard_at = 0.0
        self._watch: asyncio.TimerHandle | None = None
        transport.set_protocol(self)
        transport.resume_reading()  # redis-py's stream may have paused it
        if transport.is_closing():
            self._lose(RedisConnectionError("the server closed the connection"))

    def ask(self, command: bytes) -> asyncio.Future[Any]:
        """Its reply; on a lane that is lost, the error."""
        reply: asyncio.Future[Any] = self._loop.create_future()
        if self.is_lost:
            reply.set_exception(RedisConnectionError("the connection was lost"))
            return reply
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(command)
        if not self._owed:
            self._heard_at = self._loop.time()
            if self._watch is None:
                self._watch = self._loop.call_later(self._silence_seconds, self._look)
        self._owed.append(reply)
        return reply

    def close(self) -> None:
        self._lose(RedisConnectionError("the client was closed"))

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        try:
            for reply in self._parser.feed(data):
                self._answer(self._owed.popleft(), reply)
        except (ValueError, IndexError):  # no reply, or one that nobody asked for
            self._lose(RedisConnectionError("the server's answer made no sense"))

    def eof_received(self) -> None:
        self._lose(RedisConnectionError("the server closed the connection"))

    def connection_lost(self, error: Exception | None) -> None:
        self._lose(error or RedisConnectionError("the connection was lost"))

    def _flush(self) -> None:
        commands, self._outgoing = self._outgoing, []
        if not self.is_lost:
            self._transport.write(b"".join(commands))

    def _answer(self, owed: asyncio.Future[Any], reply: Any) -> None:
        if isinstance(reply, ResponseError) and str(reply).startswith(_ELSEWHERE):
            self._lose(reply)
            reply = RedisConnectionError(str(reply))
        if owed.done():  # its caller has left
            return
        if isinstance(reply, Exception):
            owed.set_exception(reply)
        else:
            owed.set_result(reply)

    def _look(self) -> None:
        """Runs while something is owed, and once more."""
        self._watch = None
        if not self._owed or self.is_lost:
            return
        left = self._heard_at + self._silence_seconds - self._loop.time()
        if left > 0:
            self._watch = self._loop.call_later(left, self._look)
        else:
            self._lose(RedisTimeoutError("the server is silent"))

    def _lose(self, error: Exception) -> None:
        """Whoever is owed a reply is told."""
        if self.is_lost:
            return
        self.is_lost = True
        if self._watch is not None:
            self._watch.cancel()
        self._transport.abort()
        while self._owed:
            owed = self._owed.popleft()
            if not owed.done():
                owed.set_exception(RedisConnectionError(f"cut: {type(error).__name__}"))
