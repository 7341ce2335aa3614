"""The two spans of a message, `send <queue>` and `process <queue>`, by today's messaging conventions.

The instrumentation package supplies the life cycle, the signals it listens to and the headers (W3C, at the
top level of the message); its spans are replaced, because what is wrong with them cannot be mended from
outside:

- a publish that fails leaves its span open, and current, in the caller's context for ever
- a retry overwrites the creation context, so attempts nest six deep instead of standing side by side
- names and attributes are of conventions long gone (schema 1.11), with no system, operation or link
- its state lies on the task by task id, so two deliveries of one message in one process mix their spans up

    send_task ──▶ before_task_publish     span opens, context goes into the headers
        │                                 (kept as it is where the message already has one)
        └─ returns or raises ───────────▶ span ends, always in the caller's thread
                                           (inside `sending`: with that block; so does that of a
                                           message that `jobs.message` makes without `send_task`)
    task_prerun ──▶ body ──▶ task_failure, task_retry ──▶ task_postrun
"""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from celery import Celery, current_app, current_task
from opentelemetry import context as context_api
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.instrumentation.celery import CeleryInstrumentor, celery_getter
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.util.types import AttributeValue

from telemetry import names
from telemetry.spans import link_to

_CELERY: Any = Celery  # whose method is exchanged for an observed one
_CREATION_KEY = context_api.create_key("throughline-creation-context")


def instrument_celery(*, uses_links_only: bool = False) -> None:
    """Every message this process sends or processes has its span; safe to call again.

    Call it after `configure`: in a worker with the threads pool at `worker_init`, in the API at start.
    Spans of the package itself, as `opentelemetry-instrument` switches them on, are switched off.

    `uses_links_only` makes `process` the root of a trace of its own that only links to `send`, and so the
    `send` of a message that is put back by a thread without a span.
    """
    stock = CeleryInstrumentor()  # type: ignore[no-untyped-call]  # the package has no types
    if stock.is_instrumented_by_opentelemetry:
        stock.uninstrument()
    ours = _CorrectedInstrumentor()
    if not ours.is_instrumented_by_opentelemetry:
        ours.instrument(uses_links_only=uses_links_only)


def uninstrument_celery() -> None:
    """Celery is as it was before `instrument_celery`."""
    ours = _CorrectedInstrumentor()
    if ours.is_instrumented_by_opentelemetry:
        ours.uninstrument()


def creation_context(request: Any) -> Context:
    """The context of the send span that a task's `request` (`task.request`) came with; empty without one."""
    if (deliveries := _deliveries.get()) and deliveries[-1].request is request:
        return deliveries[-1].creation
    return propagate.extract(request, context=Context(), getter=celery_getter)


@contextmanager
def publishing_again(creation: Context) -> Iterator[None]:
    """Messages published inside carry `creation` instead of a context of their own.

    For a job that goes back into its queue: its next attempt becomes a sibling of the last. `creation` is
    `creation_context(task.request)`, or `telemetry.spans.extract` of the job record's `traceparent`.
    """
    token = context_api.attach(context_api.set_value(_CREATION_KEY, creation))
    try:
        yield
    finally:
        context_api.detach(token)


class Sending:
    """The messages made in a block of `sending`."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def withdraw(self) -> None:
        """None of them was sent: their spans never end, so that nobody hears of them."""
        self.spans.clear()


@contextmanager
def sending() -> Iterator[Sending]:
    """Messages are made inside, on a channel that keeps them, and sent before the block is left.

    Their `send` spans last as long, with the error that leaves it; current they are only while made.
    """
    block = Sending()
    token = _sending.set(block)
    try:
        yield block
    except BaseException as error:
        for span in block.spans:
            _set_error(span, error)
        raise
    finally:
        _sending.reset(token)
        for span in block.spans:
            span.end()


def _end(span: Span) -> None:
    """With the block of `sending`, or at once."""
    if (block := _sending.get()) is not None:
        block.spans.append(span)
    else:
        span.end()


@dataclass
class _Publish:
    """One call of `send_task`; `span` and `activation` are there from `before_task_publish` on."""

    started_at_ns: int
    broker: Mapping[str, AttributeValue]
    span: Span = INVALID_SPAN
    activation: AbstractContextManager[Span] | None = None

    def open(self, span: Span) -> None:
        self.span = span
        self.activation = trace.use_span(span)
        self.activation.__enter__()

    def close(self) -> None:
        if self.activation is None:
            return
        self.activation.__exit__(None, None, None)
        _end(self.span)


@dataclass
class _Delivery:
    """One run of one message in one context: a pool thread's, or a coroutine's."""

    span: Span
    activation: AbstractContextManager[Span]
    token: Token[Context]
    request: Any
    creation: Context


_publish: ContextVar[_Publish | None] = ContextVar("throughline_publish", default=None)
_sending: ContextVar[Sending | None] = ContextVar("throughline_sending", default=None)
_deliveries: ContextVar[tuple[_Delivery, ...]] = ContextVar("throughline_deliveries", default=())
"""Innermost last: a task may run another one in place, by `apply`."""


class _CorrectedInstrumentor(CeleryInstrumentor):
    """The package's instrumentor with other spans; a test holds that what is overridden here exists there."""

    _instance = None  # a singleton beside the package's own
    _tracer: Tracer

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the package has no types

    def _instrument(self, **kwargs: Any) -> None:
        super()._instrument(**kwargs)  # type: ignore[no-untyped-call]  # as above
        self._uses_links_only = bool(kwargs.get("uses_links_only", False))
        self._tracer = trace.get_tracer(names.TRACER, tracer_provider=kwargs.get("tracer_provider"))
        self._original_send_task: Callable[..., Any] = Celery.send_task
        # The one method that every publish passes, and the only place that sees one fail.
        _CELERY.send_task = _observed(self._original_send_task)

    def _uninstrument(self, **kwargs: Any) -> None:
        _CELERY.send_task = self._original_send_task
        super()._uninstrument(**kwargs)  # type: ignore[no-untyped-call]  # as above

    def create_celery_metrics(self, meter: object) -> None:
        """None: the package's one histogram has no bucket below five seconds."""

    def _trace_before_publish(self, *args: Any, **kwargs: Any) -> None:
        headers = kwargs.get("headers")
        if not isinstance(headers, dict):
            return
        publish = _publish.get() or _Publish(
            time.time_ns(), _broker_attributes(current_app._get_current_object())
        )
        queue = kwargs.get("routing_key") or kwargs.get("exchange") or "unknown"
        creation = _existing_creation_context(headers)
        span = self._tracer.start_span(
            f"{names.OPERATION_SEND} {queue}",
            context=None if self._uses_links_only else _send_parent(creation),
            kind=SpanKind.PRODUCER if creation is None else SpanKind.CLIENT,
            links=[] if creation is None else link_to(creation, names.LINK_CREATION),
            attributes={
                **_message_attributes(
                    names.OPERATION_SEND, queue, str(headers.get("id")), str(kwargs.get("sender"))
                ),
                **publish.broker,
            },
            start_time=publish.started_at_ns,
        )
        propagate.inject(headers, context=creation or trace.set_span_in_context(span))
        if _publish.get() is publish:
            publish.open(span)
        else:  # a message that its maker announces without `send_task`
            _end(span)

    @staticmethod
    def _trace_after_publish(*args: Any, **kwargs: Any) -> None:
        """The span ends where `send_task` does, since this signal never comes for a publish that fails."""

    def _trace_prerun(self, *args: Any, **kwargs: Any) -> None:
        task = kwargs.get("task")
        if task is None:
            return
        creation = creation_context(task.request)
        parent = trace.set_span_in_context(INVALID_SPAN, creation) if self._uses_links_only else creation
        queue = (task.request.delivery_info or {}).get("routing_key") or "unknown"
        token = context_api.attach(parent)
        span = self._tracer.start_span(
            f"{names.OPERATION_PROCESS} {queue}",
            context=parent,
            kind=SpanKind.CONSUMER,
            links=link_to(creation, names.LINK_CREATION),
            attributes=_message_attributes(names.OPERATION_PROCESS, queue, str(task.request.id), task.name),
        )
        activation = trace.use_span(span, end_on_exit=True)
        activation.__enter__()
        delivery = _Delivery(span, activation, token, task.request, creation)
        _deliveries.set((*_deliveries.get(), delivery))

    def _trace_postrun(self, *args: Any, **kwargs: Any) -> None:
        if not (deliveries := _deliveries.get()):
            return
        _deliveries.set(deliveries[:-1])
        deliveries[-1].activation.__exit__(None, None, None)
        context_api.detach(deliveries[-1].token)

    @staticmethod
    def _trace_failure(*args: Any, **kwargs: Any) -> None:
        error = kwargs.get("exception")
        expected = tuple(getattr(kwargs.get("sender"), "throws", ()))
        if isinstance(error, BaseException) and not isinstance(error, expected):
            _fail_delivery(error)

    @staticmethod
    def _trace_retry(*args: Any, **kwargs: Any) -> None:
        """A retry that names its cause ends this attempt in error; one that only asks for later does not."""
        error = getattr(kwargs.get("reason"), "exc", None)
        if isinstance(error, BaseException):
            _fail_delivery(error)


def _new_publish(app: Celery) -> _Publish:
    return _Publish(time.time_ns(), _broker_attributes(app))


def _observed(send_task: Callable[..., Any]) -> Callable[..., Any]:
    """`Celery.send_task`, through which every message goes, with its span ended however it is left."""

    @functools.wraps(send_task)
    def observed(app: Celery, *args: Any, **kwargs: Any) -> Any:
        publish = _new_publish(app)
        token = _publish.set(publish)
        try:
            return send_task(app, *args, **kwargs)
        except BaseException as error:
            _set_error(publish.span, error)
            raise
        finally:
            publish.close()
            _publish.reset(token)

    return observed


def _existing_creation_context(headers: dict[str, Any]) -> Context | None:
    """What a message must keep: given by the caller, already in its headers, or of the try before."""
    given = context_api.get_value(_CREATION_KEY)
    carrier = {key: value for key, value in headers.items() if isinstance(value, str)}
    candidates = [
        given if isinstance(given, Context) else None,
        propagate.extract(carrier, context=Context()),
        creation_context(current_task.request) if _is_retry_of_running_task(headers) else None,
    ]
    return next((context for context in candidates if context is not None and _has_span(context)), None)


def _is_retry_of_running_task(headers: Mapping[str, Any]) -> bool:
    return bool(current_task) and current_task.request.id == headers.get("id")


def _has_span(context: Context) -> bool:
    return trace.get_current_span(context).get_span_context().is_valid


def _send_parent(creation: Context | None) -> Context | None:
    """None, the current context, except for a message put back by a thread that has no span of its own."""
    has_current = trace.get_current_span().get_span_context().is_valid
    return None if creation is None or has_current else creation


def _message_attributes(
    operation: str, queue: str, task_id: str, task_name: str
) -> dict[str, AttributeValue]:
    return {
        names.MESSAGING_SYSTEM_KEY: names.MESSAGING_SYSTEM,
        names.MESSAGING_OPERATION_NAME: operation,
        names.MESSAGING_OPERATION_TYPE: operation,
        names.MESSAGING_DESTINATION_NAME: queue,
        names.MESSAGING_MESSAGE_ID: task_id,
        names.JOB_ID: task_id,  # a job's message has the job's id as its task id
        names.TASK_NAME: task_name,
    }


@functools.lru_cache(8)
def _broker_attributes(app: Celery) -> dict[str, AttributeValue]:
    """Of the first of several brokers; an app that has sent something keeps its broker."""
    return _address_attributes(str(app.conf.broker_write_url or app.conf.broker_url or ""))


def _address_attributes(urls: str) -> dict[str, AttributeValue]:
    """Where the broker listens; nothing for a socket in the file system, which is no address."""
    try:
        parts = urlsplit(urls.partition(";")[0])
        address, port = parts.hostname, parts.port
    except ValueError:
        return {}
    attributes: dict[str, AttributeValue] = {}
    if parts.scheme in ("redis", "rediss") and address:
        attributes = {names.SERVER_ADDRESS: address, names.SERVER_PORT: port or 6379}
    return attributes


def _fail_delivery(error: BaseException) -> None:
    """The running attempt's span ends in error; its event has no message, which might quote a prompt."""
    if not (deliveries := _deliveries.get()):
        return
    span = deliveries[-1].span
    _set_error(span, error)
    frames = "".join(traceback.format_tb(error.__traceback__))
    span.add_event("exception", {"exception.type": type(error).__qualname__, "exception.stacktrace": frames})


def _set_error(span: Span, error: BaseException) -> None:
    span.set_attribute(names.ERROR_TYPE, str(getattr(error, "reason", "") or type(error).__qualname__))
    span.set_status(Status(StatusCode.ERROR))
