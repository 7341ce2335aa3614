"""Large pages: zeros that no one else holds, and that last as long as someone does."""

from __future__ import annotations

import gc

import pytest
import torch

from cuda_ops.memory import LargePages

# Nothing, one element, an odd number of bytes, more than a piece, several that share one.
SHAPES = [(0, 3), (1,), (3, 5, 7), (40 << 20,), (1 << 20,), (1 << 20, 3)]


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Nothing here runs an op."""


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_large_pages_give_zeros_that_do_not_overlap_and_outlive_their_source(dtype: torch.dtype) -> None:
    pages = LargePages()
    tensors = [pages.zeros(shape, dtype) for shape in SHAPES]
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in tensors] == [(shape, dtype) for shape in SHAPES]
    assert not any(tensor[:1000].any() for tensor in tensors)

    del pages
    gc.collect()
    for number, tensor in enumerate(tensors):
        tensor[:1000] = number
        tensor[-1000:] = number

    assert all((tensor[:1000] == number).all() for number, tensor in enumerate(tensors))
    assert all((tensor[-1000:] == number).all() for number, tensor in enumerate(tensors))


def test_large_pages_begin_where_a_vector_can_be_loaded_whole() -> None:
    pages = LargePages()

    assert all(pages.zeros((3, 1), torch.float32).data_ptr() % 64 == 0 for _ in range(5))


@pytest.mark.parametrize("num_bytes", [1 << 60, 1 << 70])
def test_large_pages_say_that_memory_has_run_out(num_bytes: int) -> None:
    with pytest.raises(torch.OutOfMemoryError, match=f"^{num_bytes} bytes could not be mapped"):
        LargePages().zeros((num_bytes,), torch.int8)
