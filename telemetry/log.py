"""One line a record, for people or for machines, with the ids that lead to the trace.

    2026-11-22T10:15:02.123Z INFO    throughline-api job=7f… trace=4bf9… accepted
    {"time": "2026-11-22T10:15:02.123Z", "level": "INFO", "service": …, "job_id": …, "trace_id": …,
    "message": …}

Nothing here can know what a message says: keeping prompts out of it is the caller's part.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
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
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(_JsonFormatter(service) if format is LogFormat.JSON else _LineFormatter(service))
    logging.basicConfig(level=level, handlers=[handler], force=True)


@contextmanager
def logged_job(job_id: str) -> Iterator[None]:
    """Records made inside, in this thread or task and those it awaits, carry the job's id."""
    token = _job_id.set(job_id)
    try:
        yield
    finally:
        _job_id.reset(token)


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
