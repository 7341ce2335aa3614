from __future__ import annotations

from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor

from telemetry.celery import _CorrectedInstrumentor, creation_context


def test_corrections_override_what_the_package_still_has() -> None:
    """A release that renames its handlers would leave its own spans in place beside ours."""
    overridden = {
        name for name in vars(_CorrectedInstrumentor) if name.startswith("_trace") or "metrics" in name
    }

    assert overridden == {
        "create_celery_metrics",
        "_trace_before_publish",
        "_trace_after_publish",
        "_trace_prerun",
        "_trace_postrun",
        "_trace_failure",
        "_trace_retry",
    }
    assert overridden <= set(vars(CeleryInstrumentor))
    handlers = {name for name in vars(CeleryInstrumentor) if name.startswith("_trace")}
    assert handlers <= overridden, "the package listens to a signal that is not corrected"


def test_creation_context_is_empty_when_the_message_brought_none() -> None:
    class Request:
        traceparent = None
        timelimit = (None, None)

    assert not trace.get_current_span(creation_context(Request())).get_span_context().is_valid
