from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from engine.core import Engine
from engine.forbidden import ForbiddenTokens
from engine.sampling import SamplingParams
from tests.unit.engine.engine_factory import GREEDY, generate, make_engine, random_prompt

PROMPT = random_prompt(12, 3)


def generated(
    model: transformers.PreTrainedModel, prompt: list[int], max_tokens: int, **options: object
) -> list[int]:
    ids = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=383,
        **options,
    )
    return [token for token in ids[0, len(prompt) :].tolist() if token != 383]


def only_tokens(engine: Engine, params: SamplingParams, prompt: list[int] = PROMPT) -> list[int]:
    return list(generate(engine, {"r": (prompt, params)}).tokens("r")[0])


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("min_tokens", [1, 4, 9])
def test_min_tokens_gives_the_tokens_of_transformers(
    opt_folder: Path, opt_reference: transformers.PreTrainedModel, min_tokens: int, num_beams: int
) -> None:
    free = generated(opt_reference, PROMPT, 12, eos_token_id=None)
    ends = sorted({free[0], free[3]})
    is_beam = num_beams > 1
    params = replace(
        GREEDY, max_tokens=12, min_tokens=min_tokens, stop_token_ids=tuple(ends), use_beam_search=is_beam
    )

    tokens = only_tokens(make_engine(opt_folder), replace(params, best_of=num_beams if is_beam else None))

    assert tokens == generated(
        opt_reference, PROMPT, 12, eos_token_id=ends, min_new_tokens=min_tokens, num_beams=num_beams
    )
    assert len(tokens) >= min_tokens
    assert not set(tokens[:min_tokens]) & set(ends)


def test_min_tokens_looks_for_no_stop_string_in_their_text(opt_folder: Path) -> None:
    engine = make_engine(opt_folder)
    free = generate(engine, {"free": (PROMPT, GREEDY)}).outputs["free"].completions[0]
    first_half = engine.model_info.tokenizer.decode([*PROMPT, *free.token_ids[:5]])
    stop = first_half[-2:]

    early = generate(engine, {"r": (PROMPT, replace(GREEDY, stop=(stop,)))}).outputs["r"].completions[0]
    late = generate(engine, {"r": (PROMPT, replace(GREEDY, stop=(stop,), min_tokens=16))}).outputs["r"]

    assert early.finish_reason == "stop"
    assert late.completions[0].text == free.text


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_bad_words_never_come_whether_one_token_or_several(opt_folder: Path, temperature: float) -> None:
    engine = make_engine(opt_folder)
    params = replace(GREEDY, max_tokens=40, temperature=temperature, seed=3)
    tokenizer = engine.model_info.tokenizer
    word = next(
        text
        for start in range(30)
        for tokens in [only_tokens(engine, params)]
        if len(text := tokenizer.decode(tokens[start : start + 3]).strip()) > 2
        and tokenizer.encode(text, add_special_tokens=False) == tokens[start : start + 3]
    )
    run = tuple(tokenizer.encode(word, add_special_tokens=False))
    assert contains(only_tokens(engine, params), run)

    held = only_tokens(engine, replace(params, bad_words=(word,)))
    shorter = only_tokens(engine, replace(params, bad_words=(tokenizer.decode([run[0]]),)))

    assert not contains(held, run)
    assert run[0] in held, "only the last token of the run is forbidden, and only after the others"
    assert run[0] not in shorter


def test_bad_words_give_the_tokens_of_transformers(
    opt_folder: Path, opt_reference: transformers.PreTrainedModel
) -> None:
    engine = make_engine(opt_folder)
    tokenizer = engine.model_info.tokenizer
    free = only_tokens(engine, GREEDY)
    words = tuple(tokenizer.decode([token]) for token in free[2:6])
    rules = ForbiddenTokens.of(replace(GREEDY, bad_words=words), frozenset(), tokenizer)

    held = only_tokens(engine, replace(GREEDY, bad_words=words))

    ids = [list(word) for word in rules.bad_words]
    assert held == generated(opt_reference, PROMPT, 16, eos_token_id=None, bad_words_ids=ids)
    assert held != free


def test_bad_words_hold_after_a_space_too(opt_folder: Path) -> None:
    tokenizer = make_engine(opt_folder).model_info.tokenizer

    rules = ForbiddenTokens.of(replace(GREEDY, bad_words=("bad",)), frozenset(), tokenizer)

    assert {tokenizer.decode(word) for word in rules.bad_words} == {"bad", " bad"}


@given(
    output=st.lists(st.integers(0, 4), max_size=8),
    words=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple), max_size=3),
    min_tokens=st.integers(0, 5),
)
def test_forbidden_tokens_are_those_that_would_end_too_soon_or_complete_a_word(
    output: list[int], words: list[tuple[int, ...]], min_tokens: int
) -> None:
    rules = ForbiddenTokens(min_tokens, frozenset({0}), tuple(words))

    forbidden = rules.after(output)

    for token in range(5):
        completes = any(tuple([*output, token][-len(word) :]) == word for word in words)
        assert (token in forbidden) == (completes or (token == 0 and len(output) < min_tokens))


def test_forbidding_every_token_forbids_none(opt_folder: Path) -> None:
    params = replace(GREEDY, min_tokens=16, stop_token_ids=tuple(range(384)), temperature=1.0, seed=1)

    tokens = only_tokens(make_engine(opt_folder), params)

    assert len(tokens) == 1


def test_special_tokens_are_in_the_text_only_when_not_skipped(opt_folder: Path) -> None:
    engine = make_engine(opt_folder)
    eos = engine.model_info.tokenizer.eos_token_ids[0]
    params = replace(GREEDY, max_tokens=2, logit_bias={eos: 100.0})

    run = generate(
        engine, {"skipped": (PROMPT, params), "kept": (PROMPT, replace(params, skip_special_tokens=False))}
    )

    assert run.tokens("skipped") == run.tokens("kept") == [(eos, eos)]
    assert run.outputs["skipped"].completions[0].text == ""
    assert run.outputs["kept"].completions[0].text == "</s></s>"


def contains(token_ids: list[int], run: tuple[int, ...]) -> bool:
    return any(
        tuple(token_ids[start : start + len(run)]) == run for start in range(len(token_ids) - len(run) + 1)
    )
