"""Who may be in the engine together, so that a job that kills it takes nobody with it.

    attempts that died in company before    0         1            2 and more
    may share the engine with               anybody   7 like it    nobody

When an engine dies nobody can say which of its jobs did it, so none is charged; but each runs in smaller
company the next time, and in the end alone, where there is no doubt. Grades never mix: a fresh job meets no
suspect. See docs/decisions/0005-jobs-that-kill-their-engine.md.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from types import TracebackType

COMPANY_OF_SUSPECTS = 8
"""About the square root of what an engine holds: a cleared crowd takes as many rounds as the one with the
culprit takes lone runs."""

Place = Future[None]
"""Done when its attempt may go in; whoever waits for it may end it early with an error."""


@dataclass(frozen=True, slots=True)
class Grade:
    """How careful the engine must be with a job."""

    max_together: float

    @property
    def is_alone(self) -> bool:
        return self.max_together == 1


FRESH, SUSPECT, ALONE = Grade(float("inf")), Grade(COMPANY_OF_SUSPECTS), Grade(1)


def grade_of(num_forgiven: int) -> Grade:
    """The grade of a job after so many attempts that died in company."""
    return (FRESH, SUSPECT, ALONE)[min(num_forgiven, 2)]


class Company:
    """The door of one engine. Safe from any thread.

    While others wait, a grade that is inside gets no newcomers; when the last has left, all that
    wait and are of the grade of the longest waiter go in. So no grade starves another.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._grade = FRESH
        self._waiting: list[tuple[Grade, Place]] = []

    def join(self, grade: Grade, wait: Callable[[Place], Awaitable[None]]) -> _Stay:
        """Be inside for the block. `wait` is called where there is a wait, until its argument is done; it
        may raise instead.
        """
        return _Stay(self, grade, wait)

    async def enter(self, grade: Grade, wait: Callable[[Place], Awaitable[None]]) -> None:
        if self._enters_at_once(grade):
            return
        try:
            await wait(self._ask(grade))
        except BaseException:
            self._open()  # somebody may have waited behind us alone
            raise

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            self._admit()

    def check_invariants(self) -> None:
        with self._lock:
            assert 0 <= self._inside <= self._grade.max_together
            assert self._inside > 0 or not any(not place.done() for _, place in self._waiting)

    def _enters_at_once(self, grade: Grade) -> bool:
        """Nearly every job does: nobody waits, and those inside are like it."""
        with self._lock:
            if self._waiting or (self._inside and grade != self._grade) or self._inside >= grade.max_together:
                return False
            self._grade = grade
            self._inside += 1
            return True

    def _ask(self, grade: Grade) -> Place:
        place: Place = Future()
        with self._lock:
            self._waiting.append((grade, place))
            self._admit()
        return place

    def _open(self) -> None:
        with self._lock:
            self._admit()

    def _admit(self) -> None:
        if not self._waiting:
            return
        waiting = [(grade, place) for grade, place in self._waiting if not place.done()]
        if waiting and self._inside == 0:
            self._grade = waiting[0][0]
        elif any(grade != self._grade for grade, _ in waiting):
            self._waiting = waiting
            return
        self._waiting = [entry for entry in waiting if not self._let_in(*entry)]

    def _let_in(self, grade: Grade, place: Place) -> bool:
        if grade != self._grade or self._inside >= self._grade.max_together:
            return False
        try:
            place.set_result(None)
        except InvalidStateError:  # ended early, in this instant
            return True
        self._inside += 1
        return True


@dataclass(slots=True)
class _Stay:
    company: Company
    grade: Grade
    wait: Callable[[Place], Awaitable[None]]

    async def __aenter__(self) -> None:
        await self.company.enter(self.grade, self.wait)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.company.leave()
