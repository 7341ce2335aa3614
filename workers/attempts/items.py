"""The prompts of one job in one attempt: which are left to run, and what became of each.

    claim.items ──▶ Items ──missing──▶ engine ──ended──▶ take ──▶ unstored ──▶ the store, as they end
                      └──────────── all of them, in the order of the request ──────────▶ settlement

An item that attempts before ended is not run again, unless it failed of something that may pass.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.outputs import RequestOutput
from jobs.model import Failure, ItemResult, JobRequest, JobResult
from jobs.states import JobState
from jobs.store import Settlement
from workers.attempts.result import item_result
from workers.engines.protocol import Outcome
from workers.engines.runtime import Generation


class Items:
    """For one thread.

    Attributes:
        are_many: Whether the job has several prompts: the items of others are not stored by themselves.
        missing: Places in the request of the prompts that this attempt has to run.
        generation: Of the missing ones, in their order, once the engine has them.
        outcomes: What the engine had made of them when `take` was called last, by place.
    """

    def __init__(self, request: JobRequest, stored: Mapping[int, ItemResult]) -> None:
        self._num = len(request.prompts)
        self._results = {index: item for index, item in stored.items() if not _may_be_tried_again(item)}
        self._unstored: dict[int, ItemResult] = {}
        self._num_taken = 0
        self.are_many = self._num > 1
        self.missing = tuple(index for index in range(self._num) if index not in self._results)
        self.generation: Generation | None = None
        self.outcomes: dict[int, Outcome] = {}

    def take(self) -> None:
        """Take in what has ended since the last time."""
        if self.generation is None:
            return
        places = dict(zip(self.generation.request_ids, self.missing, strict=True))
        for outcome in self.generation.ended[self._num_taken :]:
            self._num_taken += 1
            index = places[outcome.request_id]
            self.outcomes[index] = outcome
            self._results[index] = self._unstored[index] = item_result(outcome)

    @property
    def outputs(self) -> list[RequestOutput]:
        """Of the outcomes, those that ran."""
        return [outcome for outcome in self.outcomes.values() if isinstance(outcome, RequestOutput)]

    @property
    def unstored(self) -> Mapping[int, ItemResult]:
        return dict(self._unstored)

    def are_stored(self) -> None:
        """What `unstored` held is in the store."""
        self._unstored.clear()

    def forget_unstored(self) -> None:
        """Another attempt will run it."""
        for index in self._unstored:
            del self.outcomes[index], self._results[index]
        self._unstored.clear()

    @property
    def num_completed(self) -> int:
        return len(self._results) - self.num_failed

    @property
    def num_failed(self) -> int:
        return sum(item.failure is not None for item in self._results.values())

    @property
    def passing_failure(self) -> Failure | None:
        """Of an item that may be tried again; None where there is nothing more to try."""
        passing = (item.failure for item in self._results.values() if _may_be_tried_again(item))
        return next(passing, None)

    def settlement(self) -> Settlement:
        """Once every item has ended."""
        result = JobResult(items=tuple(self._results[index] for index in range(self._num)))
        failure = result.failure
        if failure is None:
            return Settlement(JobState.COMPLETED, result=result)
        return Settlement(JobState.FAILED, failure=failure, result=result if self.are_many else None)


def _may_be_tried_again(item: ItemResult) -> bool:
    return item.failure is not None and item.failure.retryable
