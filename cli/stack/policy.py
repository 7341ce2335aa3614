"""What to do about a process that ended although nobody asked it to. Pure: no clock, no process, no log.

ended ──▶ its exit code is final (a broken model folder)?      ──▶ GiveUp
      ──▶ it has failed too often in a row, each time quickly? ──▶ GiveUp
      ──▶ otherwise                                            ──▶ Restart after a delay that doubles
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How patient the supervisor is with one kind of process.

    Attributes:
        first_delay_seconds: The pause before the first restart; it doubles with every further quick failure.
        max_delay_seconds: Where the doubling ends.
        settled_after_seconds: A run of this length forgives the failures before it.
        max_quick_failures: After so many failures in a row none of which settled, give up; `None`: never.
        final_codes: Exit codes by which the program says that another try would end the same way, each with
            its meaning.
    """

    first_delay_seconds: float = 0.5
    max_delay_seconds: float = 15.0
    settled_after_seconds: float = 20.0
    max_quick_failures: int | None = None
    final_codes: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Restart:
    """Start it again after the delay; `quick_failures` is the count to carry on with."""

    delay_seconds: float
    quick_failures: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Leave it down; `reason` is for the log."""

    reason: str


def decide(
    policy: RestartPolicy, *, exit_status: int, ran_seconds: float, quick_failures: int
) -> Restart | GiveUp:
    """Return what to do next; `exit_status` is as `subprocess` has it (negative: ended by that signal)."""
    if exit_status in policy.final_codes:
        return GiveUp(policy.final_codes[exit_status])
    failures = 1 if ran_seconds >= policy.settled_after_seconds else quick_failures + 1
    if policy.max_quick_failures is not None and failures >= policy.max_quick_failures:
        return GiveUp(f"it ended {failures} times in a row soon after its start")
    # The exponent is bounded so that a process that fails for days does not overflow a float.
    delay = policy.first_delay_seconds * 2.0 ** min(failures - 1, 30)
    return Restart(min(delay, policy.max_delay_seconds), failures)


def describe_exit(exit_status: int) -> str:
    """Return the status in words: `exit code 3`, `signal 9 (SIGKILL)`."""
    if exit_status >= 0:
        return f"exit code {exit_status}"
    try:
        return f"signal {-exit_status} ({signal.Signals(-exit_status).name})"
    except ValueError:  # a real-time signal has no name
        return f"signal {-exit_status}"
