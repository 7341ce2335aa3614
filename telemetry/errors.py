"""The errors of this package.

    TelemetryError
    ├── SettingsError       an environment variable holds what its rule refuses; carries name, value and rule
    ├── ReceiverError       the built-in receiver could not listen where it was told to
    └── SpanFormatError     JSON that should have been a span is none

Nothing else is raised on purpose: a span that cannot be exported is lost, never a job.
"""

from __future__ import annotations


class TelemetryError(Exception):
    """Base of every error of this package."""

    reason = "telemetry"
    retryable = False


class SettingsError(TelemetryError):
    reason = "telemetry_settings"

    def __init__(self, variable: str, value: str, rule: str) -> None:
        super().__init__(f"{variable}={value!r}: {rule}")
        self.variable = variable
        self.value = value
        self.rule = rule


class ReceiverError(TelemetryError):
    reason = "telemetry_receiver"


class SpanFormatError(TelemetryError):
    reason = "telemetry_span_format"
