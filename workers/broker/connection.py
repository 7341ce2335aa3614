"""Coming back to a Redis that was away, by asking steadily instead of ever more rarely."""

from __future__ import annotations

from typing import Any

from kombu.connection import Connection


class SteadyConnection(Connection):
    """Asks every 2 s. Kombu's own pause grows to 30 s, for which a worker would stand idle afterwards."""

    def ensure_connection(self, *args: Any, **kwargs: Any) -> Any:
        return super().ensure_connection(*args, **{"interval_step": 0, **kwargs})  # type: ignore[no-untyped-call]  # kombu's
