"""The kernel that turns heads and stores them, emulated and on a GPU, against the same in float64."""

from __future__ import annotations

import pytest
import torch

from tests.support.dense_oracle import ROUNDOFF
from tests.support.rotary_write_case import bound_of, make_case

pytestmark = pytest.mark.usefixtures("launcher")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_norms", [False, True], ids=["plain", "norms"])
# Whole runs, a part that does not turn, single elements, several rounds of a warp, nothing that turns.
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "gap"),
    [(64, 64, 8), (80, 32, 8), (7, 6, 3), (128, 128, 1), (256, 256, 0), (24, 0, 8)],
)
def test_rotary_write_kv_turns_queries_in_place_and_stores_keys_and_values(
    head_dim: int, rotary_dim: int, gap: int, has_norms: bool, dtype: torch.dtype
) -> None:
    case = make_case(head_dim, rotary_dim, dtype, has_norms=has_norms, gap=gap)
    case.slots[2] = case.slots[4] = -1
    query, key_cache, value_cache = case.expected()
    key, value = case.key.clone(), case.value.clone()

    case.run()

    assert (case.query.double() - query).abs().max() <= bound_of(query, ROUNDOFF[dtype])
    assert (case.key_cache.double() - key_cache).abs().max() <= bound_of(key_cache, ROUNDOFF[dtype])
    assert torch.equal(case.value_cache.double(), value_cache)
    assert torch.equal(case.key, key)
    assert torch.equal(case.value, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (7, 6)])
def test_rotary_write_kv_rounds_once_into_a_cache_of_float8(
    head_dim: int, rotary_dim: int, dtype: torch.dtype
) -> None:
    case = make_case(head_dim, rotary_dim, dtype, has_norms=True).in_float8((0.05, 2.0))
    query, *caches = case.expected()

    case.run()

    assert (case.query.double() - query).abs().max() <= bound_of(query, ROUNDOFF[dtype])
    for cache, exact, scale in zip((case.key_cache, case.value_cache), caches, case.scales, strict=True):
        stored = cache.double() * scale
        # Half a place: a sixteenth of the number, or of the smallest normal one, and sums in float32 before.
        half = (stored.abs().clamp(min=2.0**-6 * scale)) / 16
        assert ((stored - exact).abs() <= half + bound_of(exact, 0.0)).all()
