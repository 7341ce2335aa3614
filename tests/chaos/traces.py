"""Which traces are whole, and for each that is not the one blow that took what it lacks.

A process that is killed takes its unsent spans with it, and nothing else may take any. What it held of a
trace, and when, is known without its spans: the client knows when it asked and when it was answered, and a
worker's log when a job's end was told. A trace that such a blow met may lack what that process made; what
the others made must still be there and keep every rule. Every other trace must have all of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum

from jobs.model import Job
from jobs.states import JobState
from telemetry import names
from telemetry.record import SpanRecord
from tests.chaos.load import Ask
from tests.chaos.rig import Strike
from tests.chaos.schedule import Kind
from tests.support.trace_invariants import check_trace_invariants
from tests.support.trace_times import CROWDED_UNNAMED_NS

UNSENT_SECONDS = 1.0
"""From a span's end until it has left its process: the export's delay (0.2 s in the drill) and one export on
two cores that other processes are being started on."""
RECOVERY_SECONDS = 10.0
"""From the mending of a connection until its users are back: a socket's time limit and a pause, 5 s each."""
KINDS_THAT_STALL = frozenset(
    {Kind.REDIS_KILL, Kind.REDIS_PAUSE, Kind.NET_CUT, Kind.NET_DELAY, Kind.NET_HALF_OPEN, Kind.WORKER_PAUSE}
)
RULES_OF_WAITS = ("queue, process and wait add up", "all time has a name")
"""Broken without the loss of a span where a store stands still."""
RULES_OF_ATTEMPTS = ("no dangling link: process ", "attempts are 1..k")
"""Broken where a worker gave a job back and died before it could tell."""

_STATUS = "http.response.status_code"
_WAITED = (names.SPAN_WAIT_RESULT, names.SPAN_FETCH_RESULT)
_COMPLETED = (names.SPAN_CLAIM, names.SPAN_RECEIVE_OUTPUT, names.SPAN_STORE_RESULT, names.SPAN_REPORT)
_PHASES = (names.SPAN_ENGINE_WAIT, names.SPAN_ENGINE_PREFILL, names.SPAN_ENGINE_DECODE)
_TOLD = re.compile(r"^(\S+) .* job=(\S+) .* job (?:completed|cancelled|failed|expired)\b", re.MULTILINE)


class Finding(StrEnum):
    WHOLE = "whole"
    LOST_ATTEMPT = "whole, with a marked lost attempt"
    PUT_BACK = "whole, put into the queue again by a worker"
    STALLED = "whole, with a wait that a fault made"
    API_KILLED = "torn: the killed API had not sent its part"
    WORKER_KILLED = "torn: the killed worker had not sent its part"
    BROKEN = "broken without a cause"


@dataclass(frozen=True, slots=True)
class Told:
    """The end of a job in the log of the process that settled it."""

    process: str
    at: float
    """Unix seconds."""


def read_told(logs: Mapping[str, str]) -> dict[str, Told]:
    """By job id; a job that nobody told of was settled by a process that died in the same moment."""
    return {
        job_id: Told(process, datetime.fromisoformat(stamp).timestamp())
        for process, text in logs.items()
        for stamp, job_id in _TOLD.findall(text)
    }


@dataclass(frozen=True, slots=True)
class Judgement:
    trace_id: str
    finding: Finding
    breaches: tuple[str, ...] = ()


class Audit:
    """Everything that is known of a drill's traces."""

    def __init__(
        self,
        spans: Sequence[SpanRecord],
        asks: Sequence[Ask],
        jobs: Mapping[str, Job],
        told: Mapping[str, Told],
        strikes: Sequence[Strike],
    ) -> None:
        self.traces: dict[str, list[SpanRecord]] = {}
        for span in spans:
            self.traces.setdefault(span.trace_id, []).append(span)
        self._known = {span.span_id: span.trace_id for span in spans}
        self.asks = {ask.trace_id: ask for ask in asks if ask.is_sampled}
        self._jobs = {str(job.trace_id): job for job in jobs.values()}
        self._failed = {id for id, job in jobs.items() if job.state is JobState.FAILED}
        self._told = told
        self.strikes = strikes

    def run(self) -> Iterator[Judgement]:
        """Of all that was asked, and of all that came."""
        for trace_id in {**self.asks, **self.traces}:
            ask = self.asks.get(trace_id)
            if trace_id in self.traces or (ask is not None and ask.status is not None):
                yield self.judge(trace_id, self.traces.get(trace_id, []))

    def judge(self, trace_id: str, spans: Sequence[SpanRecord]) -> Judgement:
        ask, job = self.asks.get(trace_id), self._jobs.get(trace_id)
        if ask is None:
            return Judgement(trace_id, Finding.BROKEN, ("nobody asked for it",))
        part = _Part(ask, job, spans)
        breaches = self._breaches(part.under_one_send() if part.is_put_back else part)
        if not breaches:
            return Judgement(trace_id, part.finding)
        if all(_is_about(RULES_OF_WAITS, breach) for breach in breaches) and self._is_stalled(part):
            return Judgement(trace_id, Finding.STALLED)
        finding, rest = self._without_the_dead(part)
        left = tuple(self._breaches(rest, is_cut=True)) if finding else tuple(breaches)
        if finding and not left:
            return Judgement(trace_id, finding)
        return Judgement(trace_id, Finding.BROKEN, left)

    def _breaches(self, part: _Part, *, is_cut: bool = False) -> list[str]:
        """`is_cut`: what was taken out leaves time without a name, and perhaps an attempt without a past."""
        breaches = list(part.missing())
        try:
            check_trace_invariants(
                part.spans,
                external={part.ask.span_id, *self._elsewhere(part)},
                failed_job_ids=self._failed,
                unnamed_ns=CROWDED_UNNAMED_NS,  # 32 requests at once, while processes start on the same cores
            )
        except AssertionError as error:
            breaches += str(error).splitlines()
        if is_cut:
            excused = RULES_OF_WAITS + (RULES_OF_ATTEMPTS if self._may_lack_an_attempt(part) else ())
            breaches = [breach for breach in breaches if not _is_about(excused, breach)]
        return breaches

    def _elsewhere(self, part: _Part) -> Iterator[str]:
        """Targets in other traces that came, or that a killed API had not sent."""
        for span in part.spans:
            for link in span.links:
                ask = self.asks.get(link.trace_id)
                came = self.traces.get(link.trace_id, [])
                is_lost = ask is not None and self._killed_api(ask, came) is not None
                if link.trace_id != span.trace_id and (link.span_id in self._known or is_lost):
                    yield link.span_id

    def _without_the_dead(self, part: _Part) -> tuple[Finding | None, _Part]:
        """The trace without what killed processes held of it; None where no blow met it."""
        api, worker = self._killed_api(part.ask, part.spans), self._killed_worker(part)
        finding = None
        if worker is not None:
            part = replace(part, spans=part.not_of(worker), is_attempt_lost=True)
            finding = Finding.WORKER_KILLED
        elif self._may_lack_an_attempt(part):
            finding = Finding.WORKER_KILLED
        if api is not None:
            part = replace(part, spans=part.not_of(api), is_request_lost=True)
            finding = Finding.API_KILLED
        is_headless = api is not None or part.is_put_back
        return finding, part.under_one_send() if is_headless else part

    def _killed_api(self, ask: Ask, spans: Sequence[SpanRecord]) -> str | None:
        """The API that died while it held the request, or before it had sent the spans of it."""
        if any(span.parent_id == ask.span_id for span in spans):
            return None  # spans leave in the order in which they end, and the request's ends last
        for strike in self.strikes:
            is_its = ask.asked_at <= strike.at <= ask.ended_at + UNSENT_SECONDS
            if strike.fault.kind is Kind.API_KILL and is_its:
                return strike.victim
        return None

    def _killed_worker(self, part: _Part) -> str | None:
        """The worker that settled the job and died before it told, or before it had sent the spans of it."""
        job = part.job
        if job is None or job.finished_at is None or any(_settles(span, job) for span in part.spans):
            return None
        told = self._told.get(job.id)
        for strike in self._killed_workers():
            if told is None:  # by nobody, so it was one that died first
                is_its = strike.at >= job.finished_at
            else:
                is_its = strike.victim == told.process and 0 <= strike.at - told.at <= UNSENT_SECONDS
            if is_its:
                return strike.victim
        return None

    def _may_lack_an_attempt(self, part: _Part) -> bool:
        """An attempt is linked to that never came, and a worker was killed between the job's two ends."""
        job = part.job
        return (
            job is not None
            and part.lacks_an_attempt
            and any(
                job.created_at <= strike.at <= (job.finished_at or strike.at)
                for strike in self._killed_workers()
            )
        )

    def _killed_workers(self) -> list[Strike]:
        return [strike for strike in self.strikes if strike.fault.kind is Kind.WORKER_KILL]

    def _is_stalled(self, part: _Part) -> bool:
        """A store or a connection that the trace's processes used stood still meanwhile."""
        users = {span.service.rpartition("-")[0] for span in part.spans} | {"redis"}
        begin = min(span.start_ns for span in part.spans) / 1e9
        end = max(span.end_ns for span in part.spans) / 1e9
        return any(
            strike.fault.kind in KINDS_THAT_STALL
            and ({strike.victim, strike.victim.rpartition("-")[0]} & users)
            and strike.at <= end
            and begin <= strike.mended_at + RECOVERY_SECONDS
            for strike in self.strikes
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """A trace, or what is left of it when the spans of killed processes are taken out."""

    ask: Ask
    job: Job | None
    spans: Sequence[SpanRecord]
    is_request_lost: bool = False
    is_attempt_lost: bool = False

    @property
    def finding(self) -> Finding:
        if self.is_put_back:
            return Finding.PUT_BACK
        has_lost = any(span.name.startswith("lost ") for span in self.spans)
        return Finding.LOST_ATTEMPT if has_lost else Finding.WHOLE

    @property
    def is_put_back(self) -> bool:
        """A worker published the job: its message was lost, or never sent."""
        return any(span.name.startswith("send ") and span.kind == "CLIENT" for span in self.spans)

    @property
    def lacks_an_attempt(self) -> bool:
        ids = {span.span_id for span in self.spans}
        return any(
            link.attributes.get(names.LINK_ROLE) == names.LINK_PREVIOUS_ATTEMPT and link.span_id not in ids
            for span in self.spans
            for link in span.links
        )

    def not_of(self, process: str) -> list[SpanRecord]:
        return [span for span in self.spans if span.service != process]

    def missing(self) -> Iterator[str]:
        """What must be there of all that was promised: the rules of `trace_invariants` ask only what is."""
        if not self.is_request_lost and self.ask.status is not None:
            yield from self._missing_of_request(self.ask.status)
        if not self.is_attempt_lost and self.job is not None and self.job.state is JobState.COMPLETED:
            yield from self._missing_of_attempt(self.job)

    def _missing_of_request(self, status: int) -> Iterator[str]:
        server = next((span for span in self.spans if span.parent_id == self.ask.span_id), None)
        if server is None or server.attributes.get(_STATUS) != status:
            yield f"each reply has its span: none with status {status}"
            return
        wanted = [names.SPAN_ACCEPT]
        if status < 300:
            wanted.append(names.SPAN_STORE_JOB)
            if self.job is None:
                wanted.append(names.SPAN_FETCH_RESULT)  # of the job that an earlier request had made
            elif self.ask.order.is_sync:
                wanted += _WAITED
        yield from self._missing_below(server, wanted)
        if status < 300 and self.job is not None and not self._below(server, "send "):
            yield "a span is missing: send of an accepted job"

    def _missing_of_attempt(self, job: Job) -> Iterator[str]:
        settling = [span for span in self.spans if _settles(span, job)]
        if len(settling) != 1:
            yield f"one attempt settles a job: {job.id} has {len(settling)} spans of such"
            return
        yield from self._missing_below(settling[0], _COMPLETED)
        generations = self._below(settling[0], f"{names.OPERATION_TEXT_COMPLETION} ")
        if len(generations) != job.num_prompts:
            yield f"a span is missing: {job.num_prompts} generations, {len(generations)} came"
        for generation in generations:
            yield from self._missing_below(generation, _PHASES)

    def _missing_below(self, parent: SpanRecord, wanted: Sequence[str]) -> Iterator[str]:
        for name in wanted:
            if not self._below(parent, name):
                yield f"a span is missing: {name} below {parent.name}"

    def _below(self, parent: SpanRecord, name: str) -> list[SpanRecord]:
        return [
            span for span in self.spans if span.parent_id == parent.span_id and span.name.startswith(name)
        ]

    def under_one_send(self) -> _Part:
        """The same with the workers' part below the `send` that made the job, or below one in its place.

        The message of a job that is put back, and of one whose API died, knows the request's span only.
        """
        workers = [span for span in self.spans if not span.service.startswith("api-")]
        if not workers:
            return self
        others = [span for span in self.spans if span.service.startswith("api-")]
        own = {span.span_id for span in workers}
        send = next((span for span in others if span.kind == "PRODUCER"), None)
        if send is None:
            send = _stand_in(workers, others)
            others.append(send)
        moved = [_below_send(span, send, own) for span in workers]
        return replace(self, spans=[*others, *moved])


def _settles(span: SpanRecord, job: Job) -> bool:
    """A message that came too late only tells the job's state; it has no attempt."""
    return (
        span.kind == "CONSUMER"
        and names.JOB_ATTEMPT in span.attributes
        and span.attributes.get(names.JOB_STATE) == job.state.value
    )


def _stand_in(workers: Sequence[SpanRecord], others: Sequence[SpanRecord]) -> SpanRecord:
    """A `send` as the API would have made it."""
    named = next((span for span in workers if names.JOB_ID in span.attributes), workers[0])
    above = next((span for span in others if span.kind == "SERVER"), None)
    at_ns = above.end_ns if above else min(span.start_ns for span in workers)
    queue = next((span.name for span in workers if span.kind == "CONSUMER"), "process unknown")
    return SpanRecord(
        trace_id=named.trace_id,
        span_id="f" * 16,
        parent_id=above.span_id if above else None,
        name=queue.replace("process ", "send "),
        kind="PRODUCER",
        service="stand-in",
        start_ns=at_ns,
        end_ns=at_ns,
        attributes={
            names.MESSAGING_SYSTEM_KEY: names.MESSAGING_SYSTEM,
            names.MESSAGING_OPERATION_NAME: "send",
            names.MESSAGING_OPERATION_TYPE: "send",
            names.MESSAGING_DESTINATION_NAME: queue.removeprefix("process "),
            names.MESSAGING_MESSAGE_ID: named.attributes.get(names.JOB_ID),
        },
    )


def _below_send(span: SpanRecord, send: SpanRecord, own: set[str]) -> SpanRecord:
    links = tuple(
        replace(link, span_id=send.span_id)
        if link.attributes.get(names.LINK_ROLE) == names.LINK_CREATION
        else link
        for link in span.links
    )
    return replace(span, links=links, parent_id=span.parent_id if span.parent_id in own else send.span_id)


def _is_about(rules: Sequence[str], breach: str) -> bool:
    return breach.startswith(tuple(rules))
