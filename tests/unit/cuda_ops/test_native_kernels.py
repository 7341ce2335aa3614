"""What only native kernels promise: being chosen, refusing bad tables, threads, long and wide contexts."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

import cuda_ops
from cuda_ops import native
from cuda_ops.cpu.build import library_path
from cuda_ops.errors import KernelsUnavailableError
from cuda_ops.native import KernelsInUse, use_kernels
from tests.support.dense_oracle import PagedCase, attend_densely, attention_tolerance, make_case
from tests.support.kernels import NATIVE_LEVELS, taken_kernels

# What there are kernels of on GPUs alone.
ON_GPUS = {
    "sample_tokens",
    "float8_linear",
    "quantised_linear",
    *(name for name in cuda_ops.__all__ if name.endswith("norm_quantised")),
}
OPS = sorted(set(cuda_ops.__all__) - ON_GPUS)


@pytest.fixture(scope="module", autouse=True, params=NATIVE_LEVELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from taken_kernels(request.param)


@pytest.fixture(autouse=True)
def _restored(kernels: str) -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
    use_kernels("native", kernels)


def has_native(op: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"throughline::{op}", "CPU"))


def decode(case: PagedCase, window: int | None = None) -> torch.Tensor:
    out = torch.full(case.query.shape, torch.nan, dtype=case.query.dtype)
    cuda_ops.paged_attention_decode(
        out, case.query, case.key_cache, case.value_cache, case.block_tables, case.context_lens,
        max_context_len=case.max_context_len, scale=case.scale, sliding_window=window,
    )  # fmt: skip
    return out


def prefill(case: PagedCase, window: int | None = None) -> torch.Tensor:
    out = torch.full(case.query.shape, torch.nan, dtype=case.query.dtype)
    cuda_ops.paged_attention_prefill(
        out, case.query, case.key_cache, case.value_cache, case.query_start, case.context_lens,
        case.block_tables, scale=case.scale, sliding_window=window,
    )  # fmt: skip
    return out


def wide_case(head_dim: int, dtype: torch.dtype, *, query_lens: list[int]) -> PagedCase:
    return make_case(
        [300, 129, 1, 128], query_lens,
        num_kv_heads=2, group=3, head_dim=head_dim, block_size=16, dtype=dtype, seed=head_dim,
    )  # fmt: skip


def test_choosing_kernels_registers_every_op_and_releasing_gives_them_back(kernels: str) -> None:
    assert use_kernels("native", kernels) == KernelsInUse(kernels)
    assert all(has_native(op) for op in OPS)

    assert use_kernels("reference").level is None
    assert not any(has_native(op) for op in OPS)

    assert use_kernels("auto").level == native.native_levels()[0]


def test_an_unknown_level_is_refused_by_name_and_auto_takes_the_reference() -> None:
    with pytest.raises(KernelsUnavailableError, match="x86-64-v9"):
        use_kernels("native", "x86-64-v9")

    assert use_kernels("auto", "x86-64-v9").level is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("window", [None, 70])
def test_attention_equals_dense_attention_when_contexts_outgrow_a_chunk(
    head_dim: int, dtype: torch.dtype, window: int | None
) -> None:
    case = wide_case(head_dim, dtype, query_lens=[1, 1, 1, 1])
    error = (decode(case, window).double() - attend_densely(case, window)).abs().max().item()
    assert error <= attention_tolerance(case)

    case = wide_case(head_dim, dtype, query_lens=[40, 129, 1, 3])
    error = (prefill(case, window).double() - attend_densely(case, window)).abs().max().item()
    assert error <= attention_tolerance(case)


@pytest.mark.parametrize("attend", [decode, prefill])
def test_attention_of_a_sequence_is_the_same_alone_and_in_a_batch_on_two_threads(
    attend: type[object],
) -> None:
    case = wide_case(64, torch.bfloat16, query_lens=[1, 1, 1, 1])
    torch.set_num_threads(2)
    together = attend(case)
    torch.set_num_threads(1)

    first = PagedCase(
        case.query[:1], case.key_cache, case.value_cache, case.query_start[:2], case.context_lens[:1],
        case.block_tables[:1], case.query_lens[:1],
    )  # fmt: skip
    assert torch.equal(attend(first), together[:1])


@pytest.mark.parametrize("size", [768, 50_000])
def test_norms_are_the_same_on_two_threads(size: int) -> None:
    x, weight = torch.randn(64, size), torch.randn(size)
    alone = cuda_ops.rms_norm(x, weight, 1e-6)

    torch.set_num_threads(2)
    assert torch.equal(cuda_ops.rms_norm(x, weight, 1e-6), alone)


def test_rms_norm_takes_heads_that_are_slices_of_a_projection() -> None:
    heads = torch.randn(7, 6, 20)[:, 1:4, 2:18]
    weight = torch.randn(16)

    normed = cuda_ops.rms_norm(heads, weight, 1e-6)

    assert torch.equal(normed, cuda_ops.rms_norm(heads.contiguous(), weight, 1e-6))
    assert normed.is_contiguous()


def test_a_nan_in_a_visible_key_reaches_the_result_and_none_is_invented() -> None:
    case = wide_case(64, torch.float32, query_lens=[1, 1, 1, 1])
    block = int(case.block_tables[0, 0])
    case.key_cache[block, 0, 3, 5] = torch.nan

    result = decode(case)

    assert result[0, :3].isnan().all()
    assert not result[1:].isnan().any()
    assert not result[0, 3:].isnan().any()


def test_tables_that_name_no_block_are_refused_before_memory_is_read() -> None:
    case = wide_case(64, torch.float32, query_lens=[1, 1, 1, 1])
    case.block_tables[0, 4] = case.key_cache.shape[0]

    with pytest.raises(RuntimeError, match="block_tables names a block that is not there"):
        decode(case)
    with pytest.raises(RuntimeError, match="block_tables names a block that is not there"):
        prefill(case)


def test_contexts_longer_than_their_table_are_refused() -> None:
    case = wide_case(64, torch.float32, query_lens=[1, 1, 1, 1])
    case.context_lens[0] = case.block_tables.shape[1] * 16 + 1

    with pytest.raises(RuntimeError, match="a context length does not fit block_tables"):
        decode(case)


@pytest.mark.parametrize("slot", [-1, 8])
def test_write_kv_refuses_a_slot_outside_the_cache(slot: int) -> None:
    cache, key = torch.zeros(2, 1, 4, 8), torch.ones(1, 1, 8)

    with pytest.raises(RuntimeError, match="slot_mapping names a slot that is not there"):
        cuda_ops.write_kv(key, key, cache, cache.clone(), torch.tensor([slot]))
    assert not cache.any()


def test_a_dtype_without_a_kernel_is_refused() -> None:
    with pytest.raises(RuntimeError, match="float32 or bfloat16 is needed"):
        cuda_ops.silu_and_mul(torch.zeros(2, 4, dtype=torch.float64))


def test_library_registers_nothing_by_being_loaded(kernels: str) -> None:
    use_kernels("reference")

    torch.ops.load_library(library_path())
    ctypes.CDLL(str(library_path()))

    assert not any(has_native(op) for op in OPS)
