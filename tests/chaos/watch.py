"""How long a killed worker's jobs lie still: looked up in Redis at the kill, then watched."""

from __future__ import annotations

import threading
import time

from redis.exceptions import RedisError

from jobs.model import JobId
from tests.chaos.rig import Rig, Strike

LOOK_SECONDS = 0.05
GIVE_UP_SECONDS = 60.0


class RedeliveryWatch:
    """One thread a killed worker; `seconds` fills as their first jobs begin anew."""

    def __init__(self, rig: Rig) -> None:
        self.seconds: list[float] = []
        self._rig = rig
        self._threads: list[threading.Thread] = []

    def look(self, strike: Strike) -> None:
        """Call right after a worker's SIGKILL."""
        try:
            held = self._held_by(strike)
        except RedisError:
            return  # Redis is hurt at the same time: what would be measured is that
        if held:
            thread = threading.Thread(target=self._watch, args=(strike, held), daemon=True)
            thread.start()
            self._threads.append(thread)

    def finish(self) -> None:
        for thread in self._threads:
            thread.join(GIVE_UP_SECONDS)

    def _held_by(self, strike: Strike) -> dict[JobId, str]:
        """Jobs in progress in that process, with their lease tokens."""
        client, keys = self._rig.client, self._rig.keys
        held = {}
        for queue in client.smembers(keys.queues):  # type: ignore[union-attr]  # the blocking client's
            for id in client.zrange(keys.open(queue), 0, -1):  # type: ignore[union-attr]  # as above
                state, worker, token = client.hmget(keys.job(id), "state", "worker", "lease_token")  # type: ignore[misc]  # as above
                if state == "in_progress" and f":{strike.pid}:" in (worker or ""):
                    held[JobId(id)] = token
        return held

    def _watch(self, strike: Strike, held: dict[JobId, str]) -> None:
        deadline = strike.at + GIVE_UP_SECONDS
        while time.time() < deadline:
            try:
                if any(self._is_begun_anew(id, token) for id, token in held.items()):
                    self.seconds.append(time.time() - strike.at)
                    return
            except RedisError:
                pass  # hurt too, for a moment
            time.sleep(LOOK_SECONDS)

    def _is_begun_anew(self, id: JobId, token: str) -> bool:
        """Another lease, or an end that the dead worker cannot have written."""
        client, keys = self._rig.client, self._rig.keys
        current, state = client.hmget(keys.job(id), "lease_token", "state")  # type: ignore[misc]  # as above
        return current != token or state not in ("in_progress", "cancelling")
