"""One handing of a job's message to this worker."""

from __future__ import annotations

from dataclasses import dataclass

from opentelemetry.context import Context

from jobs.model import JobId


@dataclass(slots=True)
class Delivery:
    """The message as it came."""

    id: JobId
    queue: str
    enqueued_at_ns: int | None
    """When the API published it; None for a message without the header."""
    is_redelivered: bool
    creation: Context
    """The trace context that the message carries: its send span's."""
    tag: str = ""
    """By which the broker knows the message while it is held."""
