"""The HTTP API from the client's side: submit, wait, read; used by `submit` and `demo`.

What an API answers while it starts, restarts or is full (no connection, 429, 503) is waited out; every other
refusal is an error at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx

from cli.errors import ApiError, ApiUnreachableError

LONG_POLL_SECONDS = 20.0
_HTTP_TIMEOUT_SECONDS = LONG_POLL_SECONDS + 10.0
_MAX_PAUSE_SECONDS = 5.0
_PASSING = frozenset({429, 503})
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as the API showed it; `raw` is the whole object."""

    raw: Mapping[str, Any]

    @property
    def id(self) -> str:
        return str(self.raw["id"])

    @property
    def status(self) -> str:
        return str(self.raw["status"])

    @property
    def is_done(self) -> bool:
        return bool(self.raw["done"])

    @property
    def trace_id(self) -> str:
        return str(self.raw.get("trace_id") or "")

    @property
    def trace(self) -> str:
        """Where its trace can be looked at; empty where the API names no such place."""
        return str((self.raw.get("links") or {}).get("trace") or "")

    @property
    def num_attempts(self) -> int:
        """How often a worker has begun it."""
        return int(self.raw.get("attempts") or 0)

    @property
    def texts(self) -> tuple[str, ...]:
        """The completions, in the order of their index; empty until the job is completed."""
        result = self.raw.get("result") or {}
        return tuple(choice["text"] for choice in result.get("choices", ()))

    @property
    def timings(self) -> Mapping[str, Any]:
        return self.raw.get("timings") or {}

    @property
    def failure(self) -> str:
        """Why the job ended without a result, in words."""
        error = self.raw.get("error") or {}
        return str(error.get("message") or f"the job is {self.status}")


@dataclass(frozen=True, slots=True)
class Completion:
    """What the synchronous endpoint answered."""

    raw: Mapping[str, Any]
    trace_id: str

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(choice["text"] for choice in self.raw.get("choices", ()))


class ApiClient:
    """One connection pool to one API. Close it, or use it as a `with` block."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.url,
            timeout=_HTTP_TIMEOUT_SECONDS,
            # A proxy named in the environment knows nothing of this machine's own ports.
            trust_env=urlsplit(url).hostname not in _LOOPBACK,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def model_names(self) -> tuple[str, ...]:
        """Return the names of the models that are served, canonical ones first."""
        return tuple(model["id"] for model in self._json(self._request("GET", "/v1/models"))["data"])

    def submit(self, body: Mapping[str, Any]) -> JobView:
        """Store and enqueue a job; once this returns it will be run.

        Raises:
            ApiError: The API refused it; nothing was stored.
            ApiUnreachableError: No answer; whether the job was stored is not known.
        """
        return JobView(self._json(self._request("POST", "/v1/jobs", json=body)))

    def read(self, job_id: str, *, wait_seconds: float = 0.0) -> JobView:
        """Return the job as it is once it has ended or the wait is over."""
        return JobView(
            self._json(self._request("GET", f"/v1/jobs/{job_id}", params={"wait": f"{wait_seconds:g}"}))
        )

    def wait(self, job_id: str, *, deadline: float) -> JobView:
        """Return the job once it has ended, or as it is at `deadline` (of `time.monotonic`)."""
        while True:
            left = max(0.0, deadline - time.monotonic())
            read = partial(self.read, job_id, wait_seconds=min(LONG_POLL_SECONDS, left))
            job = self.patiently(read, deadline=deadline)
            if job.is_done or time.monotonic() >= deadline:
                return job

    def complete(self, body: Mapping[str, Any]) -> Completion:
        """Ask the synchronous endpoint, which answers when the job is done."""
        answer = self._request("POST", "/v1/completions", json=body)
        return Completion(self._json(answer), answer.headers.get("X-Trace-Id", ""))

    def patiently(self, ask: Callable[[], Answer], *, deadline: float) -> Answer:
        """Return what `ask` returns, asking again while the API is away, starting or full.

        Raises:
            ApiError: It refused for good, or still refuses at the deadline.
            ApiUnreachableError: It still does not answer at the deadline.
        """
        pause_seconds = 0.25
        while True:
            try:
                return ask()
            except ApiError as error:
                if error.status not in _PASSING:
                    raise
                refusal: ApiError | ApiUnreachableError = error
                pause_seconds = error.retry_after_seconds or pause_seconds
            except ApiUnreachableError as error:
                refusal = error
            if time.monotonic() + pause_seconds > deadline:
                raise refusal
            time.sleep(min(pause_seconds, _MAX_PAUSE_SECONDS))
            pause_seconds *= 2

    def _request(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **more)
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise ApiUnreachableError(
                f"no answer from {self.url}: {reason}; `throughline up` starts a stack"
            ) from error
        if answer.is_error:
            raise _refusal(answer)
        return answer

    def _json(self, answer: httpx.Response) -> Any:
        try:
            return answer.json()
        except ValueError as error:
            raise ApiUnreachableError(
                f"{answer.url} answered something that is no JSON: is it our API?"
            ) from error


def _refusal(answer: httpx.Response) -> ApiError:
    try:
        error = answer.json()["error"]
        message, code = str(error["message"]), str(error.get("code") or "")
        if trace := error.get("trace"):
            message += f"; trace: {trace}"
    except (ValueError, KeyError, TypeError):
        message, code = f"{answer.reason_phrase} from {answer.url}", ""
    return ApiError(
        f"HTTP {answer.status_code}: {message}",
        status=answer.status_code,
        code=code,
        retry_after_seconds=_seconds(answer.headers.get("Retry-After")),
    )


def _seconds(header: str | None) -> float | None:
    try:
        return float(header) if header else None
    except ValueError:  # the header may be a date; the caller's own pause serves then
        return None
