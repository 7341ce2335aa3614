"""With this folder on PYTHONPATH an engine process dies of one token: for tests of what that may cost others.

The victim of a prompt that begins with POISON_TOKEN is named by POISON_KILLS: `engine` (SIGKILL to itself, in
the middle of the step that would run it), `hang` (SIGSTOP to itself) or `worker` (SIGKILL to its parent).
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

ENGINE_PROCESS = "workers.engines.engine_process"


def _kill(victim: str) -> None:
    match victim:
        case "engine":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "worker":
            os.kill(os.getppid(), signal.SIGKILL)
        case _:
            raise ValueError(f"POISON_KILLS={victim!r}: engine, hang or worker")


def _poison(token: int, victim: str) -> None:
    from engine.core import Engine

    add_request, step = Engine.add_request, Engine.step

    def add_and_look(self: Any, id: str, prompt_token_ids: Any, *args: Any, **kwargs: Any) -> None:
        self.is_poisoned = getattr(self, "is_poisoned", False) or prompt_token_ids[0] == token
        add_request(self, id, prompt_token_ids, *args, **kwargs)

    def step_or_die(self: Any) -> Any:
        if getattr(self, "is_poisoned", False):
            _kill(victim)
        return step(self)

    Engine.add_request = add_and_look  # type: ignore[method-assign]
    Engine.step = step_or_die  # type: ignore[method-assign]


if ENGINE_PROCESS in sys.orig_argv and "POISON_TOKEN" in os.environ:
    _poison(int(os.environ["POISON_TOKEN"]), os.environ["POISON_KILLS"])
