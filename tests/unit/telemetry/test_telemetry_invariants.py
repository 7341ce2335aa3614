"""The invariants themselves: a good trace passes, and each kind of breach is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from telemetry import names
from telemetry.record import LinkRecord, SpanRecord
from tests.support.trace_invariants import check_trace_invariants

MS = 1_000_000
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT = "00f067aa0ba902b7"


def message(operation: str) -> dict[str, object]:
    return {
        "messaging.system": "redis",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": "q",
        "messaging.message.id": "job-1",
        "job.id": "job-1",
    }


def span(
    number: int, parent: str | None, name: str, kind: str, start: int, end: int, **more: object
) -> SpanRecord:
    return SpanRecord(
        trace_id=TRACE_ID,
        span_id=f"{number:016x}",
        parent_id=parent,
        name=name,
        kind=kind,
        service="svc",
        start_ns=start * MS,
        end_ns=end * MS,
        **more,  # type: ignore[arg-type]  # test data
    )


HTTP = {
    "http.request.method": "POST",
    "url.scheme": "http",
    "url.path": "/",
    "http.response.status_code": 200,
}
SERVER = span(1, CLIENT, "POST /v1/jobs", "SERVER", 0, 20, attributes=HTTP)
SEND = span(2, SERVER.span_id, "send q", "PRODUCER", 5, 10, attributes=message("send"))
TO_SEND = (LinkRecord(TRACE_ID, SEND.span_id, {names.LINK_ROLE: names.LINK_CREATION}),)
FIRST = span(
    3,
    SEND.span_id,
    "process q",
    "CONSUMER",
    12,
    40,
    attributes={**message("process"), "job.attempt": 1, "error.type": "timeout"},
    links=TO_SEND,
    status="ERROR",
)
SECOND = span(
    4,
    SEND.span_id,
    "process q",
    "CONSUMER",
    50,
    90,
    attributes={**message("process"), "job.attempt": 2},
    links=TO_SEND,
)
GOOD = [SERVER, SEND, FIRST, SECOND]


def with_attributes(record: SpanRecord, **more: object) -> SpanRecord:
    changed = {**record.attributes, **{key.replace("__", "."): value for key, value in more.items()}}
    return replace(record, attributes=changed)  # type: ignore[arg-type]  # test data


GENERATION = {
    "gen_ai.operation.name": "text_completion",
    "gen_ai.provider.name": "throughline",
    "gen_ai.request.model": "m",
    "gen_ai.response.id": "cmpl-1",
    "gen_ai.response.model": "m",
    "gen_ai.response.finish_reasons": ("stop",),
    "gen_ai.usage.input_tokens": 3,
    "gen_ai.usage.output_tokens": 4,
    "job.id": "job-1",
}
ITEM = span(
    6,
    SECOND.span_id,
    "text_completion m",
    "INTERNAL",
    51,
    60,
    attributes={**GENERATION, "throughline.item.index": 0},
)
APART = replace(
    ITEM,
    span_id="7" * 16,
    trace_id="7" * 32,
    parent_id=None,
    attributes={**GENERATION, "throughline.item.index": 1},
    links=(
        LinkRecord(TRACE_ID, SEND.span_id, {names.LINK_ROLE: names.LINK_CREATION}),
        LinkRecord(TRACE_ID, SECOND.span_id, {names.LINK_ROLE: names.LINK_ATTEMPT}),
    ),
)


def test_invariants_hold_for_a_job_with_an_item_in_a_trace_of_its_own() -> None:
    check_trace_invariants([*GOOD, ITEM, APART], external={CLIENT}, usage={"job-1": (6, 8)})


@pytest.mark.parametrize(
    ("spans", "breach"),
    [
        ([ITEM, replace(APART, links=APART.links[:1])], "an item apart links to its job"),
        ([ITEM, replace(APART, links=APART.links[1:])], "an item apart links to its job"),
        ([ITEM, with_attributes(APART, job__id="job-2")], "an item apart links to its job"),
        ([ITEM, replace(APART, attributes=GENERATION)], "and is no item of a job"),
        ([APART], "items are 0..n-1"),
        ([ITEM, with_attributes(APART, throughline__item__index=0)], "an item is generated once"),
        ([ITEM], "usage adds up to the reply's"),
    ],
)
def test_invariants_tell_a_breach_of_items(spans: list[SpanRecord], breach: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_trace_invariants([*GOOD, *spans], external={CLIENT}, usage={"job-1": (6, 8)})

    assert breach in str(caught.value)


STEP_ID = "8" * 16
PREFILL = span(
    9,
    ITEM.span_id,
    "engine.prefill",
    "INTERNAL",
    52,
    55,
    links=(LinkRecord("8" * 32, STEP_ID, {names.LINK_ROLE: names.LINK_STEP}),),
)
JOINED, LEFT = (
    LinkRecord(TRACE_ID, SECOND.span_id, {names.LINK_ROLE: role})
    for role in (names.LINK_JOINED, names.LINK_LEFT)
)
STEP = replace(
    span(8, None, "engine.step", "INTERNAL", 52, 53, links=(JOINED, LEFT)),
    trace_id="8" * 32,
    span_id=STEP_ID,
    attributes={f"throughline.engine.step.{key}": 1 for key in (
        "batch_size", "prefill_tokens", "decode_tokens", "kv_blocks_used", "kv_blocks_total",
        "running", "waiting", "preempted", "joined", "left",
    )},
)  # fmt: skip


def test_invariants_hold_for_a_job_whose_first_step_is_drawn() -> None:
    generation = replace(ITEM, start_ns=PREFILL.start_ns, end_ns=PREFILL.end_ns)
    check_trace_invariants([*GOOD, generation, PREFILL, STEP], external={CLIENT})


@pytest.mark.parametrize(
    ("prefill", "step", "breach"),
    [
        (PREFILL, replace(STEP, trace_id=TRACE_ID, parent_id=ITEM.span_id), "a step stands alone"),
        (replace(PREFILL, trace_id="8" * 32, parent_id=STEP_ID), STEP, "a step stands alone"),
        (PREFILL, replace(STEP, links=(LEFT,)), "a step links to whom it admitted"),
        (PREFILL, replace(STEP, links=(JOINED, JOINED)), "a step links once to who joined"),
        (PREFILL, replace(STEP, links=(LinkRecord(TRACE_ID, SEND.span_id, JOINED.attributes),)), "send q"),
        (PREFILL, replace(STEP, start_ns=40 * MS), "a prefill begins with the step"),
        (replace(PREFILL, name="engine.decode"), STEP, "prefills link to steps"),
        (PREFILL, replace(STEP, attributes={}), "engine.step lacks throughline.engine.step.batch_size"),
    ],
)
def test_invariants_tell_a_breach_of_steps(prefill: SpanRecord, step: SpanRecord, breach: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_trace_invariants([*GOOD, ITEM, prefill, step], external={CLIENT})

    assert breach in str(caught.value)


def test_invariants_hold_for_a_retried_job() -> None:
    check_trace_invariants(GOOD, external={CLIENT}, canaries=["San Francisco"], failed_job_ids=())


def drawn_lost(error_type: str) -> list[SpanRecord]:
    """The first attempt, ended late with `error_type`, beside the mark of the second one."""
    late = replace(FIRST, status="ERROR", attributes={**FIRST.attributes, "error.type": error_type})
    attributes = {"job.id": "job-1", "job.attempt": 1, "error.type": "worker_lost"}
    lost = span(15, SEND.span_id, "lost q", "INTERNAL", 41, 50, attributes=attributes)
    return [SERVER, SEND, late, SECOND, replace(lost, status="ERROR")]


def test_invariants_hold_for_an_attempt_that_outlived_its_lease() -> None:
    check_trace_invariants(drawn_lost("lease_lost"), external={CLIENT}, failed_job_ids=())


def test_invariants_tell_an_attempt_that_is_drawn_as_lost_and_says_otherwise() -> None:
    with pytest.raises(AssertionError, match="attempts are 1"):
        check_trace_invariants(drawn_lost("engine_hung"), external={CLIENT}, failed_job_ids=())


@pytest.mark.parametrize(
    ("spans", "breach"),
    [
        (GOOD[1:], "no orphan"),
        ([replace(SERVER, parent_id=None), SEND, FIRST, replace(SECOND, parent_id=None)], "one root a trace"),
        ([*GOOD, SERVER], "ids are unique"),
        ([replace(SERVER, end_ns=-1), *GOOD[1:]], "no span ends before it starts"),
        ([SERVER, replace(SEND, end_ns=30 * MS), FIRST, SECOND], "children lie inside their parent"),
        ([SERVER, SEND, replace(FIRST, links=()), SECOND], "process links to its send"),
        (
            [SERVER, SEND, replace(FIRST, links=(LinkRecord(TRACE_ID, "f" * 16, {}),)), SECOND],
            "no dangling link",
        ),
        ([SERVER, replace(SEND, kind="CLIENT"), FIRST, SECOND], "one PRODUCER a message"),
        ([*GOOD, replace(SEND, span_id="a" * 16)], "one PRODUCER a message"),
        ([SERVER, SEND, SECOND], "attempts are 1..k"),
        (
            [with_attributes(SERVER, gen_ai__usage__input_tokens=1), *GOOD[1:]],
            "gen_ai.* on generation spans only",
        ),
        ([with_attributes(SERVER, http__method="POST"), *GOOD[1:]], "every attribute is in the table"),
        ([with_attributes(SERVER, url__path=7), *GOOD[1:]], "every attribute has its type"),
        ([replace(SERVER, attributes={}), *GOOD[1:]], "lacks http.request.method"),
        ([*GOOD, span(5, SERVER.span_id, "text_completion m", "INTERNAL", 1, 2)], "below a process span"),
        ([SERVER, SEND, replace(FIRST, name="run/x"), SECOND], "every span is in the table"),
        ([with_attributes(SERVER, url__path="/San Francisco"), *GOOD[1:]], "no prompt or output"),
        ([SERVER, SEND, FIRST, replace(SECOND, status="ERROR")], "ERROR iff the job failed"),
        ([replace(SERVER, num_dropped=1), *GOOD[1:]], "nothing is cut off"),
    ],
)
def test_invariants_tell_a_breach(spans: list[SpanRecord], breach: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_trace_invariants(spans, external={CLIENT}, canaries=["San Francisco"], failed_job_ids=())

    assert breach in str(caught.value)


CLAIM = span(8, SECOND.span_id, "claim", "INTERNAL", 50, 51, attributes={"job.id": "job-1"})
WAIT = span(
    9,
    SEND.span_id,
    "queue q",
    "INTERNAL",
    40,
    50,
    attributes={"job.id": "job-1", "throughline.queue.wait": 0.01},
)
PHASES = [
    span(10, ITEM.span_id, "engine.wait", "INTERNAL", 51, 53),
    span(11, ITEM.span_id, "engine.decode", "INTERNAL", 53, 60),
]
RECEIVED = span(12, SECOND.span_id, "receive output", "INTERNAL", 60, 62, attributes={"job.id": "job-1"})
TIMED = [*GOOD, ITEM, CLAIM, WAIT, *PHASES, RECEIVED]


def later(record: SpanRecord, milliseconds: int) -> SpanRecord:
    return replace(
        record, start_ns=record.start_ns + milliseconds * MS, end_ns=record.end_ns + milliseconds * MS
    )


def test_invariants_hold_for_spans_that_touch() -> None:
    check_trace_invariants(TIMED, external={CLIENT})


@pytest.mark.parametrize(
    ("whole", "changed", "breach"),
    [
        (PHASES[1], replace(PHASES[1], start_ns=55 * MS), "phases fill their generation"),
        (RECEIVED, later(RECEIVED, 3), "an output is received from the last token on"),
        (WAIT, later(WAIT, -5), "an attempt begins where its wait ends"),
        (SECOND, replace(SECOND, end_ns=500 * MS), "all time has a name"),
    ],
)
def test_invariants_tell_time_that_is_lost(whole: SpanRecord, changed: SpanRecord, breach: str) -> None:
    with pytest.raises(AssertionError, match=breach):
        check_trace_invariants([changed if each is whole else each for each in TIMED], external={CLIENT})


def test_invariants_tell_a_wait_that_neither_queue_nor_process_explains() -> None:
    job = {"job.id": "job-1"}
    server = replace(SERVER, end_ns=600 * MS)
    waited = span(13, SERVER.span_id, "wait result", "INTERNAL", 10, 590, attributes=job)
    fetched = span(14, SERVER.span_id, "fetch result", "INTERNAL", 590, 600, attributes=job)

    with pytest.raises(AssertionError, match="queue, process and wait add up: 5"):
        check_trace_invariants([server, waited, fetched, *TIMED[1:]], external={CLIENT})
