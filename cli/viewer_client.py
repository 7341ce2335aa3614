"""The trace viewer from outside: which spans it holds of a job or a trace, and whether they are all there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from cli.client import JobView
from cli.errors import TraceViewerError
from telemetry import names
from telemetry.errors import SpanFormatError
from telemetry.record import SpanRecord
from telemetry.record_json import from_json

_TIMEOUT_SECONDS = 10.0
_POLL_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Found:
    """What the viewer holds.

    Attributes:
        is_whole: Whether nothing more is to be expected.
        num_forgotten: Spans of whatever trace that made room for newer ones.
    """

    spans: Sequence[SpanRecord]
    is_whole: bool
    num_forgotten: int


class ViewerClient:
    """One connection pool to one viewer. Close it by leaving its `with` block."""

    def __init__(self, url: str) -> None:
        self.url = url
        # Our own port on this machine: a proxy named in the environment is not asked.
        self._http = httpx.Client(base_url=url, timeout=_TIMEOUT_SECONDS, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def of_trace(self, trace_id: str, *, deadline: float) -> Found:
        """Return the spans once no more have come for a moment, or what there is at `deadline`."""
        previous: list[SpanRecord] = []

        def has_settled(spans: Sequence[SpanRecord]) -> bool:
            nonlocal previous
            is_same = bool(spans) and list(spans) == previous
            previous = list(spans)
            return is_same

        return self._wait(lambda: self._read(f"/traces/{quote(trace_id)}"), has_settled, deadline)

    def of_job(self, job: JobView, *, deadline: float) -> Found:
        """Return the spans of the job's traces once they are whole, or what there is at `deadline`."""

        def read() -> tuple[list[SpanRecord], int]:
            spans, num_forgotten = self._read(f"/jobs/{quote(job.id)}/trace")
            if spans or not job.trace_id:
                return spans, num_forgotten
            return self._read(f"/traces/{quote(job.trace_id)}")  # its request, before the job was sent

        return self._wait(read, lambda spans: is_whole(job, spans), deadline)

    def _wait(
        self,
        read: Callable[[], tuple[list[SpanRecord], int]],
        is_enough: Callable[[Sequence[SpanRecord]], bool],
        deadline: float,
    ) -> Found:
        while True:
            spans, num_forgotten = read()
            has_all = is_enough(spans)
            if has_all or time.monotonic() + _POLL_SECONDS > deadline:
                return Found(spans, has_all, num_forgotten)
            time.sleep(_POLL_SECONDS)

    def _read(self, path: str) -> tuple[list[SpanRecord], int]:
        try:
            answer = self._http.get(path)
            answer.raise_for_status()
            content: Any = answer.json()
            return [from_json(span) for span in content["spans"]], int(content["num_evicted"])
        except httpx.TransportError as error:
            raise TraceViewerError(
                f"the trace viewer at {self.url} does not answer ({error}): its stack has ended, and "
                "spans are kept only while it runs; `throughline up --trace-viewer` starts another"
            ) from error
        except (httpx.HTTPStatusError, ValueError, KeyError, TypeError, SpanFormatError) as error:
            raise TraceViewerError(
                f"what answers at {self.url} is no trace viewer of ours: {error}"
            ) from error


def is_whole(job: JobView, spans: Sequence[SpanRecord]) -> bool:
    """Return whether the job has ended and its request, its message and each of its attempts are there."""
    ids = {span.span_id for span in spans}
    own = [span for span in spans if span.attributes.get(names.JOB_ID) == job.id]
    sent = [span for span in own if span.kind == "PRODUCER"]
    # A worker that died has left no span; the next attempt drew one for it.
    num_processed = sum(
        (span.kind == "CONSUMER" or names.JOB_ATTEMPT in span.attributes)
        and names.JOB_HANDED_BACK not in span.attributes
        for span in own
    )
    has_requests = all(span.parent_id is None or span.parent_id in ids for span in sent)
    return job.is_done and bool(sent) and has_requests and num_processed >= job.num_attempts
