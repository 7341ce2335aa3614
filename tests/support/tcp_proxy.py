"""A TCP proxy that can misbehave on request, between a process and its Redis.

with TcpProxy(port) as proxy:
    ...                        # redis://127.0.0.1:{proxy.port}/0
    proxy.cut()                # every connection is reset
    proxy.delay(0.1)           # every chunk is late by so much, both ways
    proxy.freeze()             # half-open: accepts and reads, passes nothing on, says nothing
    proxy.heal()               # as if nothing had been; frozen connections are reset
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
from types import TracebackType

_CHUNK_BYTES = 65536
_HANDSHAKE = b"\x16"
"""The first byte of TLS."""


class TcpProxy:
    """Listens on a loopback port from `__enter__` to `__exit__`, in a thread of its own."""

    def __init__(self, target_port: int, *, tls: ssl.SSLContext | None = None) -> None:
        """With `tls` it speaks that, for a target that cannot, to those who begin with it."""
        self._target_port = target_port
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy", daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._delay_seconds = 0.0
        self._is_frozen = False
        self._greetings: set[asyncio.Future[None]] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])

    def __enter__(self) -> TcpProxy:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def cut(self) -> None:
        self._run(self._reset_all())

    def delay(self, seconds: float) -> None:
        self._delay_seconds = seconds

    def freeze(self) -> None:
        self._is_frozen = True

    def heal(self) -> None:
        """A frozen connection has swallowed bytes and can only be reset."""
        self._delay_seconds = 0.0
        if self._is_frozen:
            self._is_frozen = False
            self.cut()

    def _run(self, coroutine: object) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)  # type: ignore[arg-type]

    async def _listen(self) -> None:
        self._listener.listen()
        self._accepting = asyncio.ensure_future(self._accept())

    async def _accept(self) -> None:
        while True:
            accepted, _ = await self._loop.sock_accept(self._listener)
            if self._tls is None:
                await self._greet(accepted, None)
            else:
                self._loop.add_reader(accepted, self._look_at_first_byte, accepted)

    def _look_at_first_byte(self, accepted: socket.socket) -> None:
        self._loop.remove_reader(accepted)
        with contextlib.suppress(OSError):
            is_tls = accepted.recv(1, socket.MSG_PEEK) == _HANDSHAKE
            self._greetings.add(asyncio.ensure_future(self._greet(accepted, self._tls if is_tls else None)))

    async def _greet(self, accepted: socket.socket, tls: ssl.SSLContext | None) -> None:
        reader = asyncio.StreamReader()
        with contextlib.suppress(OSError):  # a client that refuses our certificate, or left
            await self._loop.connect_accepted_socket(
                lambda: asyncio.StreamReaderProtocol(reader, self._serve), accepted, ssl=tls
            )

    async def _close(self) -> None:
        for task in (self._accepting, *self._greetings):
            task.cancel()
        await asyncio.gather(self._accepting, *self._greetings, return_exceptions=True)
        self._listener.close()
        await self._reset_all()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _reset_all(self) -> None:
        for writer in list(self._writers):
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            await self._join(reader, writer)
        finally:
            self._writers.discard(writer)
            self._tasks.discard(task)
            _reset(writer)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            return  # the target is down: the client is reset, as it would be by the target's machine
        self._writers.add(back)
        ways = {
            asyncio.ensure_future(self._copy(reader, back)),
            asyncio.ensure_future(self._copy(there, writer)),
        }
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self._writers.discard(back)
            _reset(back)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(_CHUNK_BYTES):
                if self._delay_seconds:
                    await asyncio.sleep(self._delay_seconds)
                if self._is_frozen:
                    continue
                writer.write(chunk)
                await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN, as a crashed machine's successor would answer."""
    with contextlib.suppress(OSError):
        raw = writer.get_extra_info("socket")
        if raw is not None and raw.fileno() != -1:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
