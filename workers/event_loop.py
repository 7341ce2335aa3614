"""An event loop in a thread of its own, and a way into it for other threads."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any


class LoopThread:
    """`post` is safe from any thread, and once `stop` has returned does nothing."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._posted: deque[Callable[[], None]] = deque()
        self._is_woken = False
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """What was posted before is done. May be called again."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def post(self, callback: Callable[[], None]) -> None:
        """Call it in the loop. Callbacks that come together wake the loop once, which costs a system call."""
        self._posted.append(callback)
        if not self._is_woken and not self._loop.is_closed():
            self._is_woken = True
            self._loop.call_soon_threadsafe(self._call_posted)

    def create_task(self, work: Coroutine[Any, Any, None], context: Context) -> None:
        """In the loop's own thread."""
        task = self._loop.create_task(work, context=context)
        self._tasks.add(task)  # the loop itself keeps no hold on it
        task.add_done_callback(self._tasks.discard)

    def _call_posted(self) -> None:
        self._is_woken = False  # first: who posts from now on wakes the loop again
        while self._posted:
            self._posted.popleft()()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()
