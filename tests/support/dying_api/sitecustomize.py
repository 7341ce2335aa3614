"""With this folder on PYTHONPATH an API process dies between storing a job and answering its client."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def _die_before_answering() -> None:
    from jobs.redis_store import RedisSubmissionStore

    create = RedisSubmissionStore.create

    async def create_and_die(self: Any, *args: Any, **kwargs: Any) -> None:
        await create(self, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    RedisSubmissionStore.create = create_and_die  # type: ignore[assignment,method-assign]


if sys.orig_argv[1:4] == ["-m", "cli", "api"]:
    _die_before_answering()
