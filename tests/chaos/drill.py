"""One drill from calm to table: reference texts, load under faults, mending, checks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from jobs.model import Job
from tests.chaos import check
from tests.chaos.load import PROMPTS, TOKEN_COUNTS, Key, Log, Order, draw_orders, place
from tests.chaos.rig import Rig, running_rig
from tests.chaos.schedule import WEIGHTS, Fault, Kind, draw_schedule
from tests.chaos.traces import Audit, read_told
from tests.chaos.watch import RedeliveryWatch

SETTLE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    num_jobs: int
    seconds: float
    """Over which the faults are spread; the load lasts as long as it takes."""
    num_faults: int
    num_workers: int = 2
    lease_seconds: float = 9.0
    sample_ratio: float = 1.0
    """Of the traces: a receiver in memory has bounds."""
    max_spans: int = 400_000
    kinds: tuple[Kind, ...] = tuple(Kind)

    def schedule(self) -> tuple[Fault, ...]:
        weights = {kind: WEIGHTS[kind] for kind in self.kinds}
        return draw_schedule(self.seed, num_faults=self.num_faults, seconds=self.seconds, kinds=weights)


@dataclass
class Outcome:
    log: Log
    jobs: dict[str, Job]
    strikes: Counter[str]
    num_missed: int
    """Faults whose victim was down already."""
    redelivery_seconds: list[float]
    num_refused_results: int
    num_failed_exports: int
    audit: Audit
    traces: Counter[str]
    load_seconds: float
    settle_seconds: float
    breaches: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Markdown."""
        by_kind = Counter(answer.order.kind for answer in self.log.answers)
        states = Counter(job.state.value for job in self.jobs.values())
        attempts = sum(max(0, job.attempts - 1) for job in self.jobs.values())
        seconds = sorted(self.redelivery_seconds)
        rows: list[tuple[str, object]] = [
            *((f"accepted, {kind}", count) for kind, count in sorted(by_kind.items())),
            *((f"jobs in the store, {state}", count) for state, count in sorted(states.items())),
            ("breaches", len(self.breaches)),
            ("jobs run more than once", sum(job.attempts > 1 for job in self.jobs.values())),
            ("redeliveries", attempts),
            ("most attempts of a job", max((job.attempts for job in self.jobs.values()), default=0)),
            ("late results refused", self.num_refused_results),
            ("killed workers watched", len(seconds)),
            ("to the first redelivery, p50", f"{median(seconds):.1f} s" if seconds else "-"),
            ("to the first redelivery, max", f"{seconds[-1]:.1f} s" if seconds else "-"),
            *((f"traces, {kind}", count) for kind, count in sorted(self.traces.items())),
            ("exports of spans given up", self.num_failed_exports),
            *((f"refused or cut, {why}", count) for why, count in self.log.refusals.most_common()),
            ("slowest 503 store_unavailable", f"{self.log.slowest_refusal_seconds:.1f} s"),
            ("load", f"{self.load_seconds:.0f} s"),
            ("until all was settled", f"{self.settle_seconds:.1f} s"),
            *((f"fault, {kind}", count) for kind, count in sorted(self.strikes.items())),
            ("faults whose victim was down already", self.num_missed),
        ]
        return "\n".join(
            ["| what | figure |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
        )


def run(plan: Plan, folder: Path, *, say: Callable[[str], None] = print) -> Outcome:
    """Breaches are in the outcome; an exception means that the drill itself did not work."""
    with running_rig(
        folder,
        num_workers=plan.num_workers,
        lease_seconds=plan.lease_seconds,
        max_spans=plan.max_spans,
    ) as rig:
        texts = calm_texts(rig.url, say)
        orders = draw_orders(plan.seed, plan.num_jobs)
        say(f"{plan.num_jobs} jobs, {plan.num_faults} faults over {plan.seconds:g} s, seed {plan.seed}")
        return _storm(plan, rig, orders, texts, say)


def calm_texts(url: str, say: Callable[[str], None]) -> dict[Key, str]:
    """What each prompt is answered with, said twice in different company.

    Raises:
        RuntimeError: the two differ, so the model is no oracle.
    """
    pairs = [(prompt, count) for prompt in PROMPTS for count in TOKEN_COUNTS]
    singles = [Order(number, (prompt,), count, is_sync=True) for number, (prompt, count) in enumerate(pairs)]
    together = [Order(number, PROMPTS, count, is_sync=True) for number, count in enumerate(TOKEN_COUNTS)]
    first, second = _texts(url, singles, "calm-1"), _texts(url, together, "calm-2")
    if unequal := [key for key in first if first[key] != second[key]]:
        raise RuntimeError(f"greedy answers depend on their company: {unequal}")
    say(f"{len(first)} answers agreed on in the calm")
    return first


def _texts(url: str, orders: list[Order], tag: str) -> dict[Key, str]:
    answers = asyncio.run(place(url, orders, tag=tag, sample_ratio=0.0)).answers
    return {
        key: text
        for answer in answers
        for key, text in zip(answer.order.keys, answer.texts or (), strict=True)
    }


def _storm(
    plan: Plan, rig: Rig, orders: list[Order], texts: dict[Key, str], say: Callable[[str], None]
) -> Outcome:
    watch, missed, is_over = RedeliveryWatch(rig), [], threading.Event()
    began = time.monotonic()

    def strike_all() -> None:
        for fault in plan.schedule():
            if is_over.wait(max(0.0, began + fault.at_seconds - time.monotonic())):
                missed.append(fault)
                continue
            struck = rig.strike(fault)
            say(f"{fault}{'' if struck else '  missed'}")
            if struck is None:
                missed.append(fault)
            elif fault.kind is Kind.WORKER_KILL:
                watch.look(struck)

    striker = threading.Thread(target=strike_all, daemon=True)
    striker.start()
    log = asyncio.run(
        place(
            rig.url,
            orders,
            tag=f"storm-{plan.seed}",
            over_seconds=plan.seconds,
            sample_ratio=plan.sample_ratio,
        )
    )
    load_seconds = time.monotonic() - began
    say(f"all accepted after {load_seconds:.0f} s")
    is_over.set()
    striker.join()
    return _settle(rig, log, texts, watch, missed, load_seconds)


def _settle(
    rig: Rig,
    log: Log,
    texts: dict[Key, str],
    watch: RedeliveryWatch,
    missed: list[Fault],
    load_seconds: float,
) -> Outcome:
    ended = time.monotonic()
    rig.mend()
    check.wait_settled(rig, timeout_seconds=SETTLE_SECONDS)
    settle_seconds = time.monotonic() - ended
    watch.finish()
    warm_engines(rig)
    jobs = check.read_jobs(rig)
    rig.receiver.wait_for(lambda spans: False, timeout_seconds=2.0)  # the last spans are under way
    audit = Audit(rig.receiver.spans(), log.asks, jobs, read_told(rig.logs()), rig.strikes)
    judgements = list(audit.run())
    breaches = [
        *check.promises(log.answers, jobs),
        *check.results(log.answers, jobs, texts),
        *check.broker(rig),
        *check.keys(rig),
        *check.engines(rig),
        *(f"trace {trace.trace_id}: {breach}" for trace in judgements for breach in trace.breaches),
        *([f"the receiver forgot {rig.receiver.num_evicted} spans"] if rig.receiver.num_evicted else []),
    ]
    return Outcome(
        log=log,
        jobs=jobs,
        strikes=Counter(strike.fault.kind.value for strike in rig.strikes),
        num_missed=len(missed),
        redelivery_seconds=watch.seconds,
        num_refused_results=check.num_refused_results(rig),
        num_failed_exports=check.num_failed_exports(rig),
        audit=audit,
        traces=Counter(judgement.finding.value for judgement in judgements),
        load_seconds=load_seconds,
        settle_seconds=settle_seconds,
        breaches=breaches,
    )


def warm_engines(rig: Rig) -> None:
    """A few jobs more, so that engines which were just replaced tell of their blocks too."""
    orders = [Order(number, PROMPTS, 4, is_sync=True) for number in range(8 * len(rig.workers))]
    asyncio.run(place(rig.url, orders, tag="after", sample_ratio=0.0))
    check.wait_settled(rig, timeout_seconds=SETTLE_SECONDS)
