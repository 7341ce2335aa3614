"""One question at a time, however many ask it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

Answer = TypeVar("Answer")


class SingleFlight(Generic[Answer]):
    """Callers that ask while a question is under way share its answer, or its error.

    With a lock instead, callers of a hung server would wait for one another's timeouts in turn.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[Answer]] = {}

    async def ask(self, key: str, question: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
        """The answer for `key`. A caller that is cancelled does not cancel it for the others."""
        task = self._tasks.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(question())
            self._tasks[key] = task
            task.add_done_callback(lambda done: self._finish(key, done))
        return await asyncio.shield(task)

    def _finish(self, key: str, task: asyncio.Task[Answer]) -> None:
        self._tasks.pop(key, None)
        if not task.cancelled():
            task.exception()  # looked at, or asyncio complains when every caller has gone
