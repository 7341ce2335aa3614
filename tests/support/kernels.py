"""Tests over all implementations of the ops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cuda_ops.errors import KernelsUnavailableError
from cuda_ops.native import native_levels, use_kernels

REFERENCE = "reference"
NATIVE_LEVELS = ("x86-64-v4", "x86-64-v3", "baseline")


def taken_kernels(name: str) -> Iterator[str]:
    """Let the ops run the reference or one native level; skip where this machine has it not."""
    if name != REFERENCE:
        try:
            if name not in native_levels():
                pytest.skip(f"this machine cannot run {name}")
            use_kernels("native", name)
        except KernelsUnavailableError as error:
            pytest.skip(str(error))
    yield name
    use_kernels("reference")
