"""Ops on CUDA tensors: they reach our kernels, on the right stream, and can be captured."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import cuda_ops
from cuda_ops.native import use_cuda_kernels
from engine.batch_invariant import NUM_ROWS
from tests.support.dense_oracle import attend_densely, attention_tolerance, make_case

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    assert use_cuda_kernels("native").level is not None
    yield
    use_cuda_kernels("reference")


def test_decode_in_a_replayed_graph_follows_lengths_that_changed() -> None:
    case = make_case(
        [700, 33, 1],
        [1] * 3,
        num_kv_heads=2,
        group=4,
        head_dim=128,
        block_size=16,
        dtype=torch.bfloat16,
        seed=0,
    )
    query, keys, values, tables = (
        part.cuda() for part in (case.query, case.key_cache, case.value_cache, case.block_tables)
    )
    lengths, out = torch.ones_like(case.context_lens).cuda(), torch.empty_like(query)

    def step() -> None:
        cuda_ops.paged_attention_decode(
            out, query, keys, values, tables, lengths, max_context_len=2048, scale=case.scale
        )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    lengths.copy_(case.context_lens)
    out.fill_(torch.nan)
    graph.replay()

    error = (out.cpu().double() - attend_densely(case, None)).abs().max().item()
    assert error <= attention_tolerance(case)


@pytest.mark.parametrize("sizes", [(768, 3072), (4096, 14336), (4096, 128256)])
def test_product_of_a_tile_gives_a_row_the_same_bits_in_any_place_and_company(sizes: tuple[int, int]) -> None:
    """What `is_batch_invariant` takes for granted of cuBLAS."""
    num_inputs, num_outputs = sizes
    weight = torch.randn(num_outputs, num_inputs, device="cuda", dtype=torch.bfloat16)
    tile = torch.randn(NUM_ROWS, num_inputs, device="cuda", dtype=torch.bfloat16)
    expected = torch.nn.functional.linear(tile, weight)[0]

    for row in range(NUM_ROWS):
        other = torch.randn_like(tile)
        other[row] = tile[0]
        assert torch.equal(torch.nn.functional.linear(other, weight)[row], expected)


def test_kernels_run_on_the_stream_that_is_current() -> None:
    x = torch.randn(4096, 8192, device="cuda", dtype=torch.bfloat16)
    expected = cuda_ops.silu_and_mul(x)
    torch.cuda.synchronize()
    side, later = torch.cuda.Stream(), torch.empty_like(x)
    with torch.cuda.stream(side):
        # Only a launch on the same stream waits for what is written first.
        torch.cuda._sleep(50_000_000)
        later.copy_(x)
        actual = cuda_ops.silu_and_mul(later)
    side.synchronize()

    assert torch.equal(actual, expected)
