"""The short form of `make chaos`: one blow of each sort that needs no long wait, then the same checks."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.chaos.drill import Plan, run
from tests.chaos.load import draw_orders
from tests.chaos.schedule import WEIGHTS, Kind, draw_schedule

SHORT = Plan(
    seed=20,
    num_jobs=250,
    seconds=12.0,
    num_faults=6,
    lease_seconds=3.0,
    kinds=(
        Kind.WORKER_KILL,
        Kind.ENGINE_KILL,
        Kind.API_KILL,
        Kind.REDIS_KILL,
        Kind.NET_CUT,
        Kind.NET_HALF_OPEN,
    ),
)


@pytest.mark.slow
def test_no_promise_is_broken_while_every_part_is_killed(tmp_path: Path) -> None:
    outcome = run(SHORT, tmp_path)

    print(outcome.table())
    assert not outcome.breaches, "\n".join(outcome.breaches)
    assert sum(outcome.strikes.values()) >= 4, "most faults missed: the drill proves little"


def test_schedule_and_orders_are_the_seeds_alone() -> None:
    first, again, other = (draw_schedule(seed, num_faults=40, seconds=100) for seed in (1, 1, 2))

    assert first == again != other
    assert draw_orders(1, 50) == draw_orders(1, 50) != draw_orders(2, 50)
    assert {fault.kind for fault in first} == set(WEIGHTS)
    assert all(earlier.at_seconds < later.at_seconds for earlier, later in itertools.pairwise(first))
