"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

# Of glibc's malloc.h.
_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_SET_BY_OPERATOR: Final = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
_WHILE_LOADING: Final = {_MMAP_THRESHOLD: 128 << 10}
# What glibc's own adjustment would end at: a step's buffers come from the heap and stay in it.
_AFTERWARDS: Final = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}


@contextmanager
def freed_memory_goes_back() -> Iterator[None]:
    """Within, a large block of memory that is freed leaves the process at once; for its whole process.

    Else glibc keeps blocks of up to 32 MiB in its heap once one such was freed, so that beside the weights
    all that was needed to lay them out stays: five times an int8 model's size. Does nothing under another C
    library, or where the environment says how malloc is to work.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _SET_BY_OPERATOR):
        yield
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    _apply(mallopt, _WHILE_LOADING)
    try:
        yield
    finally:
        _apply(mallopt, _AFTERWARDS)


def _apply(mallopt: object, options: dict[int, int]) -> None:
    if callable(mallopt):
        for option, value in options.items():
            mallopt(option, value)
