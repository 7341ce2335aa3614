"""Every test of the ops holds for every implementation of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.kernels import NATIVE_LEVELS, REFERENCE, taken_kernels


# Module scope, because Hypothesis runs one test function over many examples.
@pytest.fixture(scope="module", autouse=True, params=[REFERENCE, *NATIVE_LEVELS])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from taken_kernels(request.param)
