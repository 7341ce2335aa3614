"""Scheduling a step before the last one's tokens are known changes when they are told, nothing else."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine.builtin
from engine import decoding
from engine.chosen_tokens import ChosenTokens
from engine.core import Engine
from engine.outputs import RequestOutput
from engine.sampling import SamplingParams, StructuredOutput
from tests.unit.engine.engine_factory import GREEDY, Run, generate, make_engine, random_prompt
from tests.unit.engine.test_engine_soak import BEGINNINGS, Soak, draw_params

SMALL = {"block_size": 8, "num_blocks": 40, "max_num_sequences": 13, "max_num_batched_tokens": 48}


@pytest.fixture(scope="module")
def pair() -> tuple[Engine, Engine]:
    """One that waits for its tokens and one that does not, on caches too small for what comes."""
    folder = engine.builtin.path()
    config: dict[str, Any] = SMALL | {"keeps_prefixes": False}
    return make_engine(folder, **config), make_engine(folder, async_steps="on", decode_graphs="on", **config)


def _told(output: RequestOutput) -> list[tuple[Any, ...]]:
    return [(c.index, c.token_ids, c.text, c.finish_reason, c.stop_reason) for c in output.completions]


def _assert_logprobs_are_those_of(output: RequestOutput, other: RequestOutput) -> None:
    """Up to what products of batches of another size differ by."""
    for one, expected in zip(output.completions, other.completions, strict=True):
        if expected.logprobs is None:
            assert one.logprobs is None
            continue
        assert one.logprobs is not None
        assert one.logprobs.tokens == expected.logprobs.tokens
        assert one.logprobs.token_logprobs == pytest.approx(expected.logprobs.token_logprobs, abs=1e-4)
        for tops, meant in zip(one.logprobs.top_logprobs, expected.logprobs.top_logprobs, strict=True):
            assert (tops is None) == (meant is None)
            assert sorted((tops or {}).values()) == pytest.approx(sorted((meant or {}).values()), abs=1e-4)


def _simple(rng: random.Random) -> SamplingParams:
    """Nothing that must know its tokens: greedy or sampled, with ends of every kind."""
    kind = rng.choice(
        [{"temperature": 0.0}, {"temperature": 0.9}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}]
    )
    habits: list[dict[str, Any]] = [{}, {}, {"stop": ("e",)}, {"stop": (" a", "th")}, {"ignore_eos": True}]
    habits += [{"min_tokens": 3}, {"stop_token_ids": (5, 17, 40)}, {"echo": True}, {"logit_bias": {7: 2.0}}]
    habits += [{"logprobs": 0}, {"logprobs": 5}]
    fields = {"max_tokens": rng.randint(3, 24), "seed": rng.randrange(1 << 30)} | kind | rng.choice(habits)
    return SamplingParams(**fields)


@given(seed=st.integers(0, 10_000), num_requests=st.integers(1, 20), mixes=st.booleans())
@settings(max_examples=25)
def test_async_steps_give_the_same_as_steps_that_wait(
    pair: tuple[Engine, Engine], seed: int, num_requests: int, mixes: bool
) -> None:
    rng = random.Random(seed)
    encode = pair[0].model_info.tokenizer.encode
    draw = (
        (lambda: draw_params(rng) if rng.random() < 0.2 else _simple(rng)) if mixes else lambda: _simple(rng)
    )
    requests = {str(n): (encode(rng.choice(BEGINNINGS)), draw()) for n in range(num_requests)}

    waiting, ahead = (generate(one, requests) for one in pair)

    for id, (_, params) in requests.items():
        assert _told(ahead.outputs[id]) == _told(waiting.outputs[id]), params
        _assert_logprobs_are_those_of(ahead.outputs[id], waiting.outputs[id])
        assert ahead.outputs[id].usage == waiting.outputs[id].usage
        streams = {key: text for key, text in waiting.texts.items() if key[0] == id}
        assert {key: text for key, text in ahead.texts.items() if key[0] == id} == streams
    assert all(one._blocks.num_used == 0 for one in pair)


def test_async_steps_launch_a_step_before_they_read_the_one_before(
    opt_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    under_test = make_engine(opt_folder, async_steps="on")
    run, read = under_test._runner.run, ChosenTokens.read
    monkeypatch.setattr(under_test._runner, "run", lambda *args: (order.append("launch"), run(*args))[1])
    monkeypatch.setattr(ChosenTokens, "read", lambda *args: (order.append("read"), read(*args))[1])

    generate(under_test, {"a": (random_prompt(5), replace(GREEDY, max_tokens=4))})

    assert order == ["launch", "launch", "read", "launch", "read", "launch", "read", "read"]


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"use_beam_search": True, "n": 2},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"bad_words": ("a",)},
        {"structured_outputs": StructuredOutput("regex", "[a-z]+")},
    ],
)
def test_async_steps_wait_for_the_tokens_of_requests_that_look_back(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen_ahead: list[int] = []
    choose = decoding.choose
    monkeypatch.setattr(decoding, "choose", lambda *args: (chosen_ahead.append(1), choose(*args))[1])
    prompt = [40, 50, 60]

    for fields_of_one in (fields, {}):
        generate(
            make_engine(engine.builtin.path(), async_steps="on"),
            {"a": (prompt, SamplingParams(max_tokens=6, temperature=0.0, **fields_of_one))},
        )
        if fields_of_one:
            assert not chosen_ahead

    assert chosen_ahead


def test_async_steps_wait_while_tokens_are_proposed(opt_folder: Path) -> None:
    under_test = make_engine(opt_folder, async_steps="on", num_speculative_tokens=4)

    assert not under_test._runs_ahead


def test_abort_leaves_out_the_token_that_is_not_read_yet(opt_folder: Path) -> None:
    under_test = make_engine(opt_folder, async_steps="on")
    under_test.add_request("a", random_prompt(5), GREEDY)
    under_test.add_request("b", random_prompt(9), GREEDY)
    run = Run()
    for _ in range(4):
        run.add(under_test.step())

    under_test.abort("a")
    under_test.check_invariants()
    num_told = len(run.token_ids["a", 0])
    while under_test.has_work():
        run.add(under_test.step())
        under_test.check_invariants()

    (aborted,) = run.outputs["a"].completions
    assert aborted.finish_reason == "abort"
    assert len(aborted.token_ids) == num_told == 3
    assert (
        run.outputs["b"].completions[0].token_ids
        == generate(make_engine(opt_folder), {"b": (random_prompt(9), GREEDY)}).tokens("b")[0]
    )


def test_request_id_can_be_used_again_while_its_last_token_is_on_its_way(opt_folder: Path) -> None:
    under_test = make_engine(opt_folder, async_steps="on")
    under_test.add_request("a", random_prompt(5), GREEDY)
    under_test.step()
    under_test.abort("a")
    first = under_test.step().finished
    under_test.add_request("a", random_prompt(7), GREEDY)

    run = Run()
    while under_test.has_work():
        run.add(under_test.step())

    assert [output.completions[0].finish_reason for output in first] == ["abort"]
    plain = generate(make_engine(opt_folder), {"a": (random_prompt(7), GREEDY)})
    assert run.tokens("a") == plain.tokens("a")


def test_request_that_stops_early_is_found_one_step_late_and_its_extra_token_dropped(
    opt_folder: Path,
) -> None:
    prompt = random_prompt(6)
    plain = generate(make_engine(opt_folder), {"a": (prompt, GREEDY)}).tokens("a")[0]
    stops = replace(GREEDY, stop_token_ids=(plain[4],))

    run = generate(make_engine(opt_folder, async_steps="on"), {"a": (prompt, stops)})

    assert run.tokens("a")[0] == plain[: plain.index(plain[4]) + 1]
    assert run.outputs["a"].phases.num_steps == plain.index(plain[4]) + 2


@pytest.fixture(scope="module")
def soaked() -> Soak:
    under_test = make_engine(
        engine.builtin.path(),
        block_size=8,
        num_blocks=26,
        max_num_batched_tokens=48,
        async_steps="on",
        decode_graphs="on",
    )
    soak = Soak(under_test, random.Random(20261123))
    soak.through(150)
    return soak


def test_async_soak_reports_each_request_once_streams_what_it_reports_and_frees_every_block(
    soaked: Soak,
) -> None:
    assert soaked.run.outputs.keys() == soaked.asked.keys()
    assert soaked.engine._blocks.num_used == 0
    assert sum(step.stats.num_preempted for step in soaked.run.steps) > 3
    assert soaked.aborted
    for id, output in soaked.run.outputs.items():
        assert output.failure is None
        for completion in output.completions:
            key = id, completion.index
            if id not in soaked.aborted and key in soaked.run.texts:
                assert tuple(soaked.run.token_ids[key]) == completion.token_ids
                assert soaked.run.texts[key] == completion.text
