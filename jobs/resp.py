"""The server's protocol in its second version (RESP2): commands to bytes, bytes to replies.

https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

from __future__ import annotations

from typing import Any

from redis.exceptions import NoScriptError, ResponseError

_ERROR, _INTEGER, _BULK, _ARRAY = b"-:$*"
_ERROR_CLASSES = {"NOSCRIPT": NoScriptError}


def pack(*parts: str | int | float) -> bytes:
    """One command, texts in UTF-8."""
    packed = [b"*%d\r\n" % len(parts)]
    for part in parts:
        data = (part if type(part) is str else str(part)).encode()
        packed.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(packed)


class ReplyParser:
    """Of one connection: replies are taken as their last byte comes."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The replies that `data` completes: str, int, None, lists of these, or a ResponseError.

        Raises:
            ValueError: that is no reply; nothing after it can be read.
        """
        received = self._received
        received += data
        replies: list[Any] = []
        at = 0
        try:
            while at < len(received):
                reply, at = _parse(received, at)
                replies.append(reply)
        except _Incomplete:
            pass
        del received[:at]
        return replies


class _Incomplete(Exception):
    """The rest is still on its way."""


def _parse(received: bytearray, at: int) -> tuple[Any, int]:
    """The reply that begins at `at`, and where it ends."""
    end = received.find(b"\r\n", at)
    if end < 0:
        raise _Incomplete
    kind, after = received[at], end + 2
    if kind == _BULK:
        return _bulk(received, int(received[at + 1 : end]), after)
    if kind == _ARRAY:
        return _array(received, int(received[at + 1 : end]), after)
    if kind == _INTEGER:
        return int(received[at + 1 : end]), after
    text = received[at + 1 : end].decode()
    if kind == _ERROR:
        return _ERROR_CLASSES.get(text.partition(" ")[0], ResponseError)(text), after
    if kind != ord("+"):
        raise ValueError("the server answered something else than RESP2")
    return text, after


def _bulk(received: bytearray, length: int, at: int) -> tuple[str | None, int]:
    if length < 0:
        return None, at
    end = at + length
    if end + 2 > len(received):
        raise _Incomplete
    return received[at:end].decode(), end + 2


def _array(received: bytearray, length: int, at: int) -> tuple[list[Any] | None, int]:
    if length < 0:
        return None, at
    items = []
    for _ in range(length):
        item, at = _parse(received, at)
        items.append(item)
    return items, at
