"""Attention kernels, emulated and on a GPU, against attention written out in float64."""

from __future__ import annotations

import math

import pytest
import torch

import cuda_ops
from cuda_ops.cuda.launcher import Counters
from cuda_ops.cuda.library import OPS
from tests.support.dense_oracle import PagedCase, attend_densely, attention_tolerance, in_float8, make_case
from tests.support.emulated_kernels import EmulatedLauncher, registered, require_compiler
from tests.support.kernel_resources import VariantRecorder


def decode(
    case: PagedCase,
    window: int | None = None,
    max_context_len: int | None = None,
    split_len: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    # A strided result, as the first rows of a mixed batch are not; beside it nothing may be written.
    whole = torch.full((len(case.query), case.query.shape[1] + 1, case.query.shape[2]), 7.0).to(case.query)
    cuda_ops.paged_attention_decode(
        whole[:, 1:], case.query, case.key_cache, case.value_cache, case.block_tables, case.context_lens,
        max_context_len=max_context_len or case.max_context_len, scale=case.scale, sliding_window=window,
        split_len=split_len, soft_cap=soft_cap, scales=case.scales,
    )  # fmt: skip
    assert (whole[:, 0] == 7.0).all()
    return whole[:, 1:]


def error_of(
    actual: torch.Tensor, case: PagedCase, window: int | None = None, soft_cap: float | None = None
) -> float:
    return float((actual.double() - attend_densely(case, window, soft_cap)).abs().max())


def decode_case(
    lengths: list[int],
    *,
    group: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 16,
) -> PagedCase:
    return make_case(
        lengths, [1] * len(lengths),
        num_kv_heads=2, group=group, head_dim=head_dim, block_size=block_size, dtype=dtype, seed=head_dim,
    )  # fmt: skip


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 1), (80, 3), (96, 1), (128, 4), (256, 8)])
def test_decode_equals_dense_attention_at_odd_lengths(head_dim: int, group: int, dtype: torch.dtype) -> None:
    case = decode_case([1, 15, 16, 17, 130], group=group, head_dim=head_dim, dtype=dtype)

    assert error_of(decode(case), case) <= attention_tolerance(case)


@pytest.mark.parametrize("window", [None, 1, 40, 300, 5000])
def test_decode_merges_splits_of_contexts_that_fill_some_of_them(
    window: int | None, launcher: EmulatedLauncher
) -> None:
    launcher.num_multiprocessors = 10
    case = decode_case([1300, 1, 256, 257], group=4, head_dim=64)

    # As for a graph: the grid is that of the longest context there may be.
    actual = decode(case, window, max_context_len=4096)

    assert error_of(actual, case, window) <= attention_tolerance(case)


@pytest.mark.parametrize("window", [None, 700])
def test_decode_in_splits_of_one_length_gives_the_same_bits_in_any_company(
    window: int | None, launcher: EmulatedLauncher
) -> None:
    launcher.num_multiprocessors = 2
    case = decode_case([1300, 270, 2050], group=4, head_dim=64)
    alone = PagedCase(
        case.query[:1], case.key_cache, case.value_cache, case.query_start[:2], case.context_lens[:1],
        case.block_tables[:1], (1,),
    )  # fmt: skip

    together = decode(case, window, split_len=512)

    assert error_of(together, case, window) <= attention_tolerance(case)
    assert torch.equal(decode(alone, window, split_len=512), together[:1])
    # A grid for other lengths cuts elsewhere, unless it is told where to, or a window bounds it.
    assert window or not torch.equal(decode(alone), decode(case)[:1])


def test_decode_merges_again_and_again_and_leaves_its_counters_at_zero(launcher: EmulatedLauncher) -> None:
    launcher.num_multiprocessors = 10
    case = decode_case([1300, 700, 20], group=4, head_dim=64)

    first, second = decode(case), decode(case)

    assert torch.equal(first, second)
    assert not launcher.counters.take(1, torch.device("cpu")).any()


@pytest.mark.parametrize("num_sequences", [1, 3, 40, 200])
def test_decode_for_the_longest_context_is_one_launch_that_fills_the_device_once(num_sequences: int) -> None:
    """As a graph has it: of 131,072 tokens, whatever the contexts will be."""
    recorder = VariantRecorder()
    case = decode_case([1] * num_sequences, group=4, head_dim=128)
    arguments = (
        torch.empty_like(case.query, memory_format=torch.contiguous_format), case.query, case.key_cache,
        case.value_cache, case.block_tables, case.context_lens, 131_072, case.scale,
    )  # fmt: skip

    for window in (None, 1024):
        OPS["paged_attention_decode"](recorder, *arguments, window, None, None)

    whole, windowed = (math.prod(shape.blocks) for shape in recorder.shapes)
    always = num_sequences * 2
    assert whole <= 4 * recorder.num_multiprocessors + always
    assert windowed <= min(whole, always * math.ceil((1024 + 32) / 256))


@pytest.mark.usefixtures("launcher")
def test_decode_takes_large_blocks_and_groups_of_more_heads_than_a_tile_has_rows() -> None:
    case = decode_case([70, 33], group=20, head_dim=64, block_size=32)

    assert error_of(decode(case), case) <= attention_tolerance(case)


def test_decode_gives_zeros_for_rows_that_only_fill_up_a_batch(launcher: EmulatedLauncher) -> None:
    case = decode_case([20, 20, 20], group=4, head_dim=64)
    case.context_lens[1] = 0
    case.block_tables[1] = 0

    actual = decode(case, max_context_len=4096)

    alone = decode(decode_case([20, 20, 20], group=4, head_dim=64), max_context_len=4096)
    assert not actual[1].any()
    assert torch.equal(actual[::2], alone[::2])


def test_decode_is_blind_to_what_lies_in_slots_past_the_context(launcher: EmulatedLauncher) -> None:
    case = decode_case([5, 18], group=1, head_dim=64)
    before = decode(case)
    for cache in (case.key_cache, case.value_cache):
        cache[case.block_tables[0, 0].item(), :, 5:] = torch.nan
        cache[case.block_tables[1, 1].item(), :, 2:] = torch.nan

    assert torch.equal(decode(case), before)


def prefill(
    case: PagedCase,
    window: int | None = None,
    out: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    out = (
        torch.full_like(case.query, torch.nan, memory_format=torch.contiguous_format) if out is None else out
    )
    cuda_ops.paged_attention_prefill(
        out, case.query, case.key_cache, case.value_cache, case.query_start, case.context_lens,
        case.block_tables, scale=case.scale, sliding_window=window, soft_cap=soft_cap, scales=case.scales,
    )  # fmt: skip
    return out


def prefill_case(
    parts: list[tuple[int, int]], *, group: int, head_dim: int, dtype: torch.dtype = torch.bfloat16
) -> PagedCase:
    """Parts are tokens that earlier chunks have stored, and tokens of this one."""
    return make_case(
        [old + new for old, new in parts], [new for _, new in parts],
        num_kv_heads=1, group=group, head_dim=head_dim, block_size=16, dtype=dtype, seed=head_dim,
    )  # fmt: skip


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 2), (80, 1), (96, 1), (128, 1), (256, 1)])
def test_prefill_equals_dense_attention_over_chunks_that_continue_a_context(
    head_dim: int, group: int, dtype: torch.dtype
) -> None:
    case = prefill_case([(0, 1), (70, 37), (0, 66)], group=group, head_dim=head_dim, dtype=dtype)

    assert error_of(prefill(case), case) <= attention_tolerance(case)


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize("window", [None, 1, 33, 70, 5000])
def test_prefill_sees_its_window_when_queries_fill_several_tiles(window: int | None) -> None:
    case = prefill_case([(40, 150), (0, 128), (3, 2)], group=2, head_dim=64)

    assert error_of(prefill(case, window), case, window) <= attention_tolerance(case)


@pytest.mark.usefixtures("launcher")
def test_prefill_finds_its_tile_among_more_sequences_than_a_warp_has_lanes() -> None:
    case = prefill_case([(index % 3, 1 + index % 5) for index in range(70)], group=1, head_dim=64)

    assert error_of(prefill(case), case) <= attention_tolerance(case)


@pytest.mark.usefixtures("launcher")
def test_prefill_leaves_rows_of_other_sequences_alone() -> None:
    whole = prefill_case([(0, 1), (20, 30)], group=2, head_dim=64)
    later = PagedCase(
        whole.query, whole.key_cache, whole.value_cache, whole.query_start[1:], whole.context_lens[1:],
        whole.block_tables[1:], whole.query_lens,
    )  # fmt: skip
    out = torch.full(whole.query.shape, 7.0, dtype=whole.query.dtype)

    prefill(later, out=out)

    assert (out[0] == 7.0).all()
    assert torch.equal(out[1:], prefill(whole)[1:])


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize("soft_cap", [0.5, 50.0])
def test_attention_bends_its_scores_towards_a_soft_cap(soft_cap: float) -> None:
    decoding = decode_case([1, 15, 130], group=3, head_dim=64)
    chunks = prefill_case([(70, 37), (0, 66)], group=2, head_dim=64)

    decoded, prefilled = decode(decoding, soft_cap=soft_cap), prefill(chunks, soft_cap=soft_cap)

    assert error_of(decoded, decoding, soft_cap=soft_cap) <= attention_tolerance(decoding)
    assert error_of(prefilled, chunks, soft_cap=soft_cap) <= attention_tolerance(chunks)


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 1), (80, 3), (96, 1), (128, 4), (256, 8)])
def test_attention_reads_a_cache_of_float8_as_the_numbers_that_it_stands_for(
    head_dim: int, group: int, dtype: torch.dtype
) -> None:
    decoding = in_float8(
        decode_case([1, 15, 17, 130], group=group, head_dim=head_dim, dtype=dtype), (0.02, 3)
    )
    chunks = prefill_case([(0, 1), (70, 37), (0, 66)], group=1, head_dim=head_dim, dtype=dtype)
    chunks = in_float8(chunks, (1.0, 0.01))

    assert error_of(decode(decoding), decoding) <= attention_tolerance(decoding)
    assert error_of(prefill(chunks), chunks) <= attention_tolerance(chunks)


@pytest.mark.parametrize("window", [None, 300])
def test_attention_over_float8_merges_splits_and_keeps_windows_and_soft_caps(
    window: int | None, launcher: EmulatedLauncher
) -> None:
    launcher.num_multiprocessors = 10
    decoding = in_float8(decode_case([1300, 1, 257], group=4, head_dim=64), (0.5, 0.25))
    chunks = in_float8(prefill_case([(40, 150), (3, 2)], group=2, head_dim=64), (0.5, 0.25))

    decoded, prefilled = decode(decoding, window, 4096, soft_cap=3.0), prefill(chunks, window, soft_cap=3.0)

    assert error_of(decoded, decoding, window, 3.0) <= attention_tolerance(decoding)
    assert error_of(prefilled, chunks, window, 3.0) <= attention_tolerance(chunks)


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize("is_float8", [False, True])
def test_attention_shows_a_nan_to_who_sees_it_and_to_no_one_else(is_float8: bool) -> None:
    decoding = decode_case([20, 20], group=2, head_dim=64)
    chunks = prefill_case([(0, 20), (0, 20)], group=1, head_dim=64)
    for case in (decoding, chunks):
        case.key_cache[int(case.block_tables[0, 0]), 0, 3, 5] = torch.nan
    if is_float8:
        decoding, chunks = in_float8(decoding, (1.0, 1.0)), in_float8(chunks, (1.0, 1.0))

    decoded, prefilled = decode(decoding), prefill(chunks)

    assert decoded[0, :2].isnan().all()
    assert not decoded[0, 2:].isnan().any()
    assert not decoded[1].isnan().any()
    assert prefilled[3:20].isnan().all()
    assert not prefilled[20:].isnan().any()


def test_attention_gives_the_same_bits_whatever_the_order_of_warps() -> None:
    require_compiler()
    decoding = decode_case([1300, 40], group=4, head_dim=64)
    chunks = prefill_case([(40, 150), (0, 3)], group=2, head_dim=64)
    results = []
    for is_reversed in (False, True):
        with registered(EmulatedLauncher(is_reversed=is_reversed)):
            results.append((decode(decoding), prefill(chunks)))

    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_counters_are_the_same_memory_until_more_are_wanted_and_stay_where_they_are() -> None:
    counters, cpu = Counters(), torch.device("cpu")
    first = counters.take(10, cpu)

    larger = counters.take(10 * len(first), cpu)

    assert counters.take(20, cpu).data_ptr() == larger.data_ptr() != first.data_ptr()
    assert len(larger) >= 10 * len(first)
    assert not larger.any()
