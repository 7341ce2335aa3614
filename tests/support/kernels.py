"""Tests over all implementations of the ops."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from cuda_ops.cpu.build import BuildError, Toolchain
from cuda_ops.errors import KernelsUnavailableError
from cuda_ops.native import native_levels, use_kernels

REFERENCE = "reference"
NATIVE_LEVELS = ("x86-64-v4-bf16-vnni", "x86-64-v4", "x86-64-v3", "baseline")


def built_levels() -> tuple[str, ...]:
    """The native levels of this machine; without a compiler there may be none, which skips the test."""
    try:
        return native_levels()
    except KernelsUnavailableError as error:
        try:
            Toolchain.find(os.environ)
        except BuildError as no_compiler:
            pytest.skip(str(no_compiler))
        pytest.fail(f"a compiler is there, and yet: {error}")


def taken_kernels(name: str) -> Iterator[str]:
    """Let the ops run the reference or one native level; skip where this machine has it not."""
    use_kernels("reference")  # whatever the tests before have left
    if name != REFERENCE:
        if name not in built_levels():
            pytest.skip(f"this machine cannot run {name}")
        use_kernels("native", name)
    yield name
    use_kernels("reference")
