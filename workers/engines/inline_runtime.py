"""The engine's loop on a thread of the worker: no isolation, but one debugger sees all."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from engine.config import EngineConfig
from engine.stats import StepStats
from workers.engines.child_runtime import hang_up
from workers.engines.protocol import Abort, Add, EngineRequest, ModelFacts, StepTally
from workers.engines.runtime import Generation, GenerationTable
from workers.engines.steps import UNTRACED, StepTracer
from workers.errors import EngineLost, EngineStartError


class InlineRuntime:
    """`workers.engines.runtime.Runtime` for debugging."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_steps: Callable[[StepTally], None] = lambda tally: None,
        steps: StepTracer = UNTRACED,
    ) -> None:
        """`on_steps` is called from another thread with every tally."""
        self._config = config
        self._on_steps = on_steps
        self._steps = steps
        self._table = GenerationTable()
        self._lock = threading.Lock()
        self._line: socket.socket | None = None
        self._connection: Connection | None = None
        self._stats: StepStats | None = None

    def start(self) -> ModelFacts:
        from engine.core import Engine  # torch stays out of workers that keep the engine elsewhere
        from engine.errors import EngineError
        from workers.engines.engine_process import EngineLoop, model_facts

        try:
            engine = Engine.from_config(self._config)
        except EngineError as error:
            raise EngineStartError(str(error)) from error
        self._line, theirs = socket.socketpair()
        self._connection = Connection(os.dup(self._line.fileno()))
        loop = EngineLoop(engine, Connection(theirs.detach()), self._steps.sampling)
        threading.Thread(target=loop.run, name="engine", daemon=True).start()
        threading.Thread(target=self._read, name="engine-reader", daemon=True).start()
        return model_facts(engine)

    def submit(self, requests: tuple[EngineRequest, ...]) -> Generation:
        generation = self._table.add(requests, self._steps.enter(requests))
        self._send(Add(requests))
        return generation

    def abort(self, generation: Generation) -> None:
        self._table.forget(generation)
        self._send(Abort(generation.request_ids))

    def is_healthy(self) -> bool:
        return True

    def last_stats(self) -> StepStats | None:
        return self._stats

    def stop(self) -> None:
        if self._line is not None:
            hang_up(self._line)
        self._table.fail_all(EngineLost("worker_shutdown", "the worker shuts down"))

    def _send(self, command: Add | Abort) -> None:
        assert self._connection is not None, "start() comes first"
        with self._lock:
            self._connection.send(command)

    def _read(self) -> None:
        assert self._connection is not None
        while True:
            try:
                event = self._connection.recv()
            except (EOFError, OSError):
                return
            self._stats = event.stats or self._stats
            if event.tally is not None:
                self._on_steps(event.tally)
            self._steps.progressed(event)
            for output in event.finished:
                self._table.take(output)
            for refusal in event.refused:
                self._table.take(refusal)
