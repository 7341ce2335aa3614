from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery, signals
from celery.app.trace import trace_task_ret
from celery.exceptions import Reject

from workers.coroutine_task import CoroutineTask
from workers.pool import EnginePool, JobStopped, TaskHandle, current_handle

Body = Callable[[], Coroutine[Any, Any, Any]]


class Waiter:
    """A task's body that waits on a future of its own and records how its wait ended."""

    def __init__(self) -> None:
        self.future: Future[str] = Future()
        self.accepted: Future[int] = Future()
        self.ended: Future[Any] = Future()

    async def __call__(self) -> str:
        try:
            answer = await current_handle().wait(self.future)
        except BaseException as error:
            self.ended.set_result(error)
            raise
        self.ended.set_result(answer)
        return answer

    def accept(self, pid: int, _time: float) -> None:
        self.accepted.set_result(pid)


class Bench:
    """A started pool, and a task of it whose body is given with each call."""

    def __init__(self) -> None:
        self.app = Celery("test", broker="memory://", set_as_current=False)
        self.bodies: dict[str, Body] = {}
        self.pool = EnginePool(limit=2, app=self.app)
        self.pool.start()

        @self.app.task(name="wait", base=CoroutineTask, bind=True, shared=False, throws=(Reject,))
        def wait(task: Any) -> Coroutine[Any, Any, Any]:
            return self.bodies[task.request.id]()

        @self.app.task(name="add", shared=False)
        def add(one: int, other: int) -> str:
            return f"{one + other} in {threading.current_thread().name}"

    def apply(
        self,
        body: Body,
        *,
        id: str = "job",
        callback: Callable[[Any], None] = lambda _: None,
        accept: Callable[[int, float], None] = lambda pid, time: None,
        **limits: Any,
    ) -> Any:
        self.bodies[id] = body
        request = {"id": id, "task": "wait", "args": [], "kwargs": {}}
        return self.pool.apply_async(
            trace_task_ret,
            ("wait", id, request, None, None, None),
            callback=callback,
            accept_callback=accept,
            **limits,
        )


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.pool.terminate()


def test_task_gets_the_engines_answer(bench: Bench) -> None:
    task, results = Waiter(), []
    result = bench.apply(task, callback=results.append)

    task.future.set_result("tokens")

    result.get(timeout=5)
    assert task.ended.result(timeout=5) == "tokens"
    assert [(failed, value) for failed, value, _ in results] == [(0, "'tokens'")]


def test_waiting_tasks_share_a_thread_and_the_last_may_end_first(bench: Bench) -> None:
    tasks = [Waiter() for _ in range(20)]
    threads, ended = set(), []

    def body(number: int) -> Body:
        async def run() -> None:
            threads.add(threading.get_ident())
            await tasks[number]()
            ended.append(number)

        return run

    results = [bench.apply(body(number), id=str(number)) for number in range(20)]
    for number in reversed(range(20)):
        tasks[number].future.set_result("")
        results[number].get(timeout=5)

    assert len(threads) == 1
    assert ended == list(reversed(range(20)))


def test_terminate_ends_the_wait_without_a_result(bench: Bench) -> None:
    task, results = Waiter(), []
    result = bench.apply(task, callback=results.append, accept=task.accept)

    bench.pool.terminate_job(task.accepted.result(timeout=5))

    assert isinstance(task.ended.result(timeout=5), JobStopped)
    result.get(timeout=5)
    assert results == []


def test_terminate_of_an_unknown_handle_does_nothing(bench: Bench) -> None:
    bench.pool.terminate_job(12345)


def test_soft_time_limit_raises_in_the_task(bench: Bench) -> None:
    task, told, results = Waiter(), [], []
    result = bench.apply(
        task,
        callback=results.append,
        soft_timeout=0.01,
        timeout_callback=lambda soft, seconds: told.append(soft),
    )

    assert isinstance(task.ended.result(timeout=5), SoftTimeLimitExceeded)
    result.get(timeout=5)
    assert told == [True]
    ((failed, failure, _),) = results
    assert (failed, type(failure.exception)) == (1, SoftTimeLimitExceeded)


def test_hard_time_limit_stops_the_task_silently(bench: Bench) -> None:
    task, told, results = Waiter(), [], []
    result = bench.apply(
        task,
        callback=results.append,
        timeout=0.01,
        timeout_callback=lambda soft, seconds: told.append(soft),
    )

    result.get(timeout=5)
    assert isinstance(task.ended.result(timeout=5), JobStopped)
    assert (told, results) == ([False], [])


def test_stopping_pool_waits_for_its_tasks_and_ends_what_is_left_after_the_grace_time(bench: Bench) -> None:
    quick, slow = Waiter(), Waiter()
    results = [bench.apply(quick, id="quick", accept=quick.accept), bench.apply(slow, id="slow")]
    quick.accepted.add_done_callback(lambda _: quick.future.set_result("tokens"))
    bench.pool.grace_seconds = 0.2

    bench.pool.stop()

    assert [result.get(timeout=0) for result in results] == [None, None]
    assert quick.ended.result(timeout=0) == "tokens"
    assert isinstance(slow.ended.result(timeout=0), JobStopped)


def test_first_end_wins_when_a_task_is_ended_twice(bench: Bench) -> None:
    task, handles = Waiter(), Future[TaskHandle]()

    async def body() -> None:
        handles.set_result(current_handle())
        await task()

    bench.apply(body)
    handle = handles.result(timeout=5)
    handle.end(LookupError("first"))
    handle.end(KeyError("second"))

    assert isinstance(task.ended.result(timeout=5), LookupError)
    assert task.ended.result().args == ("first",)


async def test_end_before_the_wait_begins_is_not_lost() -> None:
    handle = current_handle()
    handle.end(LookupError("early"))

    with pytest.raises(LookupError, match="early"):
        await handle.wait(Future())


async def test_wait_does_something_every_so_often_until_the_answer_comes() -> None:
    future: Future[str] = Future()
    calls = []

    async def meanwhile() -> None:
        calls.append(None)
        if len(calls) == 3:
            future.set_result("tokens")

    answer = await current_handle().wait(future, meanwhile=meanwhile, every_seconds=0.001)

    assert (answer, len(calls)) == ("tokens", 3)


def test_given_back_task_is_told_as_one_that_rejects_its_message(bench: Bench) -> None:
    results: list[Any] = []

    async def body() -> None:
        raise Reject("given back", requeue=True)

    bench.apply(body, callback=results.append).get(timeout=5)

    ((failed, failure, _),) = results
    assert (failed, type(failure.exception.exc), failure.exception.exc.requeue) == (1, Reject, True)


def test_signals_of_tasks_that_overlap_see_their_own_requests(bench: Bench) -> None:
    seen: list[tuple[str, str, str | None]] = []

    def prerun(task: Any, task_id: str, **_: Any) -> None:
        seen.append(("prerun", task_id, task.request.id))

    def postrun(task: Any, task_id: str, state: str, **_: Any) -> None:
        seen.append((f"postrun {state}", task_id, task.request.id))

    first, second = Waiter(), Waiter()
    signals.task_prerun.connect(prerun)
    signals.task_postrun.connect(postrun)
    try:
        results = [bench.apply(first, id="first"), bench.apply(second, id="second")]
        first.future.set_result("")
        results[0].get(timeout=5)
        second.future.set_exception(KeyError())
        results[1].get(timeout=5)
    finally:
        signals.task_prerun.disconnect(prerun)
        signals.task_postrun.disconnect(postrun)

    assert {(what, id) for what, id, _ in seen} == {
        ("prerun", "first"),
        ("prerun", "second"),
        ("postrun SUCCESS", "first"),
        ("postrun FAILURE", "second"),
    }
    assert all(id == current for _, id, current in seen)


def test_task_whose_body_is_no_coroutine_runs_in_a_thread(bench: Bench) -> None:
    results: list[Any] = []
    request = {"id": "sum", "task": "add"}

    bench.pool.apply_async(
        trace_task_ret,
        ("add", "sum", request, ((2, 3), {}, {}), None, None),
        {"app": bench.app},
        callback=results.append,
        accept_callback=lambda pid, time: None,
    ).get(timeout=5)

    ((failed, value, _),) = results
    assert (failed, value[1:5]) == (0, "5 in")
    assert "attempts" not in value


async def test_current_handle_is_a_loose_one_outside_the_pool() -> None:
    assert current_handle().number == 0
    assert await asyncio.to_thread(lambda: current_handle().number) == 0


def test_celery_hears_in_its_own_thread_of_all_that_ended_when_its_loop_comes_to_it(bench: Bench) -> None:
    """Woken once for tasks that end in one turn, and told in the order in which they did."""
    hub, heard = KeptCalls(), []
    bench.pool.register_with_event_loop(hub)
    opened = asyncio.Event()

    async def wait() -> None:
        await opened.wait()

    async def open() -> None:
        opened.set()

    def hear(id: str) -> Callable[[Any], None]:
        return lambda _: heard.append((id, threading.get_ident()))

    bodies = {"first": open, "second": wait, "third": wait}
    results = [bench.apply(bodies[id], id=id, callback=hear(id)) for id in ("second", "third", "first")]
    call = hub.calls.get(timeout=5)

    assert heard == []
    call()
    assert heard == [(id, threading.get_ident()) for id in bodies]
    assert hub.calls.empty()
    for result in results:
        result.get(timeout=5)


def test_pool_that_stops_tells_what_ends_while_celerys_loop_stands_still(bench: Bench) -> None:
    task, heard = Waiter(), []
    bench.pool.register_with_event_loop(KeptCalls())
    bench.apply(task, callback=heard.append, accept=task.accept)
    task.accepted.result(timeout=5)
    threading.Timer(0.05, task.future.set_result, ("tokens",)).start()

    bench.pool.stop()

    assert [value for _, value, _ in heard] == ["'tokens'"]


class KeptCalls:
    """Stands where Celery's event loop is: what it is to call soon."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.calls.put(callback)
