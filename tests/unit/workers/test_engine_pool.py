from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded

from workers.pool import EnginePool, JobStopped, current_handle


@pytest.fixture
def pool() -> Iterator[EnginePool]:
    pool = EnginePool(limit=2)
    yield pool
    pool.executor.shutdown(wait=False, cancel_futures=True)


class Waiter:
    """A task that waits on a future of its own and records how its wait ended."""

    def __init__(self) -> None:
        self.future: Future[str] = Future()
        self.accepted: Future[int] = Future()
        self.ended: Future[Any] = Future()

    def __call__(self) -> None:
        try:
            self.ended.set_result(current_handle().wait(self.future))
        except BaseException as error:
            self.ended.set_result(error)
            raise

    def accept(self, pid: int, _time: float) -> None:
        self.accepted.set_result(pid)


def apply(
    pool: EnginePool, task: Waiter, callback: Callable[..., Any] = lambda _: None, **limits: Any
) -> Any:
    return pool.on_apply(task, (), {}, callback, task.accept, **limits)


def test_task_gets_the_engines_answer(pool: EnginePool) -> None:
    task = Waiter()
    result = apply(pool, task)

    task.future.set_result("tokens")

    result.get(timeout=5)
    assert task.ended.result(timeout=5) == "tokens"


def test_terminate_ends_the_wait_without_a_result(pool: EnginePool) -> None:
    task, results = Waiter(), []
    result = apply(pool, task, results.append)

    pool.terminate_job(task.accepted.result(timeout=5))

    assert isinstance(task.ended.result(timeout=5), JobStopped)
    result.get(timeout=5)
    assert results == []


def test_terminate_of_an_unknown_handle_does_nothing(pool: EnginePool) -> None:
    pool.terminate_job(12345)


def test_soft_time_limit_raises_in_the_task(pool: EnginePool) -> None:
    task, told = Waiter(), []
    result = apply(pool, task, soft_timeout=0.01, timeout_callback=lambda soft, seconds: told.append(soft))

    assert isinstance(task.ended.result(timeout=5), SoftTimeLimitExceeded)
    with pytest.raises(SoftTimeLimitExceeded):
        result.get(timeout=5)
    assert told == [True]


def test_hard_time_limit_stops_the_task_silently(pool: EnginePool) -> None:
    task, told = Waiter(), []
    result = apply(pool, task, timeout=0.01, timeout_callback=lambda soft, seconds: told.append(soft))

    result.get(timeout=5)
    assert isinstance(task.ended.result(timeout=5), JobStopped)
    assert told == [False]


def test_first_end_wins_when_a_task_is_ended_twice(pool: EnginePool) -> None:
    task, entered = Waiter(), threading.Event()
    handles = []

    def body() -> None:
        handles.append(current_handle())
        entered.set()
        task()

    result = pool.on_apply(body, (), {}, lambda _: None, task.accept)
    assert entered.wait(5)
    handles[0].end(LookupError("first"))
    handles[0].end(KeyError("second"))

    with pytest.raises(LookupError, match="first"):
        result.get(timeout=5)


def test_end_before_the_wait_begins_is_not_lost() -> None:
    handle = current_handle()
    handle.end(LookupError("early"))

    with pytest.raises(LookupError, match="early"):
        handle.wait(Future())
