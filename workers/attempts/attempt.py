"""One attempt at one job: claim, generate, settle, or give back.

message ─▶ claim ─┬─ not ours, ended, unknown ─────────────▶ acknowledge
└─ ours ─▶ engine ─┬─ outcomes ──────────▶ settle completed, failed ─▶ acknowledge
├─ one may pass ──────▶ release, requeue the message
├─ refused ───────────▶ settle failed
├─ cancel, deadline ──▶ settle cancelled, expired
├─ lease lost ────────▶ say nothing
├─ engine lost ───────▶ release, requeue the message; with its own failure, after a pause
└─ worker stops ──────▶ release; Celery requeues the message
"""

from __future__ import annotations

import asyncio
import logging
import threading
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import partial
from time import monotonic, time_ns
from typing import TypeVar

from engine.errors import InvalidRequestError
from engine.sampling import SamplingParams, StructuredOutput
from jobs.clock import Clock
from jobs.errors import StoreUnavailable
from jobs.model import Failure, JobId, JobRequest, LeaseToken, WorkerId, new_lease_token
from jobs.states import JobState
from jobs.store import AttemptStore, Claim, ClaimOutcome, Settlement, SettleOutcome
from telemetry.log import logged_job
from telemetry.spans import traceparent
from workers.attempts.company import Company, Grade, Place, grade_of
from workers.attempts.holding import HeldJob, Holding
from workers.attempts.items import Items
from workers.attempts.observe import AttemptObserver, HandOver
from workers.attempts.pause import RetryPause
from workers.attempts.result import AttemptStamps, job_timings
from workers.delivery import Delivery
from workers.engines.protocol import EngineRequest, Refused
from workers.engines.runtime import Runtime
from workers.errors import CancelWished, DeadlinePassed, EngineLost, EngineRefused, LeaseLost
from workers.pool import JobStopped, TaskHandle, current_handle

logger = logging.getLogger(__name__)

T = TypeVar("T")

STORE_ITEMS_SECONDS = 1.0
"""How often ended items of a running job of many prompts are stored: what a lost worker costs of them."""


STOP_CHECK_SECONDS = 0.1
"""How often an attempt that waits for an absent store asks whether the worker stops."""


ENDED_EARLY = (EngineLost, CancelWished, DeadlinePassed, JobStopped)


class Verdict(Enum):
    """What becomes of the message."""

    ACKNOWLEDGE = auto()
    REQUEUE = auto()


@dataclass(slots=True)
class _Run:
    """One stay in the engine, or what is known of it by now."""

    delivery: Delivery
    token: LeaseToken
    request: JobRequest
    params: SamplingParams
    items: Items
    asked_at_ns: int


class _Once:
    """Does it once, whoever calls first."""

    __slots__ = ("_act",)

    def __init__(self, act: Callable[[], None]) -> None:
        self._act: Callable[[], None] | None = act

    def __call__(self) -> None:
        act, self._act = self._act, None
        if act is not None:
            act()


@dataclass(frozen=True, slots=True)
class AttemptRunner:
    """Everything an attempt needs; `run` is called in the pool's event loop."""

    store: AttemptStore
    runtime: Runtime
    holding: Holding
    observer: AttemptObserver
    clock: Clock
    worker: WorkerId
    lease_seconds: float
    is_stopping: threading.Event
    company: Company = field(default_factory=Company)
    message_settled: Callable[[str], None] = lambda tag: None
    """Told the tag of a message that went with its job's settling; whoever acknowledges messages listens."""
    pause: RetryPause = field(default_factory=RetryPause)

    async def run(self, delivery: Delivery) -> Verdict:
        """Raises JobStopped when the worker shuts down; the job is queued again by then."""
        with logged_job(delivery.id):
            return await self._run(delivery, received_at_ns=time_ns())

    async def _run(self, delivery: Delivery, *, received_at_ns: int) -> Verdict:
        token = new_lease_token()
        claim = await self._insist(lambda: self._claim(delivery.id, token))
        if claim is None:
            return Verdict.REQUEUE
        claimed_at_ns = time_ns()
        try:
            return await self._run_claimed(delivery, claim, token, received_at_ns)
        finally:
            self.observer.is_over(delivery, claim, received_at_ns, claimed_at_ns)

    async def _run_claimed(
        self, delivery: Delivery, claim: Claim, token: LeaseToken, received_at_ns: int
    ) -> Verdict:
        if claim.outcome is not ClaimOutcome.CLAIMED or claim.request is None:
            self.observer.dropped(delivery, claim, received_at_ns)
            return Verdict.ACKNOWLEDGE
        tell_claim = _Once(partial(self.observer.claimed, delivery, claim, received_at_ns))
        try:
            return await self._generate(delivery, claim, claim.request, token, tell_claim)
        except Exception as error:  # a fault of ours: the job must not stay behind under a dead lease
            return await self._give_back(delivery, claim, token, _internal_failure(error))
        finally:
            tell_claim()  # at the latest

    async def _claim(self, id: JobId, token: LeaseToken) -> Claim:
        return await self.store.claim(
            id,
            token,
            self.worker,
            now=self.clock.now(),
            lease_seconds=self.lease_seconds,
            traceparent=traceparent() or None,
        )

    async def _generate(
        self,
        delivery: Delivery,
        claim: Claim,
        request: JobRequest,
        token: LeaseToken,
        tell_claim: Callable[[], None],
    ) -> Verdict:
        """What can be told late is told while the engine works, or when the client has its answer."""
        claimed_at = self.clock.now()
        handle = current_handle()
        held = HeldJob(delivery.id, token, claim.expires_at, handle.end)
        asked_at_ns = time_ns()
        items = Items(request, claim.items)
        try:
            params = sampling_params(request.sampling)
            run = _Run(delivery, token, request, params, items, asked_at_ns)
            if items.missing:  # else the attempt before ended between its last item and its settling
                with self.holding.hold(held):
                    await self._run_missing(run, grade_of(claim.forgiven), handle, tell_claim)
        except (InvalidRequestError, EngineRefused) as refusal:
            return await self._settle(
                delivery, token, Settlement(JobState.FAILED, failure=_as_failure(refusal))
            )
        except CancelWished:
            return await self._settle(delivery, token, Settlement(JobState.CANCELLED))
        except DeadlinePassed:
            return await self._settle(delivery, token, Settlement(JobState.EXPIRED))
        except LeaseLost:
            self.observer.lease_lost(delivery)
            return Verdict.ACKNOWLEDGE
        except EngineLost as lost:
            is_forgiven = not grade_of(claim.forgiven).is_alone
            return await self._give_back(delivery, claim, token, lost.failure, is_forgiven=is_forgiven)
        except JobStopped:
            self.observer.handed_back(await self._release(delivery, token, None))
            raise
        received_at_ns, generated_at = time_ns(), self.clock.now()
        items.take()
        if (failure := items.passing_failure) is not None:
            await self._store_and_tell_items(run)
            return await self._give_back(delivery, claim, token, failure)
        settlement = items.settlement()
        stamps = AttemptStamps(claim.queued_at, claimed_at, generated_at, settled_at=self.clock.now())
        settlement = replace(settlement, timings=job_timings(items.outputs, stamps))
        outcome = await self._store(delivery, token, settlement)
        with self.observer.reporting(delivery):
            # Not before: a job of thousands of prompts has as many spans, and its client waits.
            await self._tell_items(run, received_at_ns)
            return self._tell(delivery, settlement, outcome)

    async def _run_missing(
        self, run: _Run, grade: Grade, handle: TaskHandle, tell_claim: Callable[[], None]
    ) -> None:
        """What had ended before an attempt was ended early is stored, and need not run again."""
        try:
            await self._run_in_company(run, grade, handle, tell_claim)
        except BaseException as ending:
            self.observer.interrupted(run.delivery, run.asked_at_ns)
            if run.items.are_many and isinstance(ending, ENDED_EARLY):
                run.items.take()
                await self._store_and_tell_items(run)
            raise

    async def _run_in_company(
        self, run: _Run, grade: Grade, handle: TaskHandle, tell_claim: Callable[[], None]
    ) -> None:
        """Be in the engine with the company that the job's past allows; a lone run is noted beforehand."""

        async def wait(place: Place) -> None:
            tell_claim()
            await handle.wait(place)

        async with self.company.join(grade, wait):
            if grade.is_alone:
                is_ours = await self._insist(lambda: self.store.mark_alone(run.delivery.id, run.token))
                if is_ours is None:
                    raise JobStopped("the worker shuts down")
                if not is_ours:
                    raise LeaseLost("the lease is another worker's")
            await self._run_engine(run, handle, tell_claim)

    async def _run_engine(self, run: _Run, handle: TaskHandle, tell_claim: Callable[[], None]) -> None:
        """Return when every item has ended; those of many are stored as they do."""
        generation = run.items.generation = self.runtime.submit(engine_requests(run))
        try:
            tell_claim()  # now that the engine is at work
            meanwhile = partial(self._store_some_items, run) if run.items.are_many else None
            outcomes = await handle.wait(
                generation.future, meanwhile=meanwhile, every_seconds=STORE_ITEMS_SECONDS
            )
        except BaseException as ending:
            if not isinstance(ending, EngineLost):  # after which nothing is left to abort
                self.runtime.abort(generation)
            raise
        if not run.items.are_many and isinstance(outcomes[0], Refused):
            raise EngineRefused(outcomes[0].reason, outcomes[0].message)

    async def _store_and_tell_items(self, run: _Run) -> None:
        """Before the job goes back. What could not be stored will run again, and be told of then."""
        received_at_ns = time_ns()
        if not run.items.outcomes:
            return
        with self.observer.reporting(run.delivery):
            if run.items.are_many:
                await self._insist(partial(self._store_items, run), max_tries=3)
                run.items.forget_unstored()
            await self._tell_items(run, received_at_ns)

    async def _store_some_items(self, run: _Run) -> None:
        run.items.take()
        try:
            is_ours = await self._store_items(run)
        except StoreUnavailable as error:
            logger.info("items were not stored, trying again with the next: %s", error)
            return
        if not is_ours:
            raise LeaseLost("the lease is another worker's")

    async def _store_items(self, run: _Run) -> bool:
        """False when the lease is another's."""
        unstored = run.items.unstored
        if not unstored:
            return True
        is_ours = await self.store.keep(
            run.delivery.id,
            run.token,
            unstored,
            completed=run.items.num_completed,
            failed=run.items.num_failed,
        )
        if is_ours:
            run.items.are_stored()
        return is_ours

    async def _tell_items(self, run: _Run, received_at_ns: int) -> None:
        """An attempt tells of the items that it ran, not of those before it."""
        if run.items.generation is None or not run.items.outcomes:
            return
        hand_over = HandOver(run.asked_at_ns, received_at_ns)
        outcomes, traced = run.items.outcomes, run.items.generation.traced
        tell = partial(
            self.observer.generated, run.delivery, run.request, run.params, outcomes, hand_over, traced
        )
        if run.items.are_many:  # the other attempts' loop must not stand still for so many spans
            await asyncio.to_thread(tell)
        else:
            tell()

    async def _settle(self, delivery: Delivery, token: LeaseToken, settlement: Settlement) -> Verdict:
        return self._tell(delivery, settlement, await self._store(delivery, token, settlement))

    async def _store(
        self, delivery: Delivery, token: LeaseToken, settlement: Settlement
    ) -> SettleOutcome | None:
        with self.observer.settling(delivery):
            outcome = await self._insist(
                lambda: self.store.settle(
                    delivery.id, token, settlement, now=self.clock.now(), message_tag=delivery.tag
                )
            )
        if outcome in (SettleOutcome.SETTLED, SettleOutcome.CANCELLED):
            self.message_settled(delivery.tag)
        return outcome

    def _tell(self, delivery: Delivery, settlement: Settlement, outcome: SettleOutcome | None) -> Verdict:
        if outcome is None:
            return Verdict.REQUEUE
        self.observer.settled(delivery, settlement, outcome)
        return Verdict.ACKNOWLEDGE

    async def _give_back(
        self,
        delivery: Delivery,
        claim: Claim,
        token: LeaseToken,
        failure: Failure,
        *,
        is_forgiven: bool = False,
    ) -> Verdict:
        """An attempt that is forgiven is nobody's failure, and repeated at once."""
        pause_seconds = 0.0 if is_forgiven else self.pause.seconds_after(claim.attempt - claim.forgiven)
        outcome = await self._release(
            delivery, token, failure, is_forgiven=is_forgiven, pause_seconds=pause_seconds
        )
        if outcome is SettleOutcome.WAITING:
            self.message_settled(delivery.tag)
        if outcome is SettleOutcome.LOST:
            self.observer.lease_lost(delivery)
        else:
            self.observer.given_back(delivery, failure)
        return Verdict.ACKNOWLEDGE if outcome is not SettleOutcome.SETTLED else Verdict.REQUEUE

    async def _release(
        self,
        delivery: Delivery,
        token: LeaseToken,
        failure: Failure | None,
        *,
        is_forgiven: bool = False,
        pause_seconds: float = 0.0,
    ) -> SettleOutcome | None:
        async def release() -> SettleOutcome:
            now = self.clock.now()
            return await self.store.release(
                delivery.id,
                token,
                now=now,
                failure=failure,
                is_forgiven=is_forgiven,
                next_attempt_at=now + pause_seconds if pause_seconds else None,
                message_tag=delivery.tag,
            )

        with self.observer.giving_back(delivery.id):
            return await self._insist(release, max_tries=3)

    async def _insist(self, act: Callable[[], Awaitable[T]], *, max_tries: int | None = None) -> T | None:
        """Repeat a repeatable act until the store answers; None when the worker stops first."""
        tries = 0
        while True:
            try:
                return await act()
            except StoreUnavailable as error:
                tries += 1
                if tries == max_tries or await self._stops_within(min(5.0, 0.2 * 2**tries)):
                    logger.warning("gave up on the job store: %s", error)
                    return None

    async def _stops_within(self, seconds: float) -> bool:
        """True as soon as the worker stops; the event is another thread's."""
        deadline = monotonic() + seconds
        while not (is_stopping := self.is_stopping.is_set()) and monotonic() < deadline:
            await asyncio.sleep(min(STOP_CHECK_SECONDS, deadline - monotonic()))
        return is_stopping


def engine_requests(run: _Run) -> tuple[EngineRequest, ...]:
    """One for each missing item; ids carry the lease token, for two attempts may meet in one engine."""
    prompts = run.request.prompts
    return tuple(
        EngineRequest(
            f"{run.delivery.id}/{run.token}/{index}",
            prompts[index].token_ids,
            run.params,
            prompts[index].text,
        )
        for index in run.items.missing
    )


def sampling_params(stored: dict[str, object]) -> SamplingParams:
    """The engine's parameters from their JSON form, which knows neither tuples nor integer keys.

    Raises:
        InvalidRequestError: a value breaks a rule of the engine's.
    """
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    bias = values.get("logit_bias")
    if isinstance(bias, dict):
        values["logit_bias"] = {int(token): float(weight) for token, weight in bias.items()}
    structure = values.get("structured_outputs")
    if isinstance(structure, dict):
        values["structured_outputs"] = StructuredOutput(**structure)
    return SamplingParams(**values)  # type: ignore[arg-type]  # checked by SamplingParams itself


def _internal_failure(error: Exception) -> Failure:
    """Logged without the error's own words, which might quote a prompt."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("an attempt raised %s\n%s", type(error).__name__, frames)
    message = f"the worker raised {type(error).__name__}"
    return Failure(reason="internal_error", message=message, retryable=True)


def _as_failure(refusal: InvalidRequestError | EngineRefused) -> Failure:
    if isinstance(refusal, EngineRefused):
        return refusal.failure
    return Failure(reason=refusal.reason, message=str(refusal), retryable=False)
