"""Celery tasks whose body is a coroutine: what `celery.app.trace` does around a body, for one that waits.

    task_prerun ▸ body begins ┄┄ others run ┄┄ body ends ▸ task_success | task_failure ▸ task_postrun

Signals see the task's request as they are used to. Between them it is nobody's, since many tasks share the
thread: a body must read `task.request` before it becomes a coroutine. Results, callbacks and chains are
not for such tasks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import Any, cast

from billiard.einfo import ExceptionInfo
from celery import Task, signals, states
from celery.app.task import Context
from celery.app.trace import TraceInfo
from celery.exceptions import Reject


class CoroutineTask(Task):  # type: ignore[misc]  # celery is untyped
    """Its `run` is an ordinary function that returns the coroutine to be awaited."""

    abstract = True
    Strategy = "workers.broker.strategy:take_in"


async def run_traced(task: CoroutineTask, id: str, fields: dict[str, Any]) -> tuple[int, Any, float]:
    """What a Celery request's `on_success` takes: did it fail, its value or failure, the seconds it took.

    Args:
        task: whose body is run.
        id: the task's.
        fields: of the message, with `args` and `kwargs`.

    Raises:
        BaseException: that is no Exception, from the body; `task_postrun` has been told.
    """
    started_at = monotonic()
    args, kwargs = fields["args"], fields["kwargs"]
    request = Context(fields, called_directly=False, is_eager=False, headers=own_headers(fields))
    state, value, failure = None, None, None
    try:
        try:
            with _Current(task, request):
                signals.task_prerun.send(sender=task, task_id=id, task=task, args=args, kwargs=kwargs)
                body = task.run(*args, **kwargs)
            value = await body
            state = states.SUCCESS
            if signals.task_success.receivers:
                signals.task_success.send(sender=task, result=value, runtime=monotonic() - started_at)
        except Reject as error:
            state, value, failure = states.REJECTED, error, ExceptionInfo(internal=True)
            TraceInfo(state, error).handle_reject(task, request)
        except Exception as error:
            state, value = states.FAILURE, error
            failure = TraceInfo(state, error).handle_error_state(task, request)
    finally:
        with _Current(task, request):
            signals.task_postrun.send(
                sender=task, task_id=id, task=task, args=args, kwargs=kwargs, retval=value, state=state
            )
    seconds = monotonic() - started_at
    return (0, repr(value), seconds) if failure is None else (1, failure, seconds)


def own_headers(fields: dict[str, Any]) -> dict[str, Any] | None:
    """The message's headers that are not Celery's, as its `Context` finds them; that makes a set of every
    name it knows for each request.
    """
    if fields.get("headers") is not None:
        return cast("dict[str, Any]", fields["headers"])
    return {name: fields[name] for name in fields.keys() - _celery_names()} or None


@functools.cache
def _celery_names() -> frozenset[str]:
    others = ("lang", "task", "argsrepr", "kwargsrepr", "compression", "called_directly", "is_eager")
    return frozenset((*Context.__dict__, *others))


@dataclass(slots=True)
class _Current:
    """`task.request` is this one; nothing may be awaited inside."""

    task: CoroutineTask
    request: Context

    def __enter__(self) -> None:
        self.task.request_stack.push(self.request)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.task.request_stack.pop()
