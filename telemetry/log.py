"""One line a record, for people or for machines, with the ids that lead to the trace.

    2026-11-22T10:15:02.123Z INFO    throughline-api job=7f… trace=4bf9… accepted
    {"time": "2026-11-22T10:15:02.123Z", "level": "INFO", "service": …, "job_id": …, "trace_id": …,
    "message": …}

Nothing here can know what a message says: keeping prompts out of it is the caller's part.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import TextIO

from opentelemetry import trace
from opentelemetry.trace import format_span_id, format_trace_id

from telemetry.errors import SettingsError

_VARIABLE = "THROUGHLINE_LOG_FORMAT"
_job_id: ContextVar[str | None] = ContextVar("throughline_job_id", default=None)


class LogFormat(Enum):
    LINE = "line"
    JSON = "json"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> LogFormat:
        """Raises: SettingsError for a format that is none."""
        value = environ.get(_VARIABLE, "").strip().lower() or cls.LINE.value
        try:
            return cls(value)
        except ValueError as error:
            raise SettingsError(_VARIABLE, value, "must be line or json") from error


def configure_logging(
    service: str,
    format: LogFormat = LogFormat.LINE,
    *,
    level: int = logging.INFO,
    stream: TextIO | None = None,
) -> None:
    """The root logger writes to `stream` (standard error when left out) in this form, and no other way.

    Call it once, before the first record; Celery needs `worker_hijack_root_logger=False` and uvicorn
    `log_config=None` to leave it so.
    """
    handler = _GatheringHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(_JsonFormatter(service) if format is LogFormat.JSON else _LineFormatter(service))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def logged_job(job_id: str) -> AbstractContextManager[None]:
    """Records made inside, in this thread or task and those it awaits, carry the job's id."""
    return _LoggedJob(job_id)


@dataclass(slots=True)
class _LoggedJob:
    job_id: str
    _token: Token[str | None] | None = None

    def __enter__(self) -> None:
        self._token = _job_id.set(self.job_id)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            _job_id.reset(self._token)


class _GatheringHandler(logging.StreamHandler[TextIO]):
    """Writes what is logged in one turn of an event loop when that ends; anything else, and errors, at once.

    Each write lets go of the interpreter, which another busy thread then keeps for a while.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lines: list[str] = []
        self._due_in: asyncio.AbstractEventLoop | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """With the handler's lock held, as `logging` calls it."""
        try:
            self._lines.append(self.format(record) + self.terminator)
            loop = _running_loop()
            if loop is None or record.levelno >= logging.ERROR:
                self.flush()
            elif loop is not self._due_in:
                self._due_in = loop
                loop.call_soon(self.flush)
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        self.acquire()
        try:
            lines, self._lines, self._due_in = self._lines, [], None
            if lines and not self.stream.closed:
                self.stream.write("".join(lines))
            super().flush()
        finally:
            self.release()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class _JsonFormatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": _timestamp(record),
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            **_ids(record),
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class _LineFormatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        ids = _ids(record)
        shown = "".join(
            f"{key.removesuffix('_id')}={ids[key]} " for key in ("job_id", "trace_id") if key in ids
        )
        # A line break in a message would let a client forge lines of its own.
        message = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")
        line = f"{_timestamp(record)} {record.levelname:<7} {self._service} {shown}{message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _timestamp(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


def _ids(record: logging.LogRecord) -> dict[str, str]:
    """The job's id, from `extra` or `logged_job`, and the current span's."""
    ids: dict[str, str] = {}
    job_id = getattr(record, "job_id", None) or _job_id.get()
    if job_id:
        ids["job_id"] = str(job_id)
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        ids["trace_id"] = format_trace_id(span.trace_id)
        ids["span_id"] = format_span_id(span.span_id)
    return ids
