"""One server span a request, and the ids that go into replies and job records."""

from __future__ import annotations

import os

from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.instrumentation import _semconv
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.trace import format_trace_id

from telemetry.setup import prefer_stable_http_attributes
from telemetry.spans import traceparent

_WATCHED = r"^https?://[^/]+/(health|metrics)(/|\?|$)"


def instrument_api(app: FastAPI) -> None:
    """Every request of `app` has exactly one SERVER span and no send or receive children.

    `/health` and `/metrics` have none.

    Call it after `configure` and before the first request. The app must have been built with FastAPI's own
    telemetry off: `FastAPI(telemetry={"tracing": False, "metrics": False, "logs": False})`. Under
    `opentelemetry-instrument` the app comes with spans already; they are taken off and put on again our
    way.
    """
    prefer_stable_http_attributes()
    _reread_attribute_choice()
    if getattr(app, "_is_instrumented_by_opentelemetry", False):
        FastAPIInstrumentor.uninstrument_app(app)
        # Taking off builds the middleware stack, after which Starlette would refuse another middleware.
        app.middleware_stack = None
    FastAPIInstrumentor.instrument_app(app, excluded_urls=_excluded_urls(), exclude_spans=["receive", "send"])


def current_trace_id() -> str:
    """32 hex digits; all zero where no span is current (OTEL_SDK_DISABLED, an excluded URL)."""
    return format_trace_id(trace.get_current_span().get_span_context().trace_id)


def current_traceparent() -> str:
    """The W3C header of the current span, as kept in a job record; empty outside a span."""
    return traceparent()


def _excluded_urls() -> str:
    """Ours beside the user's, which the instrumentation would forget once it is given any."""
    general = os.environ.get("OTEL_PYTHON_EXCLUDED_URLS", "")
    users = os.environ.get("OTEL_PYTHON_FASTAPI_EXCLUDED_URLS", general)
    return f"{_WATCHED},{users}" if users else _WATCHED


def _reread_attribute_choice() -> None:
    """OTEL_SEMCONV_STABILITY_OPT_IN counts although the package was made to read it too early.

    `opentelemetry-instrument` does that before any line of ours runs, and the package reads it once for all.
    There is no public way to have it read again; where the private one is gone, spans keep older HTTP keys.
    """
    choice = getattr(_semconv, "_OpenTelemetrySemanticConventionStability", None)
    if choice is not None and hasattr(choice, "_initialize"):
        choice._initialized = False
        choice._initialize()
