"""Engines over small random models, and ways to run them to the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.core import Engine
from engine.outputs import RequestOutput, StepOutput
from engine.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)


def make_engine(folder: Path, **config_fields: Any) -> Engine:
    fields = {"block_size": 4, "num_blocks": 400, "max_num_sequences": 16, "max_num_batched_tokens": 64}
    return Engine.from_config(EngineConfig(model=str(folder), **(fields | config_fields)))


def random_prompt(num_tokens: int, seed: int = 0, *, low: int = 4, high: int = 384) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (num_tokens,), generator=generator).tolist()


@dataclass
class Run:
    """All that an engine gave back."""

    steps: list[StepOutput] = field(default_factory=list)
    outputs: dict[str, RequestOutput] = field(default_factory=dict)
    texts: dict[tuple[str, int], str] = field(default_factory=lambda: defaultdict(str))
    token_ids: dict[tuple[str, int], list[int]] = field(default_factory=lambda: defaultdict(list))

    def add(self, step: StepOutput) -> None:
        self.steps.append(step)
        for delta in step.deltas:
            self.texts[delta.request_id, delta.index] += delta.text
            self.token_ids[delta.request_id, delta.index] += delta.token_ids
        for output in step.finished:
            assert output.request_id not in self.outputs, "a request was reported twice"
            self.outputs[output.request_id] = output

    def tokens(self, request_id: str) -> list[tuple[int, ...]]:
        return [completion.token_ids for completion in self.outputs[request_id].completions]


def run_to_end(engine: Engine, run: Run | None = None) -> Run:
    """Step until there is nothing left, checking the accounts after each step."""
    run = run or Run()
    while engine.has_work():
        run.add(engine.step())
        engine.check_invariants()
    return run


def generate(engine: Engine, requests: Mapping[str, tuple[Sequence[int], SamplingParams]]) -> Run:
    for request_id, (prompt, params) in requests.items():
        engine.add_request(request_id, prompt, params)
    return run_to_end(engine)
