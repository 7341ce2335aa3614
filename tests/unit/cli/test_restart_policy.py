from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.stack.policy import GiveUp, Restart, RestartPolicy, decide, describe_exit

POLICY = RestartPolicy(first_delay_seconds=0.5, max_delay_seconds=4.0, settled_after_seconds=20.0)


def delays(policy: RestartPolicy, runs: list[float]) -> list[float | str]:
    """What the policy says to a process that runs so long each time and then dies."""
    said: list[float | str] = []
    failures = 0
    for ran_seconds in runs:
        verdict = decide(policy, exit_status=1, ran_seconds=ran_seconds, quick_failures=failures)
        if isinstance(verdict, GiveUp):
            said.append("give up")
            break
        said.append(verdict.delay_seconds)
        failures = verdict.quick_failures
    return said


def test_delay_doubles_up_to_its_limit_when_runs_stay_short() -> None:
    assert delays(POLICY, [0.1] * 6) == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]


def test_delay_begins_anew_when_a_run_settled() -> None:
    assert delays(POLICY, [0.1, 0.1, 20.0, 0.1]) == [0.5, 1.0, 0.5, 1.0]


def test_policy_gives_up_when_too_many_runs_in_a_row_were_short() -> None:
    policy = RestartPolicy(max_quick_failures=3)

    assert delays(policy, [1, 1, 1, 1]) == [0.5, 1.0, "give up"]
    assert "give up" not in delays(policy, [1, 1, 99, 1, 99, 1])


def test_policy_gives_up_at_once_when_the_exit_code_is_final() -> None:
    policy = RestartPolicy(final_codes={3: "the model cannot be loaded"})

    assert decide(policy, exit_status=3, ran_seconds=9, quick_failures=0) == GiveUp(
        "the model cannot be loaded"
    )
    assert isinstance(decide(policy, exit_status=-9, ran_seconds=9, quick_failures=0), Restart)


@given(st.integers(0, 10**6), st.floats(0, 1e6))
def test_delay_is_finite_and_within_its_limits_whatever_came_before(
    failures: int, ran_seconds: float
) -> None:
    verdict = decide(POLICY, exit_status=1, ran_seconds=ran_seconds, quick_failures=failures)

    assert isinstance(verdict, Restart)
    assert math.isfinite(verdict.delay_seconds)
    assert 0.5 <= verdict.delay_seconds <= 4.0


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, "exit code 0"), (3, "exit code 3"), (-9, "signal 9 (SIGKILL)"), (-40, "signal 40")],
)
def test_exit_is_described_by_code_or_by_signal_name(status: int, words: str) -> None:
    assert describe_exit(status) == words
