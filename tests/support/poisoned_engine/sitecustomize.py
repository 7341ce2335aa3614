"""With this folder on PYTHONPATH an engine process dies of one token: for tests of what that may cost others.

The victim of a prompt that begins with POISON_TOKEN is named by POISON_KILLS: `engine` (SIGKILL to itself, in
the middle of the step that would run it), `hang` (SIGSTOP to itself), `worker` (SIGKILL to its parent) or
`request` (it fails by itself, the first time, and may be tried again).
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
            raise ValueError(f"POISON_KILLS={victim!r}: engine, hang, worker or request")


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


def _spoil_once(token: int) -> None:
    from dataclasses import replace

    from engine.outputs import RequestFailure
    from engine.progress import RequestProgress

    output, spoilt = RequestProgress.output, RequestFailure("spoilt", "spoilt by the test", retryable=True)
    is_spoilt = False

    def output_or_failure(self: Any, at: float) -> Any:
        nonlocal is_spoilt
        whole = output(self, at)
        if is_spoilt or self._prompt_token_ids[0] != token:
            return whole
        is_spoilt = True
        return replace(whole, failure=spoilt)

    RequestProgress.output = output_or_failure  # type: ignore[method-assign]


if ENGINE_PROCESS in sys.orig_argv and "POISON_TOKEN" in os.environ:
    if os.environ["POISON_KILLS"] == "request":
        _spoil_once(int(os.environ["POISON_TOKEN"]))
    else:
        _poison(int(os.environ["POISON_TOKEN"]), os.environ["POISON_KILLS"])
