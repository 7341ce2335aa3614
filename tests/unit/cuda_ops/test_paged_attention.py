"""Paged attention against attention written out in float64, over odd shapes and shuffled pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_ops
from cuda_ops import reference
from cuda_ops.errors import OpInputError
from tests.support.dense_oracle import PagedCase, attend_densely, attention_tolerance, in_float8, make_case

torch.set_num_threads(1)

shapes = st.fixed_dictionaries(
    {
        "num_kv_heads": st.integers(1, 3),
        "group": st.sampled_from([1, 2, 3, 8]),
        "head_dim": st.sampled_from([1, 7, 16, 33, 64]),
        "block_size": st.sampled_from([1, 3, 16]),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "seed": st.integers(0, 999),
    }
)
windows = st.none() | st.integers(1, 40)
soft_caps = st.none() | st.sampled_from([0.5, 30.0])
contexts = st.lists(st.integers(1, 37), min_size=1, max_size=5)
chunks = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=4)


def decode(case: PagedCase, sliding_window: int | None, soft_cap: float | None = None) -> torch.Tensor:
    out = torch.full(case.query.shape, torch.nan, dtype=case.query.dtype)
    cuda_ops.paged_attention_decode(
        out,
        case.query,
        case.key_cache,
        case.value_cache,
        case.block_tables,
        case.context_lens,
        max_context_len=case.max_context_len,
        scale=case.scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        scales=case.scales,
    )
    return out


def prefill(case: PagedCase, sliding_window: int | None, soft_cap: float | None = None) -> torch.Tensor:
    out = torch.full(case.query.shape, torch.nan, dtype=case.query.dtype)
    cuda_ops.paged_attention_prefill(
        out,
        case.query,
        case.key_cache,
        case.value_cache,
        case.query_start,
        case.context_lens,
        case.block_tables,
        scale=case.scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        scales=case.scales,
    )
    return out


def assert_close(
    actual: torch.Tensor, case: PagedCase, sliding_window: int | None, soft_cap: float | None = None
) -> None:
    error = (actual.double() - attend_densely(case, sliding_window, soft_cap)).abs().max().item()
    assert error <= attention_tolerance(case)


@settings(max_examples=60)
@given(context_lens=contexts, shape=shapes, window=windows, soft_cap=soft_caps)
def test_paged_decode_equals_dense_attention_over_shuffled_pages(
    context_lens: list[int], shape: dict[str, Any], window: int | None, soft_cap: float | None
) -> None:
    case = make_case(context_lens, [1] * len(context_lens), **shape)

    assert_close(decode(case, window, soft_cap), case, window, soft_cap)


@settings(max_examples=60)
@given(parts=chunks, shape=shapes, window=windows, soft_cap=soft_caps)
def test_paged_prefill_equals_dense_attention_when_chunks_continue_a_context(
    parts: list[tuple[int, int]], shape: dict[str, Any], window: int | None, soft_cap: float | None
) -> None:
    case = make_case([old + new for old, new in parts], [new for _, new in parts], **shape)

    assert_close(prefill(case, window, soft_cap), case, window, soft_cap)


@settings(max_examples=20)
@given(parts=chunks, shape=shapes, window=windows, scales=st.sampled_from([(1.0, 1.0), (0.02, 3.0)]))
def test_attention_over_a_float8_cache_equals_dense_attention_over_what_it_stands_for(
    parts: list[tuple[int, int]],
    shape: dict[str, Any],
    window: int | None,
    scales: tuple[float, float],
) -> None:
    """On a CPU that is the meaning, whatever the kernels for other caches."""
    lengths = [old + new for old, new in parts]
    chunked = in_float8(make_case(lengths, [new for _, new in parts], **shape), scales)
    decoding = in_float8(make_case(lengths, [1] * len(parts), **shape), scales)

    assert_close(prefill(chunked, window), chunked, window, None)
    assert_close(decode(decoding, window), decoding, window, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_decode_is_the_same_when_the_batch_takes_several_rounds(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    case = make_case(
        [5, 17, 1, 30, 9], [1] * 5, num_kv_heads=2, group=2, head_dim=16, block_size=4, dtype=dtype, seed=3
    )
    at_once = decode(case, None)

    monkeypatch.setattr(reference, "GATHERED_ELEMENTS", 2 * 32 * 16 * 2)
    in_rounds = decode(case, None)

    assert torch.allclose(at_once, in_rounds, atol=attention_tolerance(case), rtol=0)


def test_paged_prefill_leaves_other_rows_alone_when_offsets_start_later() -> None:
    case = make_case(
        [6, 9], [2, 4], num_kv_heads=1, group=1, head_dim=8, block_size=4, dtype=torch.float32, seed=1
    )
    out = torch.full(case.query.shape, 7.0)

    cuda_ops.paged_attention_prefill(
        out,
        case.query,
        case.key_cache,
        case.value_cache,
        case.query_start[1:],
        case.context_lens[1:],
        case.block_tables[1:],
        scale=case.scale,
    )

    assert (out[:2] == 7.0).all()
    assert torch.equal(out[2:], prefill(case, None)[2:])


def test_paged_attention_refuses_heads_that_do_not_divide() -> None:
    query = torch.zeros(1, 3, 8)
    cache = torch.zeros(1, 2, 4, 8)
    lengths = torch.ones(1, dtype=torch.int32)

    with pytest.raises(OpInputError, match="query heads a multiple of key heads"):
        cuda_ops.paged_attention_decode(
            query, query, cache, cache, lengths.view(1, 1), lengths, max_context_len=1, scale=1.0
        )
