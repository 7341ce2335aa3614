"""Around every request: ids on every reply, a limit on every body, and a reply to what nobody caught."""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
from time import perf_counter
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import NO_TRACE_ID, BodyTooLarge, InternalError, Stopping, error_response
from api.trace_link import TraceLinks
from telemetry.http import current_trace_id

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

_MAX_LENGTH_DIGITS = 20

_logger = logging.getLogger(__name__)


class RequestContext:
    """Outermost of ours, inside the server span. Every reply carries X-Request-Id and X-Trace-Id.

    An error that nobody caught is answered with 500 and logged by its type and place. Its message is left
    out: it may quote what the client sent.
    """

    def __init__(self, app: ASGIApp, *, trace_links: TraceLinks) -> None:
        self._app = app
        self._trace_links = trace_links

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reply = _StampedReply(send, request_id=_request_id(scope))
        try:
            await self._app(scope, receive, reply)
        except asyncio.CancelledError:
            if reply.has_started:
                raise
            # The server stops and waits no longer; another replica, or this one after its restart, will do.
            await error_response(Stopping(), self._trace_links)(scope, receive, reply)
        except ClientDisconnect:
            _logger.info("A client left while sending its body")
        except Exception as error:  # the edge: whatever it is, the client is owed a reply
            _log_failure(error, reply.request_id)
            if reply.has_started:
                raise _AfterReplyStarted(type(error).__name__) from None
            await error_response(InternalError(), self._trace_links)(scope, receive, reply)


class _AfterReplyStarted(RuntimeError):
    """The reply was cut off: the server must close the connection, so that the client can tell."""


class _StampedReply:
    def __init__(self, send: Send, *, request_id: str) -> None:
        self.request_id = request_id
        self.has_started = False
        self._send = send
        self._started_at = perf_counter()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_started = True
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.request_id
            headers["openai-processing-ms"] = str(round((perf_counter() - self._started_at) * 1000))
            if (trace_id := current_trace_id()) != NO_TRACE_ID:
                headers["X-Trace-Id"] = trace_id
        await self._send(message)


class BodyLimit:
    """A body over the limit is answered with 413, at once where its length was announced."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, trace_links: TraceLinks) -> None:
        self._app = app
        self._trace_links = trace_links
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if len(announced) > _MAX_LENGTH_DIGITS or (
            announced.isdecimal() and int(announced) > self._max_body_bytes
        ):
            refusal = error_response(BodyTooLarge(self._max_body_bytes), self._trace_links)
            await refusal(scope, receive, send)
            return
        await self._app(scope, self._counting(receive), send)

    def _counting(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._max_body_bytes:
                    raise BodyTooLarge(self._max_body_bytes)
            return message

        return receive_counted


def _request_id(scope: Scope) -> str:
    """The client's own where it is harmless in logs and headers."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid4().hex


def _log_failure(error: Exception, request_id: str) -> None:
    frames = traceback.format_list(traceback.extract_tb(error.__traceback__))
    _logger.error(
        "Request %s failed with an unexpected %s:\n%s", request_id, type(error).__name__, "".join(frames)
    )
