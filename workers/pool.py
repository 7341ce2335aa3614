"""A Celery pool for tasks that wait on one engine.

Celery's threads pool cannot stop a running task: revoke with terminate, time limits and soft shutdown all
end in NotImplementedError. Here each task gets a handle, given to Celery in place of a process id, and
whatever the task waits on can be ended early through it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import wait as wait_for_futures
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any, TypeVar

from billiard.exceptions import SoftTimeLimitExceeded
from celery.concurrency.base import apply_target
from celery.concurrency.thread import ApplyResult, TaskPool

T = TypeVar("T")

_thread = threading.local()


class JobStopped(BaseException):
    """Leave the task without a result: Celery has already decided what becomes of it."""


class TaskHandle:
    """One running task, as whoever wants to end it sees it. Safe from any thread."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._lock = threading.Lock()
        self._future: Future[Any] | None = None
        self._ended_by: BaseException | None = None

    def end(self, error: BaseException) -> None:
        """The task's wait raises `error`, now or when it begins; the first call wins."""
        with self._lock:
            if self._ended_by is not None:
                return
            self._ended_by = error
            future = self._future
        if future is not None:
            _resolve(future, error)

    def wait(
        self, future: Future[T], *, meanwhile: Callable[[], None] | None = None, every_seconds: float = 1.0
    ) -> T:
        """Block on the engine; a terminate, a time limit or a shutdown ends the wait early.

        `meanwhile` is called every so often until then; what it raises ends the wait too.

        Raises:
            JobStopped: the task was terminated or the worker shuts down.
            SoftTimeLimitExceeded: by Celery's soft time limit.
        """
        with self._lock:
            self._future = future
            early = self._ended_by
        if early is not None:
            _resolve(future, early)
        while meanwhile is not None and not wait_for_futures([future], every_seconds).done:
            meanwhile()
        return future.result()


def _resolve(future: Future[Any], error: BaseException) -> None:
    with suppress(InvalidStateError):  # the engine answered in the same instant; its answer stands
        future.set_exception(error)


def current_handle() -> TaskHandle:
    """The handle of the task that runs in this thread; a loose one outside the pool."""
    handle: TaskHandle | None = getattr(_thread, "handle", None)
    return handle if handle is not None else TaskHandle(0)


class EnginePool(TaskPool):  # type: ignore[misc]  # celery is untyped
    """Threads that wait; as many as jobs may be held at once.

    Celery's soft shutdown sleeps its whole timeout inside a signal handler, with the event loop and so all
    acknowledgements standing still. Instead, a warm shutdown (SIGTERM) ends here: what runs may finish for
    `grace_seconds`, then it is stopped and given back.
    """

    grace_seconds = 25.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._handles: dict[int, TaskHandle] = {}
        self._numbers = itertools.count(1)
        self._idle = threading.Condition()

    def on_apply(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        callback: Callable[..., Any] | None = None,
        accept_callback: Callable[..., Any] | None = None,
        timeout_callback: Callable[..., Any] | None = None,
        soft_timeout: float | None = None,
        timeout: float | None = None,
        **_: Any,
    ) -> ApplyResult:
        handle = TaskHandle(next(self._numbers))
        self._handles[handle.number] = handle

        def run() -> None:
            limits = self._limits(handle, timeout_callback, soft_timeout, timeout)
            with self._running(handle), limits:
                apply_target(
                    target,
                    args,
                    kwargs,
                    callback,
                    accept_callback,
                    pid=handle.number,
                    propagate=(JobStopped,),
                    monotonic=monotonic,
                )

        return ApplyResult(self.executor.submit(run))

    def on_stop(self) -> None:
        self.executor.shutdown(wait=False, cancel_futures=True)
        deadline = monotonic() + self.grace_seconds
        with self._idle:
            while self._handles and monotonic() < deadline:
                self._idle.wait(deadline - monotonic())
            remaining = list(self._handles.values())
        for handle in remaining:
            handle.end(JobStopped("the worker shuts down"))
        super().on_stop()

    def on_terminate(self) -> None:
        self.grace_seconds = 0.0
        self.on_stop()

    def terminate_job(self, pid: int, signal: Any = None) -> None:
        """End the task that was accepted under the handle number `pid`."""
        if handle := self._handles.get(pid):
            handle.end(JobStopped("terminated"))

    @contextmanager
    def _running(self, handle: TaskHandle) -> Iterator[None]:
        _thread.handle = handle
        try:
            with suppress(JobStopped):
                yield
        finally:
            _thread.handle = None
            with self._idle:
                self._handles.pop(handle.number, None)
                self._idle.notify_all()

    @contextmanager
    def _limits(
        self,
        handle: TaskHandle,
        timeout_callback: Callable[..., Any] | None,
        soft_seconds: float | None,
        hard_seconds: float | None,
    ) -> Iterator[None]:
        """Timers for Celery's soft and hard time limits, where any are set."""

        def expire(error: BaseException, *, soft: bool, seconds: float) -> None:
            if timeout_callback is not None:
                timeout_callback(soft, seconds)
            handle.end(error)

        limits: list[tuple[float, BaseException, bool]] = []
        if soft_seconds:
            limits.append((soft_seconds, SoftTimeLimitExceeded(), True))
        if hard_seconds:
            limits.append((hard_seconds, JobStopped("time limit"), False))
        timers = [
            threading.Timer(seconds, expire, (error,), {"soft": soft, "seconds": seconds})
            for seconds, error, soft in limits
        ]
        for timer in timers:
            timer.daemon = True
            timer.start()
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()
