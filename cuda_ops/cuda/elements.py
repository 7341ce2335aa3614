"""What kernels are compiled for: a tensor's type, and how much of it a thread moves at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

ELEMENTS: Final[Mapping[torch.dtype, str]] = {
    torch.float32: "Float32",
    torch.bfloat16: "BFloat16",
    torch.float16: "Float16",
}
"""Structs of `element.cuh`."""

OUTPUTS: Final[Mapping[torch.dtype, str]] = {
    **ELEMENTS,
    torch.float8_e4m3fn: "Float8",
    torch.int8: "Int8",
}
"""What may come out: those, and structs of `quantised.cuh`."""

_RUN_BYTES: Final = 16


def is_served(*tensors: Tensor | None) -> bool:
    """Whether all are of one dtype that kernels know, with neighbours along the last axis side by side."""
    present = [tensor for tensor in tensors if tensor is not None]
    dtype = present[0].dtype
    return dtype in ELEMENTS and all(tensor.dtype == dtype and tensor.stride(-1) == 1 for tensor in present)


def is_cache_served(dtype: torch.dtype, *caches: Tensor) -> bool:
    """Whether heads of `dtype` can go into these caches: of that dtype, or of float8."""
    return all(cache.dtype in (dtype, torch.float8_e4m3fn) for cache in caches) and (
        caches[0].dtype == caches[-1].dtype
    )


def run_length(tensors: tuple[Tensor, ...], *lengths: int) -> int:
    """Return how many elements one load may move: 16 bytes' worth where all is so aligned, or one.

    Args:
        tensors: of one dtype.
        lengths: extents and strides, in elements, that runs must not straddle.
    """
    count = _RUN_BYTES // tensors[0].element_size()
    aligned = all(tensor.data_ptr() % _RUN_BYTES == 0 for tensor in tensors)
    return count if aligned and all(length % count == 0 for length in lengths) else 1
