"""Tokens chosen by the kernels, emulated and on a GPU, are those that the op means; odd rows included."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops import reference
from cuda_ops.sampling import ChosenTokens, LogitChanges
from tests.support.borrowed_gpu import BorrowedGpu
from tests.support.drawn_tokens import NINE_LOGITS, make_parameters, p_value_of_draws
from tests.support.emulated_kernels import EmulatedLauncher

DTYPES = [torch.float32, torch.bfloat16]
NO_CUT = (0, 1.0, 0.0)
# temperature, then top_k, top_p, min_p
CUTS = [
    (0.0, 5, 0.5, 0.5), (1.0, *NO_CUT), (1.0, 1, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (1.3, 0, 0.6, 0.0),
    (1.0, 0, 1.0, 0.2), (2.0, 40, 0.9, 0.01), (1.0, 0, 0.0, 0.0), (1e-30, 7, 0.9, 0.0),
    (1.0, 9999, 0.999, 1.0),
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("launcher")


def make_logits(num_rows: int, vocab_size: int, dtype: torch.dtype, *, gap: int = 8) -> Tensor:
    """Rows that are a strided slice."""
    generator = torch.Generator().manual_seed(vocab_size)
    return (torch.randn(num_rows, vocab_size + gap, generator=generator) * 3).to(dtype)[:, gap:]


def make_changes(num_rows: int, vocab_size: int) -> LogitChanges:
    """Entries for every other row and masks for every third."""
    generator = torch.Generator().manual_seed(1)
    entries = []
    for row in range(num_rows):
        share = torch.rand(vocab_size, generator=generator) < (0.3 if row % 2 else 0.0)
        tokens = share.nonzero()[:, 0]
        seen = torch.randint(0, 2, tokens.shape, generator=generator)
        counts = seen * torch.randint(0, 4, tokens.shape, generator=generator)
        entries.append(torch.stack((tokens, seen, counts), 1))
    starts = torch.tensor([0, *(len(entry) for entry in entries)]).cumsum(0)
    biases = torch.randn(int(starts[-1]), generator=generator)
    biases[::7] = -torch.inf
    words = torch.randint(-(2**31), 2**31, (2, vocab_size // 32 + 2), generator=generator)
    rows = torch.tensor([row // 3 % 2 if row % 3 == 0 else -1 for row in range(num_rows)])
    return LogitChanges(starts.int(), torch.cat(entries).int().contiguous(), biases, words.int(), rows.int())


def expected(
    logits: Tensor,
    parameters: tuple[Tensor, Tensor],
    changes: LogitChanges | None = None,
    *,
    truncates: bool = True,
    num_top: int = 0,
) -> ChosenTokens:
    numbers, controls = parameters
    if changes is None:
        meant = reference.sample_tokens(
            logits, numbers, controls, None, None, None, None, None, truncates, True, num_top
        )
    else:
        meant = reference.sample_tokens(
            logits, numbers, controls, changes.starts, changes.tokens, changes.biases, changes.masks,
            changes.mask_rows, truncates, True, num_top,
        )  # fmt: skip
    return ChosenTokens(*meant)


def assert_same(actual: ChosenTokens, meant: ChosenTokens) -> None:
    assert actual.token_ids.tolist() == meant.token_ids.tolist()
    assert actual.are_sound.tolist() == meant.are_sound.tolist()
    # Sums of up to 2^18 terms of at most 1, a logarithm of them, and the chosen logit.
    torch.testing.assert_close(actual.logprobs, meant.logprobs, rtol=1e-6, atol=1e-5)
    assert actual.top_ids.tolist() == meant.top_ids.tolist()
    torch.testing.assert_close(actual.top_logprobs, meant.top_logprobs, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 7, 1000, 4099])
@pytest.mark.parametrize("changed", [False, True], ids=["as_they_are", "changed"])
def test_sample_tokens_chooses_what_it_means(vocab_size: int, dtype: torch.dtype, changed: bool) -> None:
    logits, parameters = make_logits(len(CUTS), vocab_size, dtype), make_parameters(CUTS)
    changes = make_changes(len(CUTS), vocab_size) if changed else None

    chosen = cuda_ops.sample_tokens(logits, *parameters, changes, truncates=True, scores=True)

    assert_same(chosen, expected(logits, parameters, changes))


@pytest.mark.parametrize("vocab_size", [32_000, 128_256, 262_144])
def test_sample_tokens_of_large_vocabularies_takes_several_blocks_a_row(vocab_size: int) -> None:
    cuts = [(0.8, *NO_CUT), (1.0, 50, 0.9, 0.0)]
    logits, parameters = make_logits(2, vocab_size, torch.bfloat16), make_parameters(cuts)

    chosen = cuda_ops.sample_tokens(logits, *parameters, truncates=True, scores=True)

    assert_same(chosen, expected(logits, parameters))


def test_sample_tokens_without_cuts_ignores_them_and_scores_only_when_asked() -> None:
    logits, parameters = make_logits(len(CUTS), 999, torch.float32), make_parameters(CUTS)

    chosen = cuda_ops.sample_tokens(logits, *parameters, truncates=False, scores=False)

    assert chosen.token_ids.tolist() == expected(logits, parameters, truncates=False).token_ids.tolist()
    assert chosen.logprobs.shape == (0,)


def test_sample_tokens_takes_the_first_of_equals_and_keeps_no_more_of_them_than_asked() -> None:
    """A row of three values: every threshold falls among equals."""
    logits = (torch.arange(600) % 3).float().expand(40, -1)
    cuts = [(1.0, 3, 1.0, 0.0), (1.0, 0, 0.01, 0.0), (0.0, *NO_CUT), (1.0, 1, 1.0, 0.0)] * 10
    parameters = make_parameters(cuts)

    chosen = cuda_ops.sample_tokens(logits, *parameters, truncates=True, scores=True)

    assert_same(chosen, expected(logits, parameters))
    tokens = chosen.token_ids
    assert set(tokens[0::4].tolist()) == {2, 5, 8}
    # 200 tokens of weight 1, 200 of 1/e, 200 of 1/e^2: a hundredth of all is held by the first four.
    assert math.ceil(0.01 * 200 * (1 + math.exp(-1) + math.exp(-2))) == 4
    assert set(tokens[1::4].tolist()) <= {2, 5, 8, 11}
    assert set(tokens[2::4].tolist() + tokens[3::4].tolist()) == {2}


@pytest.mark.parametrize("cut", [(70, 1.0, 0.0), (0, 0.3, 0.0), (300, 0.4, 0.0)])
def test_sample_tokens_cuts_a_nearly_flat_row_where_it_means(cut: tuple[int, float, float]) -> None:
    """Most draws would fall past a cut that is off; the cut is in the second bin of every round or later."""
    generator = torch.Generator().manual_seed(5)
    logits = (7.4 + torch.randperm(512, generator=generator) / 400).expand(48, -1)
    parameters = make_parameters([(1.0, *cut)] * 48)

    chosen = cuda_ops.sample_tokens(logits, *parameters, truncates=True, scores=True)

    assert_same(chosen, expected(logits, parameters))


def test_sample_tokens_takes_the_only_token_left_and_the_first_where_none_is() -> None:
    logits = make_logits(4, 100, torch.float32)
    parameters = make_parameters([(0.0, *NO_CUT), (1.0, *NO_CUT), (1.0, 3, 0.5, 0.1), (1.0, 3, 0.5, 0.1)])
    masks = torch.zeros(2, 4, dtype=torch.int32)
    masks[0, 2] = 1 << 3
    changes = LogitChanges(
        torch.zeros(5, dtype=torch.int32),
        torch.zeros(0, 3, dtype=torch.int32),
        torch.zeros(0),
        masks,
        torch.tensor([0, 0, 0, 1], dtype=torch.int32),
    )

    chosen = cuda_ops.sample_tokens(logits, *parameters, changes, truncates=True, scores=True)

    assert_same(chosen, expected(logits, parameters, changes))
    assert chosen.token_ids.tolist() == [67, 67, 67, 0]
    assert chosen.are_sound.all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sample_tokens_reports_rows_that_are_no_numbers_and_leaves_the_others_alone(
    temperature: float,
) -> None:
    logits = make_logits(5, 1500, torch.float32).clone()
    cuts = [(temperature, 0, 1.0, 0.0), (temperature, 8, 0.5, 0.1)] * 2 + [(temperature, 8, 0.5, 0.1)]
    parameters = make_parameters(cuts)
    whole = cuda_ops.sample_tokens(logits, *parameters, truncates=True, scores=True)
    logits[0, 1400] = torch.nan
    logits[1, 3] = torch.nan
    logits[2, 700] = torch.inf
    logits[3] = -torch.inf

    chosen = cuda_ops.sample_tokens(logits, *parameters, truncates=True, scores=True)

    assert chosen.are_sound.tolist() == [False, False, False, False, True]
    assert chosen.token_ids[4] == whole.token_ids[4]
    assert ((chosen.token_ids >= 0) & (chosen.token_ids < 1500)).all()


@pytest.mark.parametrize(("cut", "num_draws"), [(NO_CUT, 900), ((6, 0.9, 0.01), 400)], ids=["free", "cut"])
def test_sample_tokens_draws_from_the_softmax_of_what_is_kept(
    cut: tuple[int, float, float], num_draws: int
) -> None:
    temperature = 0.9
    parameters = make_parameters([(temperature, *cut)] * num_draws)

    chosen = cuda_ops.sample_tokens(
        NINE_LOGITS.expand(num_draws, -1), *parameters, truncates=True, scores=True
    )

    counts = torch.bincount(chosen.token_ids, minlength=len(NINE_LOGITS))
    assert p_value_of_draws(counts, NINE_LOGITS, temperature, *cut) > 1e-4


def test_sample_tokens_gives_a_row_the_same_token_beside_any_others(
    launcher: EmulatedLauncher | BorrowedGpu,
) -> None:
    logits, (numbers, controls) = make_logits(len(CUTS), 5000, torch.bfloat16), make_parameters(CUTS)
    together = cuda_ops.sample_tokens(logits, numbers, controls, truncates=True, scores=True).token_ids

    launcher.num_multiprocessors = 132
    for row in range(len(CUTS)):
        one = slice(row, row + 1)
        alone = cuda_ops.sample_tokens(logits[one], numbers[one], controls[one], truncates=True, scores=True)
        assert alone.token_ids[0] == together[row]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab_size", "num_top"), [(1, 1), (7, 7), (999, 20), (4096, 1), (128_256, 20)])
def test_sample_tokens_gives_the_most_probable_tokens_beside_the_chosen_one(
    vocab_size: int, num_top: int, dtype: torch.dtype
) -> None:
    """In bfloat16 many of them are equal."""
    logits, parameters = make_logits(3, vocab_size, dtype), make_parameters([(0.9, *NO_CUT)] * 3)

    chosen = cuda_ops.sample_tokens(logits, *parameters, truncates=False, scores=True, num_top=num_top)

    assert_same(chosen, expected(logits, parameters, truncates=False, num_top=num_top))


@pytest.mark.parametrize("is_ascending", [False, True])
def test_sample_tokens_finds_the_most_probable_tokens_where_one_thread_has_them_all(
    is_ascending: bool,
) -> None:
    """The hundred best are a thread's own, by any width of its reads; the others are equal."""
    logits = torch.full((2, 256 * 400), -3.0)
    own = torch.arange(100) * 256 * 4
    logits[:, own] = torch.arange(100.0).flip(0) if is_ascending else torch.arange(100.0)
    logits[1] = -logits[1]
    parameters = make_parameters([(1.0, *NO_CUT)] * 2)

    chosen = cuda_ops.sample_tokens(logits, *parameters, truncates=False, scores=True, num_top=20)

    assert_same(chosen, expected(logits, parameters, truncates=False, num_top=20))


def test_sample_tokens_of_rows_without_numbers_or_with_one_token_left_names_tokens_that_exist() -> None:
    logits = make_logits(3, 1000, torch.float32).clone()
    logits[0] = -torch.inf
    logits[0, 70] = 1.0
    logits[1, 5::7] = torch.nan
    logits[2] = torch.nan
    parameters = make_parameters([(1.0, *NO_CUT)] * 3)

    chosen = cuda_ops.sample_tokens(logits, *parameters, truncates=False, scores=False, num_top=4)

    assert chosen.top_ids[0].tolist() == [70, 0, 1, 2]
    assert chosen.top_logprobs[0].tolist() == [0.0, *[-torch.inf] * 3]
    assert ((chosen.top_ids >= 0) & (chosen.top_ids < 1000)).all()
    assert chosen.logprobs.shape == (0,)
