"""The least that speaks HTTP/1.1: the client shares the cores with what is measured."""

from __future__ import annotations

import asyncio
import json
from types import TracebackType
from typing import Any


class HttpConnection:
    """One kept connection; one request at a time."""

    def __init__(self, url: str) -> None:
        self._host, _, port = url.removeprefix("http://").partition(":")
        self._port = int(port)

    async def __aenter__(self) -> HttpConnection:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    async def post(self, path: str, document: dict[str, Any]) -> bytes:
        """The reply's body; any status but a 2xx ends the benchmark."""
        body = json.dumps(document).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status, *headers = (await self._reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        lengths = [line for line in headers if line.lower().startswith(b"content-length:")]
        reply = await self._reader.readexactly(int(lengths[0].split(b":")[1]))
        if not status.startswith(b"HTTP/1.1 2"):
            raise SystemExit(f"{path} answered {status!r}: {reply[:500]!r}")
        return reply
