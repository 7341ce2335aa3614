"""What must hold for the spans of any end-to-end run, whatever it did.

    check_trace_invariants(receiver.spans(), canaries=["San Francisco"], external=[client_span_id])

Names of the rules are in the messages: an assertion lists every breach, not the first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from telemetry import names
from telemetry.record import SpanRecord, Value
from tests.support.trace_times import UNNAMED_NS, time_breaches

_TOLERANCE_NS = 2_000_000
_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "int": (int,),
    "double": (float, int),
    "boolean": (bool,),
    "string[]": (tuple,),
}


def check_trace_invariants(
    spans: Sequence[SpanRecord],
    *,
    external: Collection[str] = (),
    foreign_services: Collection[str] = (),
    foreign_names: Collection[str] = (),
    canaries: Iterable[str] = (),
    failed_job_ids: Collection[str] | None = None,
    usage: Mapping[str, tuple[int, int]] | None = None,
    unnamed_ns: int = UNNAMED_NS,
) -> None:
    """Fail with the list of all breaches.

    Args:
        spans: everything that was received.
        external: span ids that are nobody's of ours: a client's parent, a link's target elsewhere.
        foreign_services: services (the client's) whose span names and attributes are their own.
        foreign_names: of spans that the test itself made in our services.
        canaries: texts of prompts and outputs, which no string of any span may contain.
        failed_job_ids: the failed jobs, whose last attempts and no others are errors. None: not asked.
        usage: input and output tokens of jobs, as their replies told them.
        unnamed_ns: what one span may have that none below it covers, beside 1 %.
    """
    ours = [span for span in spans if span.service not in foreign_services and span.name not in foreign_names]
    breaches = [
        *_structure(spans, set(external)),
        *_ids_and_times(spans),
        *time_breaches(ours, unnamed_ns=unnamed_ns),
        *_deliveries(ours),
        *_attempts(ours),
        *_usage(ours),
        *_steps(ours),
        *_vocabulary(ours),
        *_content(ours, list(canaries)),
        *_drops(spans),
    ]
    if failed_job_ids is not None:
        breaches += _status(ours, set(failed_job_ids))
    for job_id, told in (usage or {}).items():
        breaches += _sum(ours, job_id, told)
    assert not breaches, "\n".join(breaches)


def _structure(spans: Sequence[SpanRecord], external: set[str]) -> Iterator[str]:
    known = {span.span_id for span in spans} | external
    roots = Counter(span.trace_id for span in spans if span.parent_id is None or span.parent_id in external)
    for trace_id in {span.trace_id for span in spans}:
        if roots[trace_id] != 1:
            yield f"one root a trace: {trace_id} has {roots[trace_id]}"
    for span in spans:
        if span.parent_id is not None and span.parent_id not in known:
            yield f"no orphan: {span.name} has parent {span.parent_id}, which never came"
        for link in span.links:
            if link.span_id not in known:
                yield f"no dangling link: {span.name} links to {link.span_id}, which never came"


def _ids_and_times(spans: Sequence[SpanRecord]) -> Iterator[str]:
    by_id = {span.span_id: span for span in spans}
    for span_id, count in Counter(span.span_id for span in spans).items():
        if count > 1:
            yield f"ids are unique: {by_id[span_id].name} came {count} times"
    for span in spans:
        if not re.fullmatch("[0-9a-f]{32}", span.trace_id) or not re.fullmatch("[0-9a-f]{16}", span.span_id):
            yield f"ids are well formed: {span.name} has {span.trace_id} {span.span_id}"
        if span.end_ns < span.start_ns:
            yield f"no span ends before it starts: {span.name}"
        parent = by_id.get(span.parent_id or "")
        if parent is not None and not _is_inside(span, parent):
            yield f"children lie inside their parent: {span.name} leaves {parent.name}"


def _is_inside(span: SpanRecord, parent: SpanRecord) -> bool:
    """Below a PRODUCER everything happens later; the wait begins with a stamp taken just before the send.

    In link-only mode a wait hangs below the attempt that it led to, and lies before it.
    A client has its answer, and may end its span, before the server's is done.
    """
    if parent.kind == "PRODUCER":
        return span.end_ns >= parent.start_ns
    if span.name.startswith("delay "):
        return span.end_ns <= parent.end_ns
    if span.name.startswith("queue "):
        return parent.start_ns - _TOLERANCE_NS <= span.end_ns <= parent.end_ns
    starts_after = span.start_ns >= parent.start_ns - _TOLERANCE_NS
    if parent.kind == "CLIENT" and span.kind == "SERVER":
        return starts_after
    return starts_after and span.end_ns <= parent.end_ns + _TOLERANCE_NS


def _deliveries(spans: Sequence[SpanRecord]) -> Iterator[str]:
    """One PRODUCER a message, and each of its CONSUMERs links to it."""
    producers: dict[Value, list[SpanRecord]] = {}
    for span in spans:
        if span.kind == "PRODUCER":
            producers.setdefault(span.attributes.get(names.MESSAGING_MESSAGE_ID), []).append(span)
    for message_id, sent in producers.items():
        if len(sent) > 1:
            yield f"one PRODUCER a message: {message_id!r} has {len(sent)}"
    for span in spans:
        if span.kind != "CONSUMER":
            continue
        sent = producers.get(span.attributes.get(names.MESSAGING_MESSAGE_ID), [])
        if sent and sent[0].span_id not in {link.span_id for link in span.links}:
            yield f"process links to its send: {span.name} does not"
        if not sent:
            yield f"one PRODUCER a message: {span.name} has none"


def _attempts(spans: Sequence[SpanRecord]) -> Iterator[str]:
    """Attempts of a job, even lost, are 1..k.

    One that outlived its lease is drawn twice: as lost by the next one, and by itself at its late end. A
    stopped worker's is not counted: the next one has its number.
    """
    numbers: dict[Value, list[int]] = {}
    late: list[tuple[Value, int]] = []
    for span in spans:
        job_id, attempt = span.attributes.get(names.JOB_ID), span.attributes.get(names.JOB_ATTEMPT)
        if not isinstance(attempt, int) or span.attributes.get(names.JOB_HANDED_BACK):
            continue
        if span.kind == "CONSUMER" and span.attributes.get(names.ERROR_TYPE) == "lease_lost":
            late.append((job_id, attempt))
        else:
            numbers.setdefault(job_id, []).append(attempt)
    for job_id, attempt in late:
        if attempt not in numbers.setdefault(job_id, []):
            numbers[job_id].append(attempt)
    for job_id, counted in numbers.items():
        if sorted(counted) != list(range(1, len(counted) + 1)):
            yield f"attempts are 1..k: job {job_id!r} has {sorted(counted)}"


def _usage(spans: Sequence[SpanRecord]) -> Iterator[str]:
    """Tokens are counted once: on generation spans, and each of those belongs to one delivery.

    It hangs below its `process` span; an item that its job's trace has no room for is a root linked to it.
    """
    by_id = {span.span_id: span for span in spans}
    for span in spans:
        gen_ai = [key for key in span.attributes if key.startswith("gen_ai.")]
        if gen_ai and not _is_generation(span):
            yield f"gen_ai.* on generation spans only: {span.name} has {gen_ai}"
        if not _is_generation(span):
            continue
        parent = by_id.get(span.parent_id or "")
        if span.parent_id is None:
            yield from _apart(span, by_id)
        elif parent is None or parent.kind != "CONSUMER":
            yield f"a generation lies below a process span: {span.name} does not"
    yield from _items(spans)


def _apart(span: SpanRecord, by_id: Mapping[str, SpanRecord]) -> Iterator[str]:
    """What a generation in a trace of its own must tell: its place in the job, and by links whose it is."""
    if names.ITEM_INDEX not in span.attributes:
        yield f"a generation lies below a process span: {span.name} does not, and is no item of a job"
    kinds = {names.LINK_CREATION: "PRODUCER", names.LINK_ATTEMPT: "CONSUMER"}
    found = {link.attributes.get(names.LINK_ROLE): by_id.get(link.span_id) for link in span.links}
    for role, kind in kinds.items():
        target = found.get(role)
        own = span.attributes.get(names.JOB_ID)
        if target is None or target.kind != kind or target.attributes.get(names.JOB_ID) != own:
            yield f"an item apart links to its job: {span.name} of {own!r} has no {role} link to a {kind}"


def _items(spans: Sequence[SpanRecord]) -> Iterator[str]:
    """Over all attempts of a job each item is generated once, but for tries that failed.

    They are numbered from 0, those below their attempt's span and those apart together; a killed worker takes
    spans of items with it and leaves holes.
    """
    has_lost = {span.attributes.get(names.JOB_ID) for span in spans if span.name.startswith("lost ")}
    done: dict[Value, list[int]] = {}
    failed: dict[Value, set[int]] = {}
    for span in spans:
        index, job_id = span.attributes.get(names.ITEM_INDEX), span.attributes.get(names.JOB_ID)
        if not _is_generation(span) or not isinstance(index, int):
            continue
        if span.status == "ERROR":
            failed.setdefault(job_id, set()).add(index)
        else:
            done.setdefault(job_id, []).append(index)
    for job_id in done.keys() | failed.keys():
        ran = set(done.get(job_id, ())) | failed.get(job_id, set())
        if len(set(done.get(job_id, ()))) < len(done.get(job_id, ())):
            yield f"an item is generated once: those of job {job_id!r} are {sorted(done[job_id])}"
        if job_id not in has_lost and ran != set(range(len(ran))):
            yield f"items are 0..n-1: those of job {job_id!r} are {sorted(ran)}"


def _sum(spans: Sequence[SpanRecord], job_id: str, told: tuple[int, int]) -> Iterator[str]:
    keys = (names.GEN_AI_USAGE_INPUT_TOKENS, names.GEN_AI_USAGE_OUTPUT_TOKENS)
    own = [span for span in spans if span.attributes.get(names.JOB_ID) == job_id]
    counted = tuple(sum(int(str(span.attributes.get(key, 0))) for span in own) for key in keys)
    if counted != told:
        yield f"usage adds up to the reply's: the spans of {job_id} have {counted}, its reply {told}"


def _is_generation(span: SpanRecord) -> bool:
    return span.name.startswith(f"{names.OPERATION_TEXT_COMPLETION} ")


def _steps(spans: Sequence[SpanRecord]) -> Iterator[str]:
    """A step and the prefill it began tell of each other; a step is nobody's child and nobody's parent."""
    by_id = {span.span_id: span for span in spans}
    for span in spans:
        parent = by_id.get(span.parent_id or "")
        if span.name == names.SPAN_ENGINE_STEP:
            yield from _step_links(span, by_id)
        if parent is not None and names.SPAN_ENGINE_STEP in (span.name, parent.name):
            yield f"a step stands alone: {span.name} lies below {parent.name}"
        for link in span.links:
            step = by_id.get(link.span_id)
            if link.attributes.get(names.LINK_ROLE) == names.LINK_STEP and step is not None:
                yield from _admission(span, step, by_id)


def _step_links(step: SpanRecord, by_id: Mapping[str, SpanRecord]) -> Iterator[str]:
    seen = Counter((link.span_id, link.attributes.get(names.LINK_ROLE)) for link in step.links)
    for (span_id, role), count in seen.items():
        target = by_id.get(span_id)
        if role not in (names.LINK_JOINED, names.LINK_LEFT) or count > 1:
            yield f"a step links once to who joined and who left: {role} {span_id} came {count} times"
        if target is not None and target.kind != "CONSUMER":
            yield f"a step links to process spans: it links to {target.name}"


def _admission(prefill: SpanRecord, step: SpanRecord, by_id: Mapping[str, SpanRecord]) -> Iterator[str]:
    if prefill.name != names.SPAN_ENGINE_PREFILL or step.name != names.SPAN_ENGINE_STEP:
        yield f"prefills link to steps: {prefill.name} links to {step.name}"
    if abs(prefill.start_ns - step.start_ns) > _TOLERANCE_NS:
        yield "a prefill begins with the step that it links to: one does not"
    ancestors = {span.span_id for span in _ancestors(prefill, by_id)}
    joined = {link.span_id for link in step.links if link.attributes[names.LINK_ROLE] == names.LINK_JOINED}
    if not joined & ancestors and names.STEP_LINKS_OMITTED not in step.attributes:
        yield "a step links to whom it admitted: a prefill's step does not know its process span"


def _ancestors(span: SpanRecord, by_id: Mapping[str, SpanRecord]) -> Iterator[SpanRecord]:
    above = by_id.get(span.parent_id or "")
    while above is not None:
        yield above
        above = by_id.get(above.parent_id or "")


def _vocabulary(spans: Sequence[SpanRecord]) -> Iterator[str]:
    types = {attribute.key: attribute.type for attribute in names.ATTRIBUTES}
    for span in spans:
        shape = names.shape_of(span.name, span.kind)
        if shape is None:
            yield f"every span is in the table: {span.name} [{span.kind}] is not"
            continue
        yield from (f"{span.name} lacks {key}" for key in shape.required if key not in span.attributes)
        allowed = {*shape.required, *shape.optional}
        for key, value in span.attributes.items():
            if key not in allowed:
                yield f"every attribute is in the table: {key} on {span.name} is not"
            elif not _has_type(value, types[key]):
                yield f"every attribute has its type: {key} on {span.name} is {value!r}, not {types[key]}"


def _has_type(value: Value, wanted: str) -> bool:
    if isinstance(value, bool):
        return wanted == "boolean"
    if not isinstance(value, _TYPES[wanted]):
        return False
    return not isinstance(value, tuple) or all(isinstance(item, str) for item in value)


def _content(spans: Sequence[SpanRecord], canaries: list[str]) -> Iterator[str]:
    for span in spans:
        for text in _strings(span):
            if any(canary in text for canary in canaries):
                yield f"no prompt or output: {span.name} holds one"


def _strings(span: SpanRecord) -> Iterator[str]:
    yield from (span.name, span.status_message)
    yield from _texts(span.attributes)
    for event in span.events:
        yield from (event.name, *_texts(event.attributes))
    for link in span.links:
        yield from _texts(link.attributes)


def _texts(value: Value) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _texts(inner)
    elif isinstance(value, tuple):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, bytes):
        yield value.decode(errors="replace")
    else:
        yield str(value)


def _status(spans: Sequence[SpanRecord], failed_job_ids: set[str]) -> Iterator[str]:
    last = {}
    for span in sorted(spans, key=lambda span: span.start_ns):
        if span.kind == "CONSUMER":
            last[span.attributes.get(names.JOB_ID)] = span
    for job_id, span in last.items():
        if (span.status == "ERROR") != (job_id in failed_job_ids):
            yield f"ERROR iff the job failed: the last attempt of {job_id!r} is {span.status}"


def _drops(spans: Sequence[SpanRecord]) -> Iterator[str]:
    for span in spans:
        if span.num_dropped:
            yield f"nothing is cut off: {span.name} lost {span.num_dropped}"
