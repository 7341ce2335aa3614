"""An engine that computes nothing: what is left of a job's time is the path's."""

from __future__ import annotations

import heapq
import itertools
import json
import threading
from time import monotonic

from engine import builtin
from engine.outputs import Completion, RequestOutput, Usage
from engine.stats import PhaseInterval, RequestPhases, StepStats
from workers.engines.protocol import EngineRequest, ModelFacts
from workers.engines.runtime import Generation, GenerationTable


class NoOpRuntime:
    """A `Runtime` in which every request is answered after its `max_tokens` times `token_seconds`."""

    def __init__(self, token_seconds: float = 0.0) -> None:
        self._token_seconds = token_seconds
        self._table = GenerationTable()
        self._due: list[tuple[float, int, RequestOutput]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()

    def start(self) -> ModelFacts:
        threading.Thread(target=self._answer, name="no-op-engine", daemon=True).start()
        folder = builtin.path()
        config = json.loads((folder / "config.json").read_text())
        return ModelFacts(
            architecture="none",
            device="cpu",
            vocab_size=config["vocab_size"],
            max_model_len=config["max_position_embeddings"],
            num_parameters=0,
            num_blocks=0,
            tokenizer_json=(folder / "tokenizer.json").read_text(encoding="utf-8"),
        )

    def submit(self, requests: tuple[EngineRequest, ...]) -> Generation:
        generation = self._table.add(requests, {})
        outputs = [self._output(request) for request in requests]
        if self._token_seconds:
            with self._changed:
                for output in outputs:
                    entry = (output.phases.finished_at, next(self._numbers), output)
                    heapq.heappush(self._due, entry)
                self._changed.notify()
        else:
            for output in outputs:
                self._table.take(output)
        return generation

    def abort(self, generation: Generation) -> None:
        self._table.forget(generation)

    def is_healthy(self) -> bool:
        return True

    def last_stats(self) -> StepStats | None:
        return None

    def stop(self) -> None:
        self._table.fail_all(RuntimeError("the benchmark ends"))

    def _output(self, request: EngineRequest) -> RequestOutput:
        arrived, num_tokens = monotonic(), request.params.max_tokens
        first, finished = arrived + self._token_seconds, arrived + self._token_seconds * num_tokens
        phases = RequestPhases(
            arrived_at=arrived,
            first_token_at=first,
            finished_at=finished,
            intervals=(
                PhaseInterval("wait", arrived, arrived),
                PhaseInterval("prefill", arrived, first),
                PhaseInterval("decode", first, finished),
            ),
            num_preemptions=0,
            num_steps=num_tokens,
            mean_batch_size=1.0,
            max_batch_size=1,
        )
        text = " nothing" * num_tokens
        completion = Completion(0, text, (1,) * num_tokens, "length", None, None, None)
        usage = Usage(len(request.prompt_token_ids), num_tokens, 0)
        return RequestOutput(request.id, (completion,), usage, phases)

    def _answer(self) -> None:
        while True:
            with self._changed:
                while not self._due or self._due[0][0] > monotonic():
                    self._changed.wait(self._due[0][0] - monotonic() if self._due else None)
                output = heapq.heappop(self._due)[2]
            self._table.take(output)
