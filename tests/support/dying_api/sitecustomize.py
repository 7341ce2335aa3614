"""With this folder on PYTHONPATH an API process dies between storing a job and publishing it."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def _die_before_publishing() -> None:
    from jobs.queue import CeleryPublisher

    def die(self: Any, *args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    CeleryPublisher.publish = die  # type: ignore[method-assign]


if sys.orig_argv[1:4] == ["-m", "cli", "api"]:
    _die_before_publishing()
