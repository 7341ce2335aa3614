"""The engine in a child process: started, watched, and replaced when it dies or hangs.

Its jobs' futures then fail with `EngineLost`, which may be tried again.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from time import monotonic

from engine.config import EngineConfig
from engine.stats import StepStats
from workers.engines.protocol import (
    Abort,
    Add,
    EngineRequest,
    Event,
    ModelFacts,
    Progress,
    Ready,
    Start,
    StartFailed,
    StepTally,
)
from workers.engines.runtime import Generation, GenerationTable
from workers.engines.steps import UNTRACED, StepTracer
from workers.errors import EngineLost, EngineStartError

logger = logging.getLogger(__name__)

RESTART_LIMIT = 5
"""Engine deaths in a row, with no finished request between, after which the worker gives up."""


_Outgoing = Abort | tuple[Generation, tuple[EngineRequest, ...]]
"""What the engine is to be told."""


class ChildRuntime:
    """The engine in a child process, watched and replaced."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        start_seconds: float,
        stall_seconds: float,
        on_fatal: Callable[[str], None],
        on_steps: Callable[[StepTally], None] = lambda tally: None,
        steps: StepTracer = UNTRACED,
    ) -> None:
        """Both are called from other threads: `on_fatal` once, when the engine cannot be brought back;
        `on_steps` with every tally.
        """
        self._config = config
        self._start_seconds = start_seconds
        self._stall_seconds = stall_seconds
        self._on_fatal = on_fatal
        self._on_steps = on_steps
        self._steps = steps
        self._table = GenerationTable()
        self._outbox: queue.SimpleQueue[_Outgoing] = queue.SimpleQueue()
        self._lock = threading.Lock()  # one sender at a time, and the swap of the connection
        self._child: EngineChild | None = None
        self._is_up = threading.Event()
        self._is_stopping = threading.Event()
        self._last_heard = monotonic()
        self._stats: StepStats | None = None
        self._deaths_in_a_row = 0
        self._kill_reason: str | None = None

    def start(self) -> ModelFacts:
        facts = self._launch()
        threading.Thread(target=self._read, name="engine-reader", daemon=True).start()
        threading.Thread(target=self._write, name="engine-writer", daemon=True).start()
        threading.Thread(target=self._watch, name="engine-watchdog", daemon=True).start()
        return facts

    def submit(self, requests: tuple[EngineRequest, ...]) -> Generation:
        generation = self._table.add(requests, self._steps.enter(requests))
        self._outbox.put((generation, requests))
        return generation

    def abort(self, generation: Generation) -> None:
        self._table.forget(generation)
        self._outbox.put(Abort(generation.request_ids))

    def is_healthy(self) -> bool:
        if self._is_stopping.is_set():
            return True
        if not self._is_up.is_set():  # starting, within its time limit
            return self._deaths_in_a_row <= RESTART_LIMIT
        return monotonic() - self._last_heard < self._stall_seconds

    def last_stats(self) -> StepStats | None:
        return self._stats

    def stop(self) -> None:
        self._is_stopping.set()
        if self._child is not None:
            self._child.close()
        self._table.fail_all(EngineLost("worker_shutdown", "the worker shuts down"))

    def _write(self) -> None:
        """Send what has come together as one message, which the engine takes when its step is over."""
        while True:
            first = self._outbox.get()
            self._wait_until_up()
            self._send_together([first, *self._all_waiting()])

    def _all_waiting(self) -> Iterator[_Outgoing]:
        with suppress(queue.Empty):
            while True:
                yield self._outbox.get_nowait()

    def _send_together(self, outgoing: list[_Outgoing]) -> None:
        added = [entry for entry in outgoing if not isinstance(entry, Abort) and not entry[0].future.done()]
        aborted = [id for entry in outgoing if isinstance(entry, Abort) for id in entry.ids]
        if added and not self._send(Add(tuple(request for _, requests in added for request in requests))):
            for generation, _ in added:
                self._steps.leave(generation.request_ids)
                self._table.fail(generation, EngineLost("engine_crashed", "the engine is being restarted"))
        if aborted:
            self._send(Abort(tuple(aborted)))

    def _wait_until_up(self) -> None:
        """A replacement loads for as long as the first engine did; its jobs wait at the door."""
        deadline = monotonic() + self._start_seconds
        while not self._is_up.wait(0.5) and monotonic() < deadline and not self._is_stopping.is_set():
            pass

    def _launch(self) -> ModelFacts:
        child = EngineChild()
        self._child = child
        started_at = monotonic()
        try:
            facts = child.load(Start(self._config, self._steps.sampling), self._start_seconds)
        except EngineStartError:
            child.close()
            raise
        self._last_heard = monotonic()
        logger.info(
            "loaded %s, %.0f million parameters, in %.1f s",
            facts.architecture,
            facts.num_parameters / 1e6,
            self._last_heard - started_at,
        )
        self._is_up.set()
        return facts

    def _send(self, command: Add | Abort) -> bool:
        with self._lock:
            child = self._child
            if child is None or not self._is_up.is_set():
                return False
            try:
                child.connection.send(command)
            except (OSError, ValueError):
                return False  # it just died; the reader will see it too
            return True

    def _read(self) -> None:
        while not self._is_stopping.is_set():
            assert self._child is not None
            try:
                self._hear(self._child.connection.recv())
            except (EOFError, OSError):
                if not self._is_stopping.is_set() and not self._replace():
                    return

    def _hear(self, event: Event) -> None:
        self._last_heard = monotonic()
        assert isinstance(event, Progress)
        if event.stats is not None:
            self._stats = event.stats
        self._steps.progressed(event)
        for output in event.finished:
            self._deaths_in_a_row = 0
            self._table.take(output)
        for refusal in event.refused:
            self._table.take(refusal)
        if event.tally is not None:  # last: a dozen steps' metrics must not keep an output from its thread
            self._on_steps(event.tally)

    def _replace(self) -> bool:
        """Hand the jobs back and start another engine; False when it has died too often."""
        assert self._child is not None
        with self._lock:
            self._is_up.clear()
        code = self._child.close()
        reason = self._kill_reason or "engine_crashed"
        self._kill_reason = None
        self._stats = None
        self._steps.leave_all()
        message = f"the engine process ended with {describe_exit(code)}"
        logger.error("%s; starting another", message)
        self._table.fail_all(EngineLost(reason, message))
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > RESTART_LIMIT:
            self._on_fatal(f"{message}, {self._deaths_in_a_row} times in a row")
            return False
        try:
            self._launch()
        except EngineStartError as error:
            self._deaths_in_a_row = RESTART_LIMIT + 1
            self._on_fatal(str(error))
            return False
        return True

    def _watch(self) -> None:
        while not self._is_stopping.wait(min(1.0, self._stall_seconds / 4)):
            silence = monotonic() - self._last_heard
            if self._is_up.is_set() and silence > self._stall_seconds and self._child is not None:
                logger.error("the engine has been silent for %.0f s; killing it", silence)
                self._kill_reason = "engine_stalled"
                self._last_heard = monotonic()
                self._child.kill()


class EngineChild:
    """The process and our end of its connection."""

    def __init__(self) -> None:
        self._line, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "workers.engines.engine_process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            # Threads that spin at a barrier starve the worker and the API beside them, and each other where a
            # core is shared: steps of 0.25 s took 1 to 3 s (docs/LOG.md). Must be set before torch is loaded.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        )
        theirs.close()
        self.connection = Connection(os.dup(self._line.fileno()))

    def load(self, start: Start, timeout_seconds: float) -> ModelFacts:
        try:
            self.connection.send(start)
            if not self.connection.poll(timeout_seconds):
                late = f"the model did not load within {timeout_seconds:.0f} s"
                raise EngineStartError(late, is_final=False)
            event: Event = self.connection.recv()
        except (EOFError, OSError) as error:
            code = self.process.wait(10)
            raise EngineStartError(
                f"the engine process ended with {describe_exit(code)} while loading", is_final=False
            ) from error
        match event:
            case Ready(facts):
                return facts
            case StartFailed(message):
                raise EngineStartError(message)
            case Progress():
                raise EngineStartError("the engine spoke before it was ready")

    def kill(self) -> None:
        self.process.kill()

    def close(self) -> int:
        """Close the connection, which ends the process, and kill it when it does not go; its exit code."""
        hang_up(self._line)
        try:
            return self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def hang_up(line: socket.socket) -> None:
    """End a connection under a thread that reads from it: it sees the end, where a close would pull the
    descriptor away from it.
    """
    with suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
    line.close()


def describe_exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
