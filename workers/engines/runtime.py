"""The engine as the worker's attempts use it: hand over a job's requests, wait on a future.

    attempt ──submit──▶ Runtime ──Add──▶ engine
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

from engine.stats import StepStats
from workers.engines.protocol import EngineRequest, ModelFacts, Outcome
from workers.engines.steps import TracedRequest


@dataclass(slots=True)
class Generation:
    """One job's requests inside the engine."""

    request_ids: tuple[str, ...]
    future: Future[tuple[Outcome, ...]]
    """Outcomes in the order of the requests; fails with EngineLost."""
    traced: Mapping[str, TracedRequest] = field(default_factory=dict)
    """By request, where steps are traced; whole once the future is resolved."""
    ended: list[Outcome] = field(default_factory=list)
    """The outcomes so far, in the order in which they came. Only appended to, and by one thread."""


class Runtime(Protocol):
    """Safe to call from many threads."""

    def start(self) -> ModelFacts:
        """Block until the model is loaded.

        Raises:
            EngineStartError: one line for the operator.
        """
        ...

    def submit(self, requests: tuple[EngineRequest, ...]) -> Generation:
        """Never blocks. Traced steps link to the span that is current where it is called."""
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
        self._outcomes: dict[str, Outcome] = {}
        self._num_missing: dict[Future[tuple[Outcome, ...]], int] = {}

    def add(self, requests: tuple[EngineRequest, ...], traced: Mapping[str, TracedRequest]) -> Generation:
        generation = Generation(tuple(request.id for request in requests), Future(), traced)
        with self._lock:
            self._generations.update(dict.fromkeys(generation.request_ids, generation))
            self._num_missing[generation.future] = len(requests)
        return generation

    def take(self, outcome: Outcome) -> None:
        """Resolve the generation when this was its last missing outcome."""
        with self._lock:
            generation = self._generations.get(outcome.request_id)
            if generation is None or outcome.request_id in self._outcomes:
                return
            # Counted, not looked for: a job may have ten thousand prompts.
            self._num_missing[generation.future] -= 1
            self._outcomes[outcome.request_id] = outcome
            generation.ended.append(outcome)
            if self._num_missing[generation.future]:
                return
            outcomes = tuple(self._outcomes[id] for id in generation.request_ids)
            self._drop(generation)
        _succeed(generation.future, outcomes)

    def fail(self, generation: Generation, error: Exception) -> None:
        self.forget(generation)
        _fail(generation.future, error)

    def fail_all(self, error: BaseException) -> None:
        with self._lock:
            generations = {g.request_ids: g for g in self._generations.values()}.values()
            self._generations.clear()
            self._outcomes.clear()
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
            self._outcomes.pop(id, None)


def _succeed(future: Future[tuple[Outcome, ...]], outcomes: tuple[Outcome, ...]) -> None:
    with suppress(InvalidStateError):  # ended early by a cancel, a time limit or a shutdown
        future.set_result(outcomes)


def _fail(future: Future[tuple[Outcome, ...]], error: BaseException) -> None:
    with suppress(InvalidStateError):  # as above
        future.set_exception(error)
