"""The short form of `make chaos`: one blow of each sort that needs no long wait, then the same checks.

And the check itself, on that drill's own spans: whatever is taken out of a trace that no kill met is told.
"""

from __future__ import annotations

import itertools
import random

import pytest

from tests.chaos.drill import Outcome, Plan, run
from tests.chaos.load import draw_orders
from tests.chaos.schedule import WEIGHTS, Kind, draw_schedule
from tests.chaos.traces import UNSENT_SECONDS, Finding

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


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(SHORT, tmp_path_factory.mktemp("chaos"))


@pytest.mark.slow
def test_no_promise_is_broken_while_every_part_is_killed(outcome: Outcome) -> None:
    print(outcome.table())
    assert not outcome.breaches, "\n".join(outcome.breaches)
    assert sum(outcome.strikes.values()) >= 4, "most faults missed: the drill proves little"


@pytest.mark.slow
def test_lost_span_is_told_where_no_kill_can_have_taken_it(outcome: Outcome) -> None:
    traces, rng = untouched(outcome), random.Random(SHORT.seed)
    assert len(traces) > SHORT.num_jobs / 4, "the kills met most of the traces: the drill proves little"

    for trace_id in rng.choices(traces, k=300):
        spans = outcome.audit.traces[trace_id]
        lost = rng.choice(spans)
        judgement = outcome.audit.judge(trace_id, [span for span in spans if span is not lost])
        assert judgement.finding is Finding.BROKEN, f"nobody missed {lost.name} in {trace_id}"


@pytest.mark.slow
def test_lost_part_is_told_where_no_kill_can_have_taken_it(outcome: Outcome) -> None:
    for trace_id in untouched(outcome):
        spans = outcome.audit.traces[trace_id]
        for process in {span.service for span in spans}:
            judgement = outcome.audit.judge(trace_id, [span for span in spans if span.service != process])
            assert judgement.finding is Finding.BROKEN, f"nobody missed {process} in {trace_id}"
        assert outcome.audit.judge(trace_id, []).finding is Finding.BROKEN


def untouched(outcome: Outcome) -> list[str]:
    """Whole traces of accepted orders that had left their processes before any of these was killed."""
    kills = [
        strike.at
        for strike in outcome.audit.strikes
        if strike.fault.kind in (Kind.API_KILL, Kind.WORKER_KILL)
    ]
    return [
        judgement.trace_id
        for judgement in outcome.audit.run()
        if judgement.finding is Finding.WHOLE
        and (ask := outcome.audit.asks[judgement.trace_id]).job_id in outcome.jobs
        and outcome.jobs[ask.job_id].trace_id == ask.trace_id
        and not any(
            ask.asked_at
            <= at
            <= max(span.end_ns / 1e9 for span in outcome.audit.traces[ask.trace_id]) + UNSENT_SECONDS
            for at in kills
        )
    ]


def test_schedule_and_orders_are_the_seeds_alone() -> None:
    first, again, other = (draw_schedule(seed, num_faults=40, seconds=100) for seed in (1, 1, 2))

    assert first == again != other
    assert draw_orders(1, 50) == draw_orders(1, 50) != draw_orders(2, 50)
    assert {fault.kind for fault in first} == set(WEIGHTS)
    assert all(earlier.at_seconds < later.at_seconds for earlier, later in itertools.pairwise(first))
