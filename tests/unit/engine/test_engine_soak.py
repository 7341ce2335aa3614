"""Requests of every kind, at random, on a cache too small for them: nothing may be lost, kept or told twice.

THROUGHLINE_SOAK_REQUESTS=2000 runs the long one.
"""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

import engine.builtin
from engine.core import Engine
from engine.errors import InvalidRequestError
from engine.outputs import Completion, RequestOutput
from engine.sampling import SamplingParams, StructuredOutput
from tests.unit.engine.engine_factory import Run, make_engine, run_to_end

NUM_REQUESTS = int(os.environ.get("THROUGHLINE_SOAK_REQUESTS", "160"))
MAX_STEPS_A_REQUEST = 60
NUM_COMPARED = 400
BEGINNINGS = (
    "The capital of France is",
    "A queue is a line of jobs, and each job waits for its turn until a worker takes it from the queue.",
    "Question: what is two plus three? Answer:",
    "Once upon a time there was a small cat who lived in a house near the river with an old man.",
)
WORDS = ("the", "cat", "is", "of", "Paris", "two", "and", "é", "\n", "a red", "day")
CHOICES = ("Paris", "Rome", "Paris and Rome")
STRUCTURES = (
    StructuredOutput("regex", "(ab|c){1,8}[0-9]{2}"),
    StructuredOutput("choice", '["Paris", "Rome", "Paris and Rome"]'),
    StructuredOutput("json_schema", '{"type": "object", "properties": {"a": {"type": "boolean"}}}'),
)

Fields = dict[str, Any]


def _sampled(rng: random.Random) -> Fields:
    return {
        "temperature": rng.choice([0.3, 1.0, 1.8]),
        "top_p": rng.choice([1.0, 0.9, 0.3]),
        "top_k": rng.choice([0, 0, 1, 40]),
        "min_p": rng.choice([0.0, 0.0, 0.1]),
    }


def _wide(rng: random.Random) -> Fields:
    n = rng.randint(1, 4)
    return _sampled(rng) | {"n": n, "best_of": rng.choice([None, rng.randint(n, 4)])}


def _beams(rng: random.Random) -> Fields:
    best_of = rng.randint(2, 4)
    return {
        "use_beam_search": True,
        "best_of": best_of,
        "n": rng.randint(1, best_of),
        "length_penalty": rng.choice([0.5, 1.0, 2.0]),
        "early_stopping": rng.random() < 0.5,
    }


def _structured(rng: random.Random) -> Fields:
    return _sampled(rng) | {"structured_outputs": rng.choice(STRUCTURES), "n": rng.randint(1, 2)}


# Kinds of which a request is one, with their weights, and habits of which it has any.
KINDS: Mapping[Callable[[random.Random], Fields], int] = {
    lambda _: {"temperature": 0.0}: 4,
    _sampled: 4,
    _wide: 4,
    _beams: 2,
    _structured: 2,
}
HABITS: tuple[Callable[[random.Random], Fields], ...] = (
    lambda rng: {"stop": tuple(rng.sample([*WORDS, ".", "e t"], rng.randint(1, 3)))},
    lambda rng: {"include_stop_str_in_output": True, "stop_token_ids": (rng.randrange(3, 1536),)},
    lambda rng: {"presence_penalty": rng.uniform(-1, 2), "frequency_penalty": rng.uniform(-1, 2)},
    lambda rng: {"repetition_penalty": rng.uniform(0.7, 1.5)},
    lambda rng: {"logit_bias": {rng.randrange(1536): rng.uniform(-100, 20)}},
    lambda rng: {"logprobs": rng.choice([0, 1, 5])},
    lambda rng: {"echo": True},
    lambda rng: {"skip_special_tokens": False},
)
FREE_HABITS: tuple[Callable[[random.Random], Fields], ...] = (
    lambda rng: {"min_tokens": rng.randint(1, 6)},
    lambda rng: {"bad_words": tuple(rng.sample(WORDS, 2))},
    lambda _: {"ignore_eos": True},
    lambda rng: {"prompt_logprobs": rng.choice([0, 2])},
)


def draw_params(rng: random.Random) -> SamplingParams:
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    fields: Fields = {"seed": rng.randrange(1 << 32), "max_tokens": rng.randint(6, 28)} | kind(rng)
    for habit in HABITS:
        if rng.random() < 0.2:
            fields |= habit(rng)
    for habit in () if "structured_outputs" in fields else FREE_HABITS:
        if rng.random() < 0.2:
            fields |= habit(rng)
    if fields.get("echo") and not fields.get("min_tokens") and rng.random() < 0.3:
        fields["max_tokens"] = 0
    return SamplingParams(**fields)


@dataclass
class Soak:
    """Adds, aborts and steps by the dice, and remembers what was asked.

    Attributes:
        asked: Prompt and parameters of each request that was let in.
        aborted: Requests that were still there when they were aborted.
    """

    engine: Engine
    rng: random.Random
    asked: dict[str, tuple[list[int], SamplingParams]] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    num_refused: int = 0
    run: Run = field(default_factory=Run)

    def through(self, num_requests: int) -> None:
        while len(self.asked) < num_requests or self.engine.has_work():
            if len(self.asked) < num_requests and self.rng.random() < 0.2:
                for _ in range(self.rng.randint(1, 8)):
                    self._add()
            if self.rng.random() < 0.05:
                self._abort_one()
            self.run.add(self.engine.step())
            self.engine.check_invariants()
            assert len(self.run.steps) < MAX_STEPS_A_REQUEST * num_requests, "the engine gets nowhere"

    def _add(self) -> None:
        request_id = f"r{len(self.asked)}"
        text = self.rng.choice(BEGINNINGS) + " ".join(self.rng.choices(WORDS, k=self.rng.randint(0, 16)))
        prompt = self.engine.model_info.tokenizer.encode(text)
        if self.rng.random() < 0.05:
            with pytest.raises(InvalidRequestError, match="max_tokens"):
                self.engine.add_request(request_id, prompt, SamplingParams(max_tokens=28, n=16))
            self.num_refused += 1
            return
        params = draw_params(self.rng)
        self.engine.add_request(request_id, prompt, params, priority=self.rng.choice([0, 0, 0, 1]))
        self.asked[request_id] = prompt, params

    def _abort_one(self) -> None:
        """Of those asked, so also one that has finished long since, about which nothing happens."""
        if self.asked:
            request_id = self.rng.choice(list(self.asked)[-24:])
            if self.engine.abort(request_id):
                self.aborted.add(request_id)


@pytest.fixture(scope="module")
def soaked() -> Soak:
    engine_under_test = make_engine(
        engine.builtin.path(),
        block_size=8,
        num_blocks=32,
        max_num_batched_tokens=48,
        num_speculative_tokens=3,
    )
    soak = Soak(engine_under_test, random.Random(20261122))
    soak.through(NUM_REQUESTS)
    return soak


def test_soak_leaves_every_block_free_and_reports_each_request_once(soaked: Soak) -> None:
    assert soaked.run.outputs.keys() == soaked.asked.keys()
    assert not soaked.engine.has_work()
    assert soaked.run.steps[-1].stats.num_blocks_used == 0
    soaked.engine.check_invariants()


def test_soak_is_rough_enough_to_prove_something(soaked: Soak) -> None:
    steps = soaked.run.steps
    outputs = soaked.run.outputs.values()
    reasons = Counter(completion.finish_reason for output in outputs for completion in output.completions)

    assert sum(step.stats.num_preempted for step in steps) > NUM_REQUESTS / 40
    assert sum(output.usage.cached_tokens > 0 for output in outputs) > NUM_REQUESTS / 4
    assert len(soaked.aborted) > NUM_REQUESTS / 50
    assert soaked.num_refused > 0
    assert reasons.keys() == {"stop", "length", "abort"}
    assert max(step.stats.batch_size for step in steps) > 8
    num_accepted = sum(step.stats.num_accepted_tokens for step in steps)
    assert 0 < num_accepted < sum(step.stats.num_proposed_tokens for step in steps)


def test_soak_counts_the_tokens_of_each_request(soaked: Soak) -> None:
    for request_id, output in soaked.run.outputs.items():
        prompt, params = soaked.asked[request_id]
        num_shown = sum(len(completion.token_ids) for completion in output.completions)
        usage = output.usage

        assert output.failure is None
        assert usage.prompt_tokens == len(prompt)
        assert usage.cached_tokens % 8 == 0
        assert usage.cached_tokens < len(prompt)
        if params.width == params.n or params.use_beam_search:
            assert usage.completion_tokens == num_shown, params
        else:
            assert num_shown <= usage.completion_tokens <= params.width * params.max_tokens
        if request_id not in soaked.aborted:
            assert len(output.completions) == params.n


def test_soak_gives_each_completion_as_it_was_asked_for(soaked: Soak) -> None:
    for request_id, output in soaked.run.outputs.items():
        prompt, params = soaked.asked[request_id]
        for completion in output.completions:
            _check_ending(completion, params, is_aborted=request_id in soaked.aborted)
            _check_logprobs(completion, params, len(prompt))
            _check_bad_words(completion, params, soaked.engine)
            if params.structured_outputs is not None and completion.finish_reason == "stop":
                _check_structure(completion, params)


def test_soak_gives_each_request_what_it_gets_with_room_and_nothing_remembered(soaked: Soak) -> None:
    """No preemption, no cached prefix, nothing run ahead, other company: the same tokens and texts."""
    roomy = make_engine(
        engine.builtin.path(),
        block_size=8,
        num_blocks=20_000,
        max_num_sequences=512,
        keeps_prefixes=False,
        max_num_batched_tokens=4096,
    )
    for request_id, (prompt, params) in list(soaked.asked.items())[:NUM_COMPARED]:
        roomy.add_request(request_id, prompt, params)
    expected = run_to_end(roomy).outputs

    num_compared = 0
    for request_id in expected.keys() - soaked.aborted:
        ours, theirs = soaked.run.outputs[request_id], expected[request_id]
        assert [told(completion) for completion in ours.completions] == [
            told(completion) for completion in theirs.completions
        ], soaked.asked[request_id][1]
        assert (ours.prompt_logprobs is None) == (theirs.prompt_logprobs is None)
        num_compared += 1
    assert num_compared > 100


def told(completion: Completion) -> tuple[object, ...]:
    return completion.token_ids, completion.text, completion.finish_reason, completion.stop_reason


def test_soak_streams_what_it_reports(soaked: Soak) -> None:
    for request_id, output in soaked.run.outputs.items():
        _, params = soaked.asked[request_id]
        streams = {index for id_, index in soaked.run.token_ids if id_ == request_id}
        if params.use_beam_search or params.width > params.n:
            assert not streams, params
        elif request_id not in soaked.aborted:
            _check_streams(soaked.run, output)


def _check_ending(completion: Completion, params: SamplingParams, *, is_aborted: bool) -> None:
    num_tokens = len(completion.token_ids)
    assert num_tokens <= params.max_tokens
    match completion.finish_reason:
        case "length":
            assert num_tokens == params.max_tokens
        case "stop":
            assert num_tokens >= max(1, params.min_tokens), params
        case "abort":
            assert is_aborted
    if params.stop and not (params.echo or params.min_tokens or params.include_stop_str_in_output):
        assert not any(stop in completion.text for stop in params.stop), params


def _check_logprobs(completion: Completion, params: SamplingParams, num_prompt_tokens: int) -> None:
    assert (completion.logprobs is None) == (params.logprobs is None)
    if completion.logprobs is None:
        return
    logprobs = completion.logprobs
    num_entries = len(completion.token_ids) + (num_prompt_tokens if params.echo else 0)
    if completion.finish_reason != "abort":
        assert len(logprobs.tokens) == num_entries
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    assert all(value is None or value <= 0 for value in logprobs.token_logprobs)


def _check_bad_words(completion: Completion, params: SamplingParams, engine_under_test: Engine) -> None:
    encode = engine_under_test.model_info.tokenizer.encode
    for word in params.bad_words:
        for run in (encode(word, add_special_tokens=False), encode(f" {word}", add_special_tokens=False)):
            starts = range(len(completion.token_ids) - len(run) + 1)
            assert all(list(completion.token_ids[i : i + len(run)]) != run for i in starts), word


def _check_structure(completion: Completion, params: SamplingParams) -> None:
    """Of texts with nothing before, cut off or behind; the schema's own tests judge JSON."""
    structure = params.structured_outputs
    assert structure is not None
    if params.echo or params.stop or params.stop_token_ids or not params.skip_special_tokens:
        return
    if structure.kind == "regex":
        assert re.fullmatch(structure.text, completion.text)
    elif structure.kind == "choice":
        assert completion.text in CHOICES


def _check_streams(run: Run, output: RequestOutput) -> None:
    for completion in output.completions:
        key = output.request_id, completion.index
        assert tuple(run.token_ids[key]) == completion.token_ids
        assert run.texts[key] == completion.text
