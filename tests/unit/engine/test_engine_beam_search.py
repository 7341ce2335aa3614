from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from engine.sampling import SamplingParams
from tests.unit.engine.engine_factory import GREEDY, generate, make_engine, random_prompt

BEAM = replace(GREEDY, n=4, use_beam_search=True, max_tokens=14)


def beam_reference(
    model: transformers.PreTrainedModel, prompt: list[int], params: SamplingParams, eos: list[int] | None
) -> list[list[int]]:
    ids = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=params.width,
        num_return_sequences=params.n,
        do_sample=False,
        max_new_tokens=params.max_tokens,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        eos_token_id=eos,
        pad_token_id=383,
    )
    return [_without_padding(row[len(prompt) :].tolist(), eos or []) for row in ids]


def _without_padding(token_ids: list[int], eos: list[int]) -> list[int]:
    ends = [index for index, token_id in enumerate(token_ids) if token_id in eos]
    return token_ids[: ends[0] + 1] if ends else token_ids


@pytest.mark.parametrize("seed", range(6))
def test_beam_search_equals_transformers_without_an_end(
    opt_folder: Path, opt_reference: transformers.PreTrainedModel, seed: int
) -> None:
    prompt = random_prompt(10 + seed, seed)

    run = generate(make_engine(opt_folder), {"r": (prompt, BEAM)})

    assert [list(tokens) for tokens in run.tokens("r")] == beam_reference(opt_reference, prompt, BEAM, None)


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_beam_search_equals_transformers_when_beams_end_at_different_lengths(
    opt_folder: Path,
    opt_reference: transformers.PreTrainedModel,
    seed: int,
    length_penalty: float,
    early_stopping: bool,
) -> None:
    prompt = random_prompt(10 + seed, seed)
    # Tokens that the beams do reach, or none would end.
    reached = beam_reference(opt_reference, prompt, BEAM, None)
    stops = (reached[0][2], reached[1][5])
    params = replace(BEAM, stop_token_ids=stops, length_penalty=length_penalty, early_stopping=early_stopping)

    run = generate(make_engine(opt_folder), {"r": (prompt, params)})

    expected = beam_reference(opt_reference, prompt, params, list(set(stops)))
    assert [list(tokens) for tokens in run.tokens("r")] == expected
    assert expected != reached, "the stop tokens made no difference"


@pytest.mark.parametrize("width", [2, 3, 7])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.6])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_beam_search_scores_equal_those_of_transformers_for_any_width_and_penalty(
    opt_folder: Path,
    opt_reference: transformers.PreTrainedModel,
    width: int,
    length_penalty: float,
    early_stopping: bool,
) -> None:
    prompt = random_prompt(11, width)
    free = replace(BEAM, n=width)
    reached = beam_reference(opt_reference, prompt, free, None)
    params = replace(
        free,
        stop_token_ids=(reached[0][3], reached[-1][6]),
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )

    output = generate(make_engine(opt_folder), {"r": (prompt, params)}).outputs["r"]

    found = opt_reference.generate(  # type: ignore[operator]  # its type is lost on the way
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=width,
        num_return_sequences=width,
        do_sample=False,
        max_new_tokens=params.max_tokens,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        eos_token_id=list(set(params.stop_token_ids)),
        pad_token_id=383,
        output_scores=True,
        return_dict_in_generate=True,
    )
    scores = [
        (completion.cumulative_logprob or 0.0) / len(completion.token_ids) ** length_penalty
        for completion in output.completions
    ]
    assert scores == pytest.approx(found.sequences_scores.tolist(), abs=1e-4)


def test_beam_search_is_the_same_beside_other_requests_and_shares_blocks(opt_folder: Path) -> None:
    prompt = random_prompt(33)
    alone = generate(make_engine(opt_folder), {"r": (prompt, BEAM)})
    others = {str(i): (random_prompt(5 + i, i), replace(BEAM, n=2)) for i in range(4)}
    crowded = generate(make_engine(opt_folder), {**others, "r": (prompt, BEAM)})

    assert crowded.tokens("r") == alone.tokens("r")
    # The prompt's eight full blocks once, and at most what four beams of 14 tokens fill.
    assert max(step.stats.num_blocks_used for step in alone.steps) <= 8 + 4 * 4
    assert all(not step.deltas for step in alone.steps)


def test_beam_search_returns_fewer_than_its_width_best_first(opt_folder: Path) -> None:
    prompt = random_prompt(10)
    every = generate(make_engine(opt_folder), {"r": (prompt, BEAM)})
    best = generate(make_engine(opt_folder), {"r": (prompt, replace(BEAM, n=2, best_of=4))})

    assert best.tokens("r") == every.tokens("r")[:2]
    logprobs = [completion.cumulative_logprob or 0.0 for completion in every.outputs["r"].completions]
    assert logprobs == sorted(logprobs, reverse=True)


def test_beam_search_ends_a_beam_at_a_stop_string_and_cuts_its_text(opt_folder: Path) -> None:
    prompt = random_prompt(10)
    free = generate(make_engine(opt_folder), {"r": (prompt, BEAM)}).outputs["r"].completions[0]
    found = re.search("[a-z]{2}", free.text)
    assert found is not None
    stop = found.group()

    stopped = generate(make_engine(opt_folder), {"r": (prompt, replace(BEAM, stop=(stop,)))}).outputs["r"]

    ended = [completion for completion in stopped.completions if completion.stop_reason == stop]
    assert ended
    assert all(stop not in completion.text for completion in stopped.completions)


def test_beam_search_logprobs_add_up_to_the_cumulative_logprob(opt_folder: Path) -> None:
    run = generate(make_engine(opt_folder), {"r": (random_prompt(10), replace(BEAM, logprobs=2))})

    for completion in run.outputs["r"].completions:
        assert completion.logprobs is not None
        values = [value for value in completion.logprobs.token_logprobs if value is not None]
        assert sum(values) == pytest.approx(completion.cumulative_logprob)
        assert len(values) == len(completion.token_ids)


def test_beam_search_reports_its_live_beams_when_aborted(opt_folder: Path) -> None:
    engine = make_engine(opt_folder)
    engine.add_request("r", random_prompt(10), BEAM)
    for _ in range(3):
        engine.step()
    engine.abort("r")

    output = engine.step().finished[0]

    assert [completion.finish_reason for completion in output.completions] == ["abort"] * 4
    assert [len(completion.token_ids) for completion in output.completions] == [3] * 4


@pytest.mark.parametrize("n", [2, 4])
def test_beam_search_generates_nothing_when_max_tokens_is_zero(opt_folder: Path, n: int) -> None:
    params = replace(BEAM, n=n, best_of=4, max_tokens=0, echo=True, logprobs=1)

    run = generate(make_engine(opt_folder), {"r": (random_prompt(6), params)})

    assert run.tokens("r") == [()] * n
    assert run.outputs["r"].usage.completion_tokens == 0
    assert [completion.finish_reason for completion in run.outputs["r"].completions] == ["length"] * n
    assert not run.texts
