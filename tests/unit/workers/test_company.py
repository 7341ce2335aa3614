from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import Future

import pytest

from tests.support.processes import wait_until
from workers.attempts.company import ALONE, COMPANY_OF_SUSPECTS, FRESH, SUSPECT, Company, Grade, grade_of


class Guest:
    """An attempt in a thread of its own: waits at the door, stays inside until told to leave."""

    def __init__(self, company: Company, grade: Grade) -> None:
        self.company, self.grade = company, grade
        self.is_inside, self.may_leave = threading.Event(), threading.Event()
        self.place: Future[None] | None = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=lambda: asyncio.run(self._visit()), daemon=True)
        self.thread.start()
        wait_until(
            lambda: self.place is not None or self.is_inside.is_set(),
            timeout_seconds=5,
            what="the guest is at the door, or inside",
        )

    async def _wait(self, place: Future[None]) -> None:
        self.place = place
        place.result(timeout=10)

    async def _visit(self) -> None:
        try:
            async with self.company.join(self.grade, self._wait):
                self.is_inside.set()
                self.may_leave.wait(10)
        except BaseException as error:
            self.error = error

    def leave(self) -> None:
        assert self.is_inside.wait(5)
        self.may_leave.set()
        self.thread.join(5)

    def is_waiting(self) -> bool:
        return self.place is not None and not self.place.done()


@pytest.mark.parametrize(
    ("num_forgiven", "grade"), [(0, FRESH), (1, SUSPECT), (2, ALONE), (3, ALONE), (10, ALONE)]
)
def test_grade_shrinks_the_company_with_every_death(num_forgiven: int, grade: Grade) -> None:
    assert grade_of(num_forgiven) is grade


def test_fresh_jobs_go_in_without_number() -> None:
    company = Company()

    guests = [Guest(company, FRESH) for _ in range(20)]

    assert not any(guest.is_waiting() for guest in guests)
    for guest in guests:
        guest.leave()
    company.check_invariants()


def test_suspects_go_in_so_many_at_once() -> None:
    company = Company()
    guests = [Guest(company, SUSPECT) for _ in range(COMPANY_OF_SUSPECTS + 1)]

    assert [guest.is_waiting() for guest in guests] == [False] * COMPANY_OF_SUSPECTS + [True]
    guests[3].leave()
    assert guests[-1].is_inside.wait(5)


def test_lone_job_waits_for_an_empty_engine_and_keeps_it_to_itself() -> None:
    company = Company()
    fresh = Guest(company, FRESH)
    lone, second = Guest(company, ALONE), Guest(company, ALONE)

    assert lone.is_waiting()
    fresh.leave()

    assert lone.is_inside.wait(5)
    late = Guest(company, FRESH)
    assert second.is_waiting()
    assert late.is_waiting()


def test_waiting_suspect_is_not_passed_by_newcomers() -> None:
    company = Company()
    fresh = Guest(company, FRESH)
    suspect = Guest(company, SUSPECT)
    newcomer = Guest(company, FRESH)

    assert suspect.is_waiting()
    assert newcomer.is_waiting()
    fresh.leave()
    assert suspect.is_inside.wait(5)
    suspect.leave()
    assert newcomer.is_inside.wait(5)


def test_guest_that_gives_up_at_the_door_holds_nobody_up() -> None:
    company = Company()
    fresh = Guest(company, FRESH)
    suspect = Guest(company, SUSPECT)
    newcomer = Guest(company, FRESH)
    assert suspect.place is not None

    suspect.place.set_exception(TimeoutError("cancelled"))

    assert newcomer.is_inside.wait(5)
    suspect.thread.join(5)
    assert isinstance(suspect.error, TimeoutError)
    fresh.leave()
    newcomer.leave()
    company.check_invariants()


@pytest.mark.parametrize("seed", range(10))
def test_grades_never_mix_and_everybody_gets_in_whatever_comes(seed: int) -> None:
    rng = random.Random(seed)
    company, inside, lock = Company(), [], threading.Lock()
    mixtures: list[list[Grade]] = []

    async def wait(place: Future[None]) -> None:
        place.result(timeout=20)

    async def visit(grade: Grade) -> None:
        async with company.join(grade, wait):
            with lock:
                inside.append(grade)
                mixtures.append(list(inside))
            company.check_invariants()
            with lock:
                inside.remove(grade)

    grades = [rng.choice([FRESH, SUSPECT, ALONE]) for _ in range(60)]
    threads = [threading.Thread(target=asyncio.run, args=(visit(grade),)) for grade in grades]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert len(mixtures) == len(grades)
    assert all(len(set(mixture)) == 1 for mixture in mixtures)
    assert all(len(mixture) <= mixture[0].max_together for mixture in mixtures)
