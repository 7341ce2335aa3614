"""The engine as the worker's threads use it: hand over a job's requests, wait on a future.

    task thread ──submit──▶ Runtime ──Add──▶ engine
                 ◀─future──  reader thread ◀─Progress─

`workers.engines.child_runtime` keeps the engine in a process of its own and replaces it when it dies;
`workers.engines.inline_runtime` runs the same loop on a thread, for tests and debugging.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from engine.outputs import RequestOutput
from engine.stats import StepStats
from workers.engines.protocol import EngineRequest, ModelFacts, Refused
from workers.engines.steps import TracedRequest
from workers.errors import EngineRefused


@dataclass(frozen=True, slots=True)
class Generation:
    """One job's requests inside the engine."""

    request_ids: tuple[str, ...]
    future: Future[tuple[RequestOutput, ...]]
    """Outputs in the order of the requests; fails with EngineLost or EngineRefused."""
    traced: Mapping[str, TracedRequest] = field(default_factory=dict)
    """By request, where steps are traced; whole once the future is resolved."""


class Runtime(Protocol):
    """Safe to call from many threads."""

    def start(self) -> ModelFacts:
        """Block until the model is loaded.

        Raises:
            EngineStartError: one line for the operator.
        """
        ...

    def submit(self, requests: tuple[EngineRequest, ...]) -> Generation:
        """Traced steps link to the span that is current in the caller's thread."""
        ...

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
        self._num_missing: dict[Future[tuple[RequestOutput, ...]], int] = {}

    def add(self, requests: tuple[EngineRequest, ...], traced: Mapping[str, TracedRequest]) -> Generation:
        generation = Generation(tuple(request.id for request in requests), Future(), traced)
        with self._lock:
            self._generations.update(dict.fromkeys(generation.request_ids, generation))
            self._num_missing[generation.future] = len(requests)
        return generation

    def take(self, output: RequestOutput) -> None:
        """Resolve the generation when this was its last missing output."""
        with self._lock:
            generation = self._generations.get(output.request_id)
            if generation is None:
                return
            # Counted, not looked for: a job may have ten thousand prompts.
            self._num_missing[generation.future] -= output.request_id not in self._outputs
            self._outputs[output.request_id] = output
            if self._num_missing[generation.future]:
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

    def refuse(self, refusal: Refused) -> Generation | None:
        return self.fail(refusal.id, EngineRefused(refusal.reason, refusal.message))

    def fail_all(self, error: Exception) -> None:
        with self._lock:
            generations = {g.request_ids: g for g in self._generations.values()}.values()
            self._generations.clear()
            self._outputs.clear()
            self._num_missing.clear()
        for generation in generations:
            _fail(generation.future, error)

    def forget(self, generation: Generation) -> None:
        with self._lock:
            self._drop(generation)

    def __len__(self) -> int:
        return len(self._generations)

    def _drop(self, generation: Generation) -> None:
        self._num_missing.pop(generation.future, None)
        for id in generation.request_ids:
            self._generations.pop(id, None)
            self._outputs.pop(id, None)


def _succeed(future: Future[tuple[RequestOutput, ...]], outputs: tuple[RequestOutput, ...]) -> None:
    with suppress(InvalidStateError):  # ended early by a cancel, a time limit or a shutdown
        future.set_result(outputs)


def _fail(future: Future[tuple[RequestOutput, ...]], error: Exception) -> None:
    with suppress(InvalidStateError):  # as above
        future.set_exception(error)
