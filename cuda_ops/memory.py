"""Memory for what is large and read again and again: weights and the cache.

With ordinary pages of 4 KB a core that streams weights waits for addresses to be translated: 20 GB/s where
pages of 2 MB give 28, on one Zen 4 core in a virtual machine. Those have to be asked for, and are had only in
runs of 2 MB, so tensors share larger pieces.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

_PAGE_BYTES: Final = 2 << 20
_PIECE_BYTES: Final = 16 * _PAGE_BYTES
_ALIGNMENT: Final = 128
"""Bytes; two lines of a processor's cache."""


class LargePages:
    """Hands out zeros on the CPU.

    A piece of memory is given back when the last tensor in it is gone. Where the system has no large pages to
    give, these are ordinary ones. Nothing is held before it is written to.
    """

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Raises torch.OutOfMemoryError where there is no room, as on a GPU."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.zeros(tuple(shape), dtype=dtype)
        if num_bytes > len(self._piece):
            self._piece = _map_piece(max(num_bytes, _PIECE_BYTES))
        taken = self._piece[:num_bytes]
        self._piece = self._piece[num_bytes + -num_bytes % _ALIGNMENT :]
        return taken.view(dtype).view(tuple(shape))


def _map_piece(num_bytes: int) -> Tensor:
    """Whole large pages, the first one's beginning the piece's."""
    rounded = num_bytes + -num_bytes % _PAGE_BYTES
    try:
        mapped = mmap.mmap(-1, rounded + _PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise torch.OutOfMemoryError(f"{num_bytes} bytes could not be mapped: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    # The tensor keeps the mapping.
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    first = -whole.data_ptr() % _PAGE_BYTES
    return whole[first : first + rounded]
