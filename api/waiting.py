"""Waiting for jobs by push: one reader for all waiters of this process.

    settle script ──▶ reply stream of this replica ──▶ ReplyReader.run ──▶ a future for each waiter

A waiter is known to the reader before its job is watched, and watching tells the state at that moment, so
no ending falls between. After a cut the states of all awaited jobs are read again; the same is done every
RECHECK_SECONDS, for a stream that was trimmed or lost without the client's library telling us.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from jobs.errors import StoreUnavailable
from jobs.model import JobId, ReplicaId
from jobs.store import ReplyStream, SubmissionStore

READ_SECONDS = 2.0
"""How long one read waits for news; under the store's socket timeout."""
RECHECK_SECONDS = 30.0
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0
RECHECKS_AT_ONCE = 32
SUBMIT_SECONDS = 30.0
"""A job expected for longer and unknown to the store is gone; before, it may not be stored yet."""

_logger = logging.getLogger(__name__)

Ending = asyncio.Future[None]
"""Done when its job is final, or gone."""


class WaitOutcome(Enum):
    ENDED = "ended"
    TIMED_OUT = "timed_out"
    CLIENT_GONE = "client_gone"


class ReplyReader:
    """Belongs to one event loop; `run` is its only reader.

    Args:
        store: for watching jobs.
        stream: of the same store, over a connection that tells of every cut.
        replica: whose reply stream it is.
    """

    def __init__(self, store: SubmissionStore, stream: ReplyStream, replica: ReplicaId) -> None:
        self.replica = replica
        self._store = store
        self._stream = stream
        self._waiters: dict[JobId, set[Ending]] = {}
        self._expected_at: dict[JobId, float] = {}

    @property
    def num_waiters(self) -> int:
        return sum(map(len, self._waiters.values()))

    async def run(self) -> None:
        """Read and hand out until cancelled; a store that is away is waited for.

        `cancelling` is looked at because a client may lose a cancel that meets a reply; redis-py's does.
        """
        task = asyncio.current_task()
        assert task is not None
        position, pause = "0", FIRST_PAUSE_SECONDS
        is_cut, must_check, checked_at = False, False, self._now()
        while not task.cancelling():
            try:
                if must_check or self._now() - checked_at > RECHECK_SECONDS:
                    await self._recheck()
                    must_check, checked_at = False, self._now()
                replies = await self._stream.read_replies(self.replica, position, block_seconds=READ_SECONDS)
                is_cut, pause = False, FIRST_PAUSE_SECONDS
                for reply in replies:
                    position = reply.position
                    if reply.state.is_final:
                        self._end(reply.id)
            except Exception as error:  # the loop's edge: whatever it is, other waiters need the next round
                if not is_cut:
                    _log_cut(error, self.num_waiters)
                is_cut = must_check = True
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    @contextmanager
    def expect(self, id: JobId) -> Iterator[Ending]:
        """An ending for a job that is about to be created with this replica as its watcher."""
        ending: Ending = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(id, set()).add(ending)
        self._expected_at.setdefault(id, self._now())
        try:
            yield ending
        finally:
            endings = self._waiters.get(id, set())
            endings.discard(ending)
            if not endings:
                self._waiters.pop(id, None)
                self._expected_at.pop(id, None)

    async def wait(
        self, id: JobId, seconds: float, *, client_gone: asyncio.Future[None] | None = None
    ) -> WaitOutcome:
        """Wait for a job that exists; ENDED also when it does not. Raises StoreUnavailable."""
        with self.expect(id) as ending:
            state = await self._store.watch(id, self.replica)
            if state is None or state.is_final:
                return WaitOutcome.ENDED
            return await wait_for(ending, seconds, client_gone=client_gone)

    async def _recheck(self) -> None:
        """Watch every awaited job anew and end those that are final. Raises StoreUnavailable."""
        ids = list(self._waiters)
        for start in range(0, len(ids), RECHECKS_AT_ONCE):
            some = ids[start : start + RECHECKS_AT_ONCE]
            states = await asyncio.gather(*(self._store.watch(id, self.replica) for id in some))
            for id, state in zip(some, states, strict=True):
                if self._is_gone(id) if state is None else state.is_final:
                    self._end(id)

    def _is_gone(self, id: JobId) -> bool:
        return self._now() - self._expected_at.get(id, self._now()) > SUBMIT_SECONDS

    def _end(self, id: JobId) -> None:
        for ending in self._waiters.get(id, ()):
            if not ending.done():
                ending.set_result(None)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


async def wait_for(
    ending: Ending, seconds: float, *, client_gone: asyncio.Future[None] | None = None
) -> WaitOutcome:
    """The first of the ending, the client's leaving and the time; the ending wins a tie."""
    awaited = {ending} if client_gone is None else {ending, client_gone}
    done, _ = await asyncio.wait(awaited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    if ending in done:
        return WaitOutcome.ENDED
    return WaitOutcome.CLIENT_GONE if done else WaitOutcome.TIMED_OUT


def _log_cut(error: Exception, num_waiters: int) -> None:
    if isinstance(error, StoreUnavailable):
        _logger.warning(
            "Lost the reply stream with %d waiting; reading on when the store is back", num_waiters
        )
    else:
        _logger.error("The reply reader failed and starts again: %s", type(error).__name__, exc_info=error)
