"""Spans that a process made and its collector never got, as the process itself counts them: invariant 7."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterable

from prometheus_client.parser import text_string_to_metric_families

from tests.support.processes import wait_until

DROPPED = "otel_sdk_processor_span_processed_total", "queue_full"
FAILED = "otel_sdk_exporter_span_exported_total", "export_failed"


def lost_spans(address: str) -> dict[tuple[str, str], float]:
    """Counters of loss by name and error type, as `http://<address>/metrics` shows them; each begins at 0.

    Raises OSError where nobody answers.
    """
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    return {
        (sample.name, sample.labels["error_type"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name in (DROPPED[0], FAILED[0]) and sample.labels.get("error_type")
    }


def check_nothing_lost(addresses: Iterable[str]) -> None:
    """Each process counts its losses, and has none. One that is being started is waited for."""
    for address in addresses:
        wait_until(lambda at=address: _is_up(at), timeout_seconds=60, what=f"{address} shows metrics")  # type: ignore[misc]
        found = lost_spans(address)
        assert found == {DROPPED: 0.0, FAILED: 0.0}, f"spans lost by {address}: {found}"


def _is_up(address: str) -> bool:
    try:
        lost_spans(address)
    except OSError:
        return False
    return True
