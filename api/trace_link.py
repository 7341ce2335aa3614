"""Where a person looks at the trace of a request or a job."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from telemetry.http import current_traceparent

PLACEHOLDER = "{trace_id}"


@dataclass(frozen=True, slots=True)
class TraceLinks:
    """Pages of a tracing back end, by trace id; none without a template.

    A trace that is not sampled has none either: nobody keeps its spans.
    """

    template: str | None = None

    def to(self, traceparent: str | None) -> str | None:
        """The page of the trace that the W3C header names."""
        _, trace_id, _, flags = (traceparent or "---").split("-")[:4]
        if self.template is None or not flags or not int(flags, 16) & 1:
            return None
        return self.template.replace(PLACEHOLDER, trace_id)

    def to_current(self) -> str | None:
        """The page of the trace that this request is in."""
        return self.to(current_traceparent())


def checked_template(template: str) -> str:
    """`template` itself.

    Raises:
        ValueError: says what it must be.
    """
    try:
        parts = urlsplit(template)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port out of range, or an unclosed bracket
        has_host = False
    if not has_host or parts.scheme not in ("http", "https"):
        raise ValueError("must be a URL that begins with http:// or https:// and names a host")
    if PLACEHOLDER not in template:
        raise ValueError(f"must hold {PLACEHOLDER}, as in http://127.0.0.1:16686/trace/{PLACEHOLDER}")
    return template
