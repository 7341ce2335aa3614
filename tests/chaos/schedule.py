"""Which fault strikes when: all of it drawn from one seed, before anything runs.

The same seed gives the same schedule. What a fault finds when it strikes (which job runs where) is the
machine's affair; the claims that are checked afterwards hold for all of it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    WORKER_KILL = "worker SIGKILL"
    WORKER_TERM = "worker SIGTERM"
    WORKER_PAUSE = "worker SIGSTOP past its lease"
    ENGINE_KILL = "engine SIGKILL"
    ENGINE_PAUSE = "engine SIGSTOP until the watchdog"
    API_KILL = "API SIGKILL"
    API_TERM = "API SIGTERM"
    REDIS_KILL = "Redis SIGKILL"
    REDIS_PAUSE = "Redis SIGSTOP"
    NET_CUT = "connections cut"
    NET_DELAY = "network slow"
    NET_HALF_OPEN = "network half-open"


WEIGHTS: Mapping[Kind, int] = {
    Kind.WORKER_KILL: 3,
    Kind.WORKER_TERM: 2,
    Kind.WORKER_PAUSE: 1,
    Kind.ENGINE_KILL: 3,
    Kind.ENGINE_PAUSE: 1,
    Kind.API_KILL: 2,
    Kind.API_TERM: 1,
    Kind.REDIS_KILL: 2,
    Kind.REDIS_PAUSE: 2,
    Kind.NET_CUT: 4,
    Kind.NET_DELAY: 2,
    Kind.NET_HALF_OPEN: 2,
}

FIRST_FAULT_SECONDS = 2.0
SHORTEST_GAP_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Fault:
    at_seconds: float
    """After the load began."""
    kind: Kind
    target: int
    """A random number; whoever strikes takes it modulo what there is to choose from."""
    lasts_seconds: float
    """Until it is mended, where it does not mend itself."""

    def __str__(self) -> str:
        return f"{self.at_seconds:7.2f} s  {self.kind} (target {self.target}, {self.lasts_seconds:.1f} s)"


def draw_schedule(
    seed: int, *, num_faults: int, seconds: float, kinds: Mapping[Kind, int] = WEIGHTS
) -> tuple[Fault, ...]:
    """So many faults at random distances over `seconds`; every kind strikes once before any strikes twice."""
    rng = random.Random(seed)
    mean_gap = max(SHORTEST_GAP_SECONDS, (seconds - FIRST_FAULT_SECONDS) / max(1, num_faults))
    faults, at = [], FIRST_FAULT_SECONDS
    for kind in _draw_kinds(rng, num_faults, kinds):
        faults.append(Fault(at, kind, rng.randrange(1_000), rng.uniform(0.5, 4.0)))
        at += mean_gap * rng.uniform(0.4, 1.6)
    return tuple(faults)


def _draw_kinds(rng: random.Random, count: int, weights: Mapping[Kind, int]) -> list[Kind]:
    first = list(weights)
    rng.shuffle(first)
    more = rng.choices(list(weights), weights=list(weights.values()), k=max(0, count - len(first)))
    return [*first, *more][:count]
