"""The engine as the worker's threads use it: hand over a job's requests, wait on a future.

    task thread ──submit──▶ Runtime ──Add──▶ engine process
                 ◀─future──  reader thread ◀─Progress─

`ChildRuntime` keeps the engine in a process of its own and replaces it when it dies or hangs; its jobs'
futures then fail with `EngineLost`, which may be tried again. `InlineRuntime` runs the same loop on a thread,
for tests and debugging.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import monotonic
from typing import Protocol

from engine.config import EngineConfig
from engine.outputs import RequestOutput
from engine.stats import StepStats
from workers.errors import EngineLost, EngineRefused, EngineStartError
from workers.protocol import (
    Abort,
    Add,
    EngineRequest,
    Event,
    ModelFacts,
    Progress,
    Ready,
    Start,
    StartFailed,
)

logger = logging.getLogger(__name__)

RESTART_LIMIT = 5
"""Engine deaths in a row, with no finished request between, after which the worker gives up."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One job's requests inside the engine."""

    request_ids: tuple[str, ...]
    future: Future[tuple[RequestOutput, ...]]
    """Outputs in the order of the requests; fails with EngineLost or EngineRefused."""


class Runtime(Protocol):
    """Safe to call from many threads."""

    def start(self) -> ModelFacts:
        """Block until the model is loaded.

        Raises:
            EngineStartError: one line for the operator.
        """
        ...

    def submit(self, requests: tuple[EngineRequest, ...]) -> Generation: ...

    def abort(self, generation: Generation) -> None:
        """Free its place in the batch at the next step; its future is left to the caller."""
        ...

    def is_healthy(self) -> bool:
        """False once the engine has work and has been silent for too long, or is gone for good."""
        ...

    def last_stats(self) -> StepStats | None: ...

    def stop(self) -> None: ...


class GenerationTable:
    """Which generation waits for which request, and what has come in for it. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._generations: dict[str, Generation] = {}
        self._outputs: dict[str, RequestOutput] = {}

    def add(self, requests: tuple[EngineRequest, ...]) -> Generation:
        generation = Generation(tuple(request.id for request in requests), Future())
        with self._lock:
            self._generations.update(dict.fromkeys(generation.request_ids, generation))
        return generation

    def take(self, output: RequestOutput) -> None:
        """Resolve the generation when this was its last missing output."""
        with self._lock:
            generation = self._generations.get(output.request_id)
            if generation is None:
                return
            self._outputs[output.request_id] = output
            if not all(id in self._outputs for id in generation.request_ids):
                return
            outputs = tuple(self._outputs[id] for id in generation.request_ids)
            self._drop(generation)
        _succeed(generation.future, outputs)

    def fail(self, request_id: str, error: Exception) -> Generation | None:
        """Fail the generation that this request belongs to; returned so that its others can be aborted."""
        with self._lock:
            generation = self._generations.get(request_id)
            if generation is None:
                return None
            self._drop(generation)
        _fail(generation.future, error)
        return generation

    def fail_all(self, error: Exception) -> None:
        with self._lock:
            generations = {g.request_ids: g for g in self._generations.values()}.values()
            self._generations.clear()
            self._outputs.clear()
        for generation in generations:
            _fail(generation.future, error)

    def forget(self, generation: Generation) -> None:
        with self._lock:
            self._drop(generation)

    def __len__(self) -> int:
        return len(self._generations)

    def _drop(self, generation: Generation) -> None:
        for id in generation.request_ids:
            self._generations.pop(id, None)
            self._outputs.pop(id, None)


def _succeed(future: Future[tuple[RequestOutput, ...]], outputs: tuple[RequestOutput, ...]) -> None:
    with suppress(InvalidStateError):  # ended early by a cancel, a time limit or a shutdown
        future.set_result(outputs)


def _fail(future: Future[tuple[RequestOutput, ...]], error: Exception) -> None:
    with suppress(InvalidStateError):  # as above
        future.set_exception(error)


class ChildRuntime:
    """The engine in a child process, watched and replaced."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        start_seconds: float,
        stall_seconds: float,
        on_fatal: Callable[[str], None],
    ) -> None:
        """`on_fatal` is called once, from another thread, when the engine cannot be brought back."""
        self._config = config
        self._start_seconds = start_seconds
        self._stall_seconds = stall_seconds
        self._on_fatal = on_fatal
        self._table = GenerationTable()
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
        threading.Thread(target=self._watch, name="engine-watchdog", daemon=True).start()
        return facts

    def submit(self, requests: tuple[EngineRequest, ...]) -> Generation:
        generation = self._table.add(requests)
        self._wait_until_up()
        if not generation.future.done() and not self._send(Add(requests)):
            self._table.fail(requests[0].id, EngineLost("engine_crashed", "the engine is being restarted"))
        return generation

    def abort(self, generation: Generation) -> None:
        self._table.forget(generation)
        self._send(Abort(generation.request_ids))

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

    def _wait_until_up(self) -> None:
        """A replacement loads for as long as the first engine did; its jobs wait at the door."""
        deadline = monotonic() + self._start_seconds
        while not self._is_up.wait(0.5) and monotonic() < deadline and not self._is_stopping.is_set():
            pass

    def _launch(self) -> ModelFacts:
        child = EngineChild()
        self._child = child
        try:
            facts = child.load(self._config, self._start_seconds)
        except EngineStartError:
            child.close()
            raise
        self._last_heard = monotonic()
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
        for output in event.finished:
            self._deaths_in_a_row = 0
            self._table.take(output)
        for refusal in event.refused:
            failed = self._table.fail(refusal.id, EngineRefused(refusal.reason, refusal.message))
            if failed is not None and len(failed.request_ids) > 1:
                self._send(Abort(failed.request_ids))

    def _replace(self) -> bool:
        """Hand the jobs back and start another engine; False when it has died too often."""
        assert self._child is not None
        with self._lock:
            self._is_up.clear()
        code = self._child.close()
        reason = self._kill_reason or "engine_crashed"
        self._kill_reason = None
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
            [sys.executable, "-m", "workers.engine_process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self.connection = Connection(os.dup(self._line.fileno()))

    def load(self, config: EngineConfig, timeout_seconds: float) -> ModelFacts:
        try:
            self.connection.send(Start(config))
            if not self.connection.poll(timeout_seconds):
                raise EngineStartError(f"the model did not load within {timeout_seconds:.0f} s")
            event: Event = self.connection.recv()
        except (EOFError, OSError) as error:
            code = self.process.wait(10)
            raise EngineStartError(
                f"the engine process ended with {describe_exit(code)} while loading"
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


class InlineRuntime:
    """The same loop on a thread of the worker: no isolation, but one debugger sees all."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._table = GenerationTable()
        self._lock = threading.Lock()
        self._line: socket.socket | None = None
        self._connection: Connection | None = None
        self._stats: StepStats | None = None

    def start(self) -> ModelFacts:
        from engine.core import Engine  # torch stays out of workers that keep the engine elsewhere
        from engine.errors import EngineError
        from workers.engine_process import EngineLoop, model_facts

        try:
            engine = Engine.from_config(self._config)
        except EngineError as error:
            raise EngineStartError(str(error)) from error
        self._line, theirs = socket.socketpair()
        self._connection = Connection(os.dup(self._line.fileno()))
        loop = EngineLoop(engine, Connection(theirs.detach()))
        threading.Thread(target=loop.run, name="engine", daemon=True).start()
        threading.Thread(target=self._read, name="engine-reader", daemon=True).start()
        return model_facts(engine)

    def submit(self, requests: tuple[EngineRequest, ...]) -> Generation:
        generation = self._table.add(requests)
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
            for output in event.finished:
                self._table.take(output)
            for refusal in event.refused:
                self._table.fail(refusal.id, EngineRefused(refusal.reason, refusal.message))
