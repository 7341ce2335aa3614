"""How long a job waits after a failed attempt before the next."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RetryPause:
    """Doubles with every counted attempt, up to a limit; spread over its upper half.

    Jobs that failed together so do not come back together, and none comes back before half its pause.
    """

    first_seconds: float = 1.0
    """0 is no pause, however many attempts."""
    max_seconds: float = 60.0
    spread: Callable[[], float] = random.random
    """In [0, 1)."""

    def seconds_after(self, num_attempts: int) -> float:
        """The pause after so many counted attempts, from 1."""
        doublings = min(num_attempts - 1, 64)  # far beyond any limit, and no overflow
        full = min(self.max_seconds, self.first_seconds * 2.0**doublings)
        return full * (1 + self.spread()) / 2
