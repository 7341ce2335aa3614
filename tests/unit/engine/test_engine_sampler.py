from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from engine.chosen_tokens import SampledToken
from engine.sampler import SamplerRow, choose_by_race, most_probable, num_tops, sample, score
from engine.sampling import SamplingParams, uniform_draw
from engine.sequence import Sequence
from tests.unit.engine.engine_factory import generate, make_engine, random_prompt

NUM_DRAWS = 20_000
# False alarms once in a million runs; the seeds are fixed, so in fact never or always.
SIGNIFICANCE = 1e-6


Probabilities = NDArray[np.float64]
PROMPT, OUTPUT = [1, 2], [2, 4, 4, 7]
RACED = [
    SamplingParams(
        temperature=1.4, top_k=20, top_p=0.9, min_p=0.01, presence_penalty=-0.5, frequency_penalty=0.7,
        repetition_penalty=0.8, logit_bias={4: 2.5},
    ),
    SamplingParams(logit_bias={5: 3.0, 6: -2.0, 2: -100.0}, repetition_penalty=1.6),
    SamplingParams(temperature=0.0, frequency_penalty=-0.8),
]  # fmt: skip


def draw_many(logits: Tensor, params: SamplingParams, output: list[int]) -> Counter[int]:
    """Draw once for each of many seeds from one row of logits, after `PROMPT` and this output."""
    sequence = Sequence(0, [*PROMPT, *output], len(PROMPT))
    rows = [SamplerRow(0, sequence, params, seed) for seed in range(NUM_DRAWS)]
    return Counter(token.token_id for token in sample(logits[None], rows))


def expected_probabilities(
    logits: Tensor, params: SamplingParams, prompt: list[int], output: list[int]
) -> Probabilities:
    """The same distribution from the definitions of its parameters, one row, in numpy's float64."""
    row = _penalised(logits.double().numpy().copy(), params, prompt, output) / params.temperature
    probabilities: Probabilities = np.exp(row - row.max())
    probabilities /= probabilities.sum()
    probabilities[probabilities < params.min_p * probabilities.max()] = 0
    order = np.argsort(-probabilities)
    if params.top_k:
        probabilities[order[params.top_k :]] = 0
    probabilities /= probabilities.sum()
    before = probabilities[order].cumsum() - probabilities[order]
    if params.top_p < 1:
        probabilities[order[before >= params.top_p]] = 0
    probabilities /= probabilities.sum()
    return probabilities


def _penalised(
    row: Probabilities, params: SamplingParams, prompt: list[int], output: list[int]
) -> Probabilities:
    for token_id, bias in params.logit_bias.items():
        row[token_id] += bias
    for token_id in {*prompt, *output}:
        factor = params.repetition_penalty
        row[token_id] = row[token_id] / factor if row[token_id] > 0 else row[token_id] * factor
    for token_id in output:
        row[token_id] -= params.frequency_penalty
    for token_id in set(output):
        row[token_id] -= params.presence_penalty
    return row


def chi_square_p_value(counts: Counter[int], probabilities: Probabilities) -> float:
    """Outcomes too rare for the test's approximation are counted as one."""
    num_draws = counts.total()
    expected = probabilities * num_draws
    likely = np.flatnonzero(expected >= 5).tolist()
    pairs = [(counts[outcome], float(expected[outcome])) for outcome in likely]
    rare_expected = num_draws - sum(value for _, value in pairs)
    if rare_expected >= 5:
        pairs.append((num_draws - sum(count for count, _ in pairs), rare_expected))
    statistic = sum((count - value) ** 2 / value for count, value in pairs)
    half_freedom = torch.tensor((len(pairs) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.7),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(top_p=0.95, temperature=2.0),
        SamplingParams(min_p=0.1),
        SamplingParams(top_k=20, top_p=0.7, min_p=0.02, temperature=1.3),
        SamplingParams(presence_penalty=1.5),
        SamplingParams(frequency_penalty=-0.8),
        SamplingParams(repetition_penalty=1.6),
        SamplingParams(logit_bias={5: 3.0, 6: -2.0, 2: -100.0}),
        SamplingParams(
            temperature=1.4,
            top_p=0.9,
            presence_penalty=-0.5,
            frequency_penalty=0.7,
            repetition_penalty=0.8,
            logit_bias={4: 2.5},
        ),
    ],
    ids=[
        *("t1", "t0.5", "t1.7", "top_k", "top_p", "top_p_hot", "min_p", "truncations"),
        *("presence", "frequency", "repetition", "bias", "all"),
    ],
)
@pytest.mark.parametrize("vocab_size", [30, 300])
def test_sampler_draws_from_the_distribution_asked_for(params: SamplingParams, vocab_size: int) -> None:
    logits = 2 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(3))

    counts = draw_many(logits, params, OUTPUT)

    expected = expected_probabilities(logits, params, PROMPT, OUTPUT)
    assert all(expected[token_id] > 0 for token_id in counts), "a token was drawn that is cut off"
    assert chi_square_p_value(counts, expected) > SIGNIFICANCE


def test_engine_draws_pairs_of_tokens_from_the_distribution_of_the_model(
    opt_folder: Path, opt_reference: transformers.PreTrainedModel
) -> None:
    """Eight requests of 128 sequences; the second token's penalties depend on the first one."""
    top_k, prompt = 4, random_prompt(9)
    params = SamplingParams(
        n=128, max_tokens=2, ignore_eos=True, temperature=3.0, top_k=top_k, presence_penalty=2.0
    )
    requests = {str(seed): (prompt, replace(params, seed=seed)) for seed in range(8)}
    config = {"num_blocks": 2000, "max_num_sequences": 256, "max_num_batched_tokens": 256}

    run = generate(make_engine(opt_folder, **config), requests)

    def next_probabilities(output: list[int]) -> Probabilities:
        with torch.inference_mode():
            logits = opt_reference(torch.tensor([[*prompt, *output]])).logits[0, -1]
        return expected_probabilities(logits, params, prompt, output)

    first = next_probabilities([])
    likely = np.flatnonzero(first).tolist()
    joint = {
        (one, int(two)): float(first[one] * second[two])
        for one in likely
        for second in [next_probabilities([one])]
        for two in np.flatnonzero(second)
    }
    outcomes = list(joint)
    counts = Counter(outcomes.index(pair) for name in requests for pair in run.tokens(name))  # type: ignore[arg-type]  # pairs
    assert counts.total() == 1024
    assert len(counts) > 2 * top_k, "hardly a choice"
    assert chi_square_p_value(counts, np.array(list(joint.values()))) > SIGNIFICANCE


def race(logits: Tensor, rows: list[SamplerRow]) -> list[SampledToken]:
    return choose_by_race(logits, rows).read(num_tops(rows))


@pytest.mark.parametrize("params", RACED, ids=["all", "bias", "greedy"])
@pytest.mark.parametrize("is_masked", [False, True], ids=["free", "masked"])
def test_sampler_of_a_gpu_draws_from_the_distribution_asked_for(
    params: SamplingParams, is_masked: bool
) -> None:
    """Its op runs here by its meaning; forbidden tokens, a mask and tokens run ahead count too."""
    logits = 2 * torch.randn(60, generator=torch.Generator().manual_seed(3))
    allowed = bytes([0b10110111] * 7 + [0b0111]) if is_masked else None
    forbidden, ahead = frozenset({0, 9}), (7, 30)
    sequence = Sequence(0, [*PROMPT, *OUTPUT], len(PROMPT))
    rows = [SamplerRow(0, sequence, params, seed, forbidden, allowed, ahead) for seed in range(4000)]

    tokens = race(logits.expand(len(rows), -1), rows)

    barred = {0, 9} | ({token for token in range(60) if token % 8 in (3, 6)} if is_masked else set())
    known = dict.fromkeys(barred, -torch.inf)
    drawn = replace(params, temperature=params.temperature or 1e-4)
    penalised = _penalised(logits.double().numpy().copy(), drawn, PROMPT, [*OUTPUT, *ahead])
    for token, value in known.items():
        penalised[token] = value
    plain = SamplingParams(
        temperature=drawn.temperature, top_k=drawn.top_k, top_p=drawn.top_p, min_p=drawn.min_p
    )
    expected = expected_probabilities(torch.from_numpy(penalised), plain, PROMPT, OUTPUT)
    counts = Counter(token.token_id for token in tokens)
    assert all(expected[token_id] > 0 for token_id in counts), "a token was drawn that is cut off"
    if not params.is_greedy:
        assert chi_square_p_value(counts, expected) > SIGNIFICANCE


def test_sampler_of_a_gpu_gives_the_log_probabilities_that_are_wanted() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(3, 1)
    wanted = (None, 0, 2)
    rows = [
        SamplerRow(
            row, Sequence(0, [1], 1), SamplingParams(temperature=0.0, logit_bias={3: 50.0}, logprobs=num), 0
        )
        for row, num in enumerate(wanted)
    ]

    tokens, expected = race(logits, rows), sample(logits, rows)

    assert [token.token_id for token in tokens] == [3, 3, 3]
    assert tokens[0] == expected[0]
    for token, meant in zip(tokens[1:], expected[1:], strict=True):
        assert token.entry is not None
        assert meant.entry is not None
        assert token.entry.logprob == pytest.approx(meant.entry.logprob)
        assert [top[0] for top in token.entry.top] == [top[0] for top in meant.entry.top]
        assert [top[1] for top in token.entry.top] == pytest.approx([top[1] for top in meant.entry.top])
    assert [len(token.entry.top) for token in tokens[1:] if token.entry is not None] == [0, 2]


def test_sampler_holds_the_whole_nucleus_of_a_flat_distribution_over_a_large_vocabulary() -> None:
    params = SamplingParams(top_p=0.9)
    rows = [SamplerRow(0, Sequence(0, [1], 1), params, seed) for seed in range(500)]

    drawn = [token.token_id for token in sample(torch.zeros(1, 5000), rows)]

    # 4500 of the 5000 are kept, or one more by rounding.
    assert max(drawn) <= 4500
    assert len({token_id // 450 for token_id in drawn}) >= 10


@settings(max_examples=60)
@given(
    temperature=st.sampled_from([0.0, 0.01, 0.7, 1.5]),
    top_k=st.sampled_from([0, 1, 3, 100, 2000]),
    top_p=st.sampled_from([0.05, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 100),
)
def test_sampler_chooses_for_a_row_the_same_beside_any_others(
    temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    logits = torch.randn(4, 1500, generator=torch.Generator().manual_seed(seed)) * 3
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    others = [SamplingParams(), SamplingParams(temperature=0.0), SamplingParams(top_p=0.99)]
    row = SamplerRow(0, Sequence(0, [1], 1), params, seed)
    crowd = [
        row,
        *(SamplerRow(i, Sequence(0, [1], 1), other, seed + i) for i, other in enumerate(others, start=1)),
    ]

    assert sample(logits, crowd)[0] == sample(logits[:1], [row])[0]


def test_sampler_is_greedy_when_the_temperature_is_zero_or_tiny() -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    for temperature in (0.0, 1e-30):
        params = SamplingParams(temperature=temperature)
        rows = [SamplerRow(i, Sequence(0, [1], 1), params, i) for i in range(3)]

        assert [token.token_id for token in sample(logits, rows)] == logits.argmax(dim=-1).tolist()


def sample_one(logits: Tensor, params: SamplingParams, prompt: list[int], output: list[int]) -> SampledToken:
    sequence = Sequence(0, [*prompt, *output], len(prompt))
    return sample(logits[None], [SamplerRow(0, sequence, params, 0)])[0]


def test_sampler_penalties_change_the_choice_and_leave_the_logits_as_they_were() -> None:
    logits = torch.tensor([5.0, 4.0, 3.0, -1.0])
    before = logits.clone()
    greedy = SamplingParams(temperature=0.0)

    def choose(output: list[int], prompt: list[int], **fields: float) -> int:
        return sample_one(logits, replace(greedy, **fields), prompt, output).token_id  # type: ignore[arg-type]

    assert choose([0], [3], presence_penalty=1.5) == 1
    assert choose([3], [0], presence_penalty=1.5) == 0, "the prompt does not count for presence"
    assert choose([0], [3], frequency_penalty=0.8) == 0
    assert choose([0, 0], [3], frequency_penalty=0.8) == 1
    assert choose([], [0], repetition_penalty=1.5) == 1, "the prompt counts for repetition"
    assert sample_one(logits, replace(greedy, logit_bias={2: 10.0}), [3], []).token_id == 2
    assert torch.equal(logits, before)


@pytest.mark.parametrize("penalty", [1.6, 0.6])
def test_repetition_penalty_and_bias_give_the_tokens_of_transformers(
    opt_folder: Path, opt_reference: transformers.PreTrainedModel, penalty: float
) -> None:
    """On tokens that have both, so that their order shows: the bias counts as the model's own opinion."""
    prompt, greedy = random_prompt(12, 3), SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    engine = make_engine(opt_folder)
    (free,) = generate(engine, {"free": (prompt, greedy)}).tokens("free")
    bias = {token_id: 4.0 for token_id in free[:4]} | {prompt[0]: 6.0}

    params = replace(greedy, repetition_penalty=penalty, logit_bias=bias)
    (ours,) = generate(engine, {"r": (prompt, params)}).tokens("r")

    ids = opt_reference.generate(  # type: ignore[operator]  # its type is lost on the way
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        repetition_penalty=penalty,
        sequence_bias=[[[token_id], value] for token_id, value in bias.items()],
    )
    assert list(ours) == ids[0, len(prompt) :].tolist()
    assert ours != free


def test_sampler_logprobs_are_of_the_models_own_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    params = SamplingParams(temperature=0.0, logit_bias={3: 50.0}, logprobs=2)

    token = sample_one(logits, params, [1], [])

    expected = torch.log_softmax(logits, dim=-1)
    assert token.token_id == 3
    assert token.entry is not None
    assert token.entry.logprob == pytest.approx(float(expected[3]))
    assert [token_id for token_id, _ in token.entry.top] == [0, 1]
    assert [value for _, value in token.entry.top] == pytest.approx(expected[:2].tolist())


def test_score_and_most_probable_agree() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(1))
    tops = most_probable(logits, 3)

    entries = score(logits, [top[0][0] for top in tops], 3)

    assert [list(entry.top) for entry in entries] == tops
    assert [entry.logprob for entry in entries] == [top[0][1] for top in tops]


def test_uniform_draw_is_uniform_and_different_for_every_key() -> None:
    keys = [(seed, index, position) for seed in range(20) for index in range(10) for position in range(100)]

    values = [uniform_draw(*key) for key in keys]

    assert len(set(values)) == len(keys)
    assert all(0 <= value < 1 for value in values)
    counts = Counter(int(value * 20) for value in values)
    assert len(keys) == NUM_DRAWS
    assert chi_square_p_value(counts, np.full(20, 0.05)) > SIGNIFICANCE
