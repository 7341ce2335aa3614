from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.sampler import SampledToken, SamplerRow, most_probable, sample, score
from engine.sampling import SamplingParams, uniform_draw
from engine.sequence import Sequence

NUM_DRAWS = 20_000
# False alarms once in a million runs; the seeds are fixed, so in fact never or always.
SIGNIFICANCE = 1e-6


def draw_many(logits: Tensor, params: SamplingParams) -> Counter[int]:
    """Draw once for each of many seeds from one row of logits."""
    rows = [SamplerRow(0, Sequence(0, [1, 2], 2), params, seed) for seed in range(NUM_DRAWS)]
    return Counter(token.token_id for token in sample(logits[None], rows))


def expected_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The same distribution from its definition, one row, in float64."""
    probabilities = torch.softmax(logits.double() / params.temperature, dim=-1)
    probabilities[probabilities < params.min_p * probabilities.max()] = 0
    order = probabilities.argsort(descending=True)
    if params.top_k:
        probabilities[order[params.top_k :]] = 0
    probabilities /= probabilities.sum()
    before = probabilities[order].cumsum(0) - probabilities[order]
    if params.top_p < 1:
        probabilities[order[before >= params.top_p]] = 0
    return probabilities / probabilities.sum()


def chi_square_p_value(counts: Counter[int], probabilities: Tensor) -> float:
    likely = [token_id for token_id in range(len(probabilities)) if probabilities[token_id] * NUM_DRAWS >= 5]
    rare_expected = NUM_DRAWS - sum(float(probabilities[token_id]) * NUM_DRAWS for token_id in likely)
    pairs = [(counts[token_id], float(probabilities[token_id]) * NUM_DRAWS) for token_id in likely]
    if rare_expected >= 5:
        pairs.append((NUM_DRAWS - sum(count for count, _ in pairs), rare_expected))
    statistic = sum((count - expected) ** 2 / expected for count, expected in pairs)
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
    ],
    ids=["t1", "t0.5", "t1.7", "top_k", "top_p", "top_p_hot", "min_p", "all"],
)
@pytest.mark.parametrize("vocab_size", [30, 300])
def test_sampler_draws_from_the_distribution_asked_for(params: SamplingParams, vocab_size: int) -> None:
    logits = 2 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(3))

    counts = draw_many(logits, params)

    expected = expected_probabilities(logits, params)
    assert all(expected[token_id] > 0 for token_id in counts), "a token was drawn that is cut off"
    assert chi_square_p_value(counts, expected) > SIGNIFICANCE


def test_sampler_holds_the_whole_nucleus_of_a_flat_distribution_over_a_large_vocabulary() -> None:
    params = SamplingParams(top_p=0.9)
    rows = [SamplerRow(0, Sequence(0, [1], 1), params, seed) for seed in range(500)]

    drawn = [token.token_id for token in sample(torch.zeros(1, 5000), rows)]

    # 4500 of the 5000 are kept, or one more by rounding.
    assert max(drawn) <= 4500
    assert len({token_id // 450 for token_id in drawn}) >= 10


@settings(max_examples=60, deadline=None)
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
    assert chi_square_p_value(counts, torch.full((20,), 0.05, dtype=torch.float64)) > SIGNIFICANCE
