"""Tokens of rows on a CUDA device are those that the op's meaning gives on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cuda_ops.native import use_cuda_kernels
from engine.chosen_tokens import SampledToken
from engine.sampler import SamplerRow, choose_by_race, num_tops, sample
from engine.sampling import SamplingParams
from engine.sequence import Sequence

pytestmark = pytest.mark.gpu

PARAMS = (
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=50, top_p=0.9, logprobs=0),
    SamplingParams(min_p=0.05, repetition_penalty=1.2, frequency_penalty=0.3),
    SamplingParams(top_p=0.95, logit_bias={3: 4.0}, logprobs=5),
)


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    assert use_cuda_kernels("native").level is not None
    yield
    use_cuda_kernels("reference")


def race(logits: Tensor, rows: list[SamplerRow]) -> list[SampledToken]:
    return choose_by_race(logits, rows).read(num_tops(rows))


@pytest.mark.parametrize("vocab_size", [50_257, 128_256])
def test_sampler_draws_on_the_device_what_the_meaning_draws_on_the_cpu(vocab_size: int) -> None:
    logits = torch.randn(40, vocab_size, generator=torch.Generator().manual_seed(0)) * 4
    rows = [
        SamplerRow(index, Sequence(0, [1, 2, index], 2), PARAMS[index % len(PARAMS)], seed=index)
        for index in range(len(logits))
    ]

    there, here = sample(logits.cuda(), rows), race(logits, rows)

    assert [token.token_id for token in there] == [token.token_id for token in here]
    for one, other in zip(there, here, strict=True):
        assert one.is_sound
        if other.entry is not None:
            assert one.entry is not None
            assert one.entry.logprob == pytest.approx(other.entry.logprob, abs=1e-4)
            assert [top[0] for top in one.entry.top] == [top[0] for top in other.entry.top]
