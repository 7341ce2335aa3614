"""A Celery pool for tasks that wait on one engine, in one thread.

    consumer thread ──post──▶ ┌ event loop ────────────────────┐ ◀──post── engine's reader
                              │ task ▸ task ▸ task ▸ …         │ ══ gathered calls ══▶ store's thread
    consumer thread ◀─ended── └────────────────────────────────┘

A waiting task is a coroutine, not a thread: a hundred threads that wake up for an instant each contend for
the interpreter, which cost more than their work (docs/decisions/0010-attempts-on-one-event-loop.md). Tasks
whose body is an ordinary function run in threads, as in Celery's own pool.

Celery's threads pool cannot stop a running task: revoke with terminate, time limits and soft shutdown all
end in NotImplementedError. Here each task gets a handle, given to Celery in place of a process id, and
whatever the task waits on can be ended early through it.

What Celery does when a task has ended (acknowledge, tell watchers, forget the request) it does in its own
thread, as with its pool of processes: for all that ended in one turn of the event loop, woken once. Woken for
each, it takes the interpreter from the loop each time, and fetches messages one by one.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import Context, ContextVar
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any, TypeVar

from billiard.exceptions import SoftTimeLimitExceeded
from celery.concurrency.thread import TaskPool

from workers.coroutine_task import CoroutineTask, run_traced
from workers.event_loop import LoopThread

T = TypeVar("T")

Post = Callable[[Callable[[], None]], None]


class JobStopped(BaseException):
    """Leave the task without a result: Celery has already decided what becomes of it."""


class TaskHandle:
    """One running task, as whoever wants to end it sees it. `end` is safe from any thread."""

    def __init__(self, number: int, post: Post | None = None) -> None:
        """`post` has a callback made in the task's event loop, from any thread; None asks the loop itself."""
        self.number = number
        self._post = post
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

    async def wait(
        self,
        future: Future[T],
        *,
        meanwhile: Callable[[], Awaitable[None]] | None = None,
        every_seconds: float = 1.0,
    ) -> T:
        """Wait for the engine; a terminate, a time limit or a shutdown ends the wait early.

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
        if not future.done():
            done = self._told_of(future)
            while meanwhile is not None and not (await asyncio.wait([done], timeout=every_seconds))[0]:
                await meanwhile()
            await done
        return future.result()

    def _told_of(self, future: Future[Any]) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        post, done = self._post or loop.call_soon_threadsafe, loop.create_future()

        def tell() -> None:
            if not done.done():
                done.set_result(None)

        future.add_done_callback(lambda _: post(tell))
        return done


def _resolve(future: Future[Any], error: BaseException) -> None:
    with suppress(InvalidStateError):  # the engine answered in the same instant; its answer stands
        future.set_exception(error)


_UNLIMITED: AbstractContextManager[None] = nullcontext()

_handle: ContextVar[TaskHandle | None] = ContextVar("throughline_task_handle", default=None)


def current_handle() -> TaskHandle:
    """The handle of the task that runs here; a loose one outside the pool."""
    return _handle.get() or TaskHandle(0)


@dataclass(slots=True)
class _Run:
    """One task as Celery's request hands it over."""

    handle: TaskHandle
    task: CoroutineTask
    id: str
    request: dict[str, Any]
    callback: Callable[[Any], None]
    accept_callback: Callable[[int, float], None]
    timeout_callback: Callable[[bool, float], None] | None
    soft_seconds: float | None
    hard_seconds: float | None
    is_told: bool = False
    """Celery knows of the end, where there is one to know of."""
    error: Exception | None = None
    """What came of the telling."""


class _Result:
    """A task's end, for who waits for it; nobody does but tests, so it costs nothing until then."""

    __slots__ = ("__weakref__", "_changed", "_run")

    def __init__(self, run: _Run, changed: threading.Condition) -> None:
        self._run = run
        self._changed = changed

    def get(self, timeout: float | None = None) -> None:
        """Raises: TimeoutError; or what was raised when Celery was told."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._run.is_told, timeout):
                raise TimeoutError
        if self._run.error is not None:
            raise self._run.error


class EnginePool(TaskPool):  # type: ignore[misc]  # celery is untyped
    """Tasks that wait; as many as jobs may be held at once.

    Celery's soft shutdown sleeps its whole timeout inside a signal handler, with the event loop and so all
    acknowledgements standing still. Instead, a warm shutdown (SIGTERM) ends here: what runs may finish for
    `grace_seconds`, then it is stopped and given back.
    """

    grace_seconds = 25.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._handles: dict[int, TaskHandle] = {}
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._loop = LoopThread("attempts")
        self._hub: Any = None
        self._ended: deque[tuple[_Run, Any]] = deque()
        self._is_hand_over_due = False

    def on_start(self) -> None:
        self._loop.start()

    def register_with_event_loop(self, hub: Any) -> None:
        """Called by Celery's consumer in its own thread, again after each reconnect."""
        self._hub = hub

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
    ) -> Any:
        """`target` is Celery's tracer; `args` begin with the task's name, its id and its request."""
        task = self.app.tasks[args[0]]
        if not isinstance(task, CoroutineTask):
            return super().on_apply(target, args, kwargs, callback, accept_callback)
        assert callback is not None, "Celery's requests always have both"
        assert accept_callback is not None
        handle = TaskHandle(next(self._numbers), self._loop.post)
        self._handles[handle.number] = handle
        run = _Run(
            handle,
            task,
            args[1],
            args[2],
            callback,
            accept_callback,
            timeout_callback,
            soft_timeout,
            timeout,
        )
        self._loop.post(partial(self._begin, run))
        return _Result(run, self._changed)

    def on_stop(self) -> None:
        self._wait_idle(monotonic() + self.grace_seconds)
        for handle in list(self._handles.values()):
            handle.end(JobStopped("the worker shuts down"))
        self._wait_idle(None)
        self._loop.stop()
        super().on_stop()

    def on_terminate(self) -> None:
        self.grace_seconds = 0.0
        self.on_stop()

    def terminate_job(self, pid: int, signal: Any = None) -> None:
        """End the task that was accepted under the handle number `pid`."""
        if handle := self._handles.get(pid):
            handle.end(JobStopped("terminated"))

    def _wait_idle(self, deadline: float | None) -> None:
        """Runs in Celery's own thread, whose loop stands still: so what ends is told from here."""
        while self._handles and (deadline is None or monotonic() < deadline):
            with self._changed:
                if not self._ended:
                    self._changed.wait(None if deadline is None else deadline - monotonic())
            self._tell_ended()

    def _begin(self, run: _Run) -> None:
        # A context of its own, or the spans of one task would be the parents of the next.
        self._loop.create_task(self._run(run), Context())

    async def _run(self, run: _Run) -> None:
        _handle.set(run.handle)
        result: Any = None
        try:
            with self._limits(run) if run.soft_seconds or run.hard_seconds else _UNLIMITED:
                run.accept_callback(run.handle.number, monotonic())
                result = await run_traced(run.task, run.id, run.request)
        except JobStopped:
            pass
        except Exception as error:
            result = error
        finally:
            self._end(run, result)

    def _end(self, run: _Run, result: Any) -> None:
        self._ended.append((run, result))
        if not self._is_hand_over_due:
            self._is_hand_over_due = True
            asyncio.get_running_loop().call_soon(self._hand_over_ended)

    def _hand_over_ended(self) -> None:
        self._is_hand_over_due = False
        if self._hub is None:
            self._tell_ended()
        else:
            self._hub.call_soon(self._tell_ended)
            with self._changed:  # a pool that stops waits here, and its loop stands still
                self._changed.notify_all()

    def _tell_ended(self) -> None:
        """Celery hears of the tasks that ended, in the order in which they did."""
        with suppress(IndexError):
            while True:
                self._tell(*self._ended.popleft())
        with self._changed:
            self._changed.notify_all()

    def _tell(self, run: _Run, result: Any) -> None:
        try:
            if isinstance(result, Exception):
                raise result
            if result is not None:
                run.callback(result)
        except Exception as error:
            run.error = error
        finally:
            run.is_told = True
            self._handles.pop(run.handle.number, None)

    @contextmanager
    def _limits(self, run: _Run) -> Iterator[None]:
        """Timers for Celery's soft and hard time limits, where any are set."""

        def expire(error: BaseException, soft: bool, seconds: float) -> None:
            if run.timeout_callback is not None:
                run.timeout_callback(soft, seconds)
            run.handle.end(error)

        loop, timers = asyncio.get_running_loop(), []
        if run.soft_seconds:
            soft = (SoftTimeLimitExceeded(), True, run.soft_seconds)
            timers.append(loop.call_later(run.soft_seconds, expire, *soft))
        if run.hard_seconds:
            hard = (JobStopped("time limit"), False, run.hard_seconds)
            timers.append(loop.call_later(run.hard_seconds, expire, *hard))
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()
