"""Prefill by a warpgroup's products: the cases of `test_gpu_attention.py`, as an sm_90a device runs them."""

from __future__ import annotations

import pytest
import torch

from cuda_ops.cuda.launcher import Argument, LaunchShape, Variant
from tests.support.dense_oracle import attention_tolerance
from tests.support.emulated_kernels import EmulatedLauncher
from tests.unit.cuda_ops.cuda.test_gpu_attention import error_of, prefill, prefill_case


@pytest.fixture(autouse=True)
def hopper(launcher: EmulatedLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator takes itself for one; a GPU is what it is, and runs its own kernel."""
    if not isinstance(launcher, EmulatedLauncher):
        return
    launcher.arch = "sm_90a"
    launch = EmulatedLauncher.launch

    def only_ours(
        self: EmulatedLauncher, variant: Variant, shape: LaunchShape, arguments: tuple[Argument, ...]
    ) -> None:
        assert variant.source == "attention_prefill_hopper"
        launch(self, variant, shape, arguments)

    monkeypatch.setattr(EmulatedLauncher, "launch", only_ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 2), (128, 1)])
def test_prefill_equals_dense_attention_over_chunks_that_continue_a_context(
    head_dim: int, group: int, dtype: torch.dtype
) -> None:
    case = prefill_case([(0, 1), (70, 37), (0, 66)], group=group, head_dim=head_dim, dtype=dtype)

    assert error_of(prefill(case), case) <= attention_tolerance(case)


@pytest.mark.parametrize("window", [None, 1, 33, 70, 5000])
def test_prefill_sees_its_window_when_queries_fill_several_tiles(window: int | None) -> None:
    case = prefill_case([(40, 150), (0, 128), (3, 2)], group=1, head_dim=64)

    assert error_of(prefill(case, window), case, window) <= attention_tolerance(case)


def test_prefill_finds_its_tile_among_more_sequences_than_a_warp_has_lanes() -> None:
    case = prefill_case([(index % 3, 1 + index % 5) for index in range(35)], group=1, head_dim=64)

    assert error_of(prefill(case), case) <= attention_tolerance(case)


@pytest.mark.parametrize("soft_cap", [0.7, 5.0])
def test_prefill_bends_scores_towards_the_soft_cap(soft_cap: float) -> None:
    case = prefill_case([(20, 30)], group=1, head_dim=128)

    assert error_of(prefill(case, soft_cap=soft_cap), case, soft_cap=soft_cap) <= attention_tolerance(case)


def test_prefill_takes_queries_that_are_not_aligned_and_writes_only_its_own_rows() -> None:
    case = prefill_case([(5, 20)], group=1, head_dim=64)
    shifted = torch.empty(len(case.query), 1, 65, dtype=case.query.dtype)[:, :, 1:]
    shifted.copy_(case.query)
    case = type(case)(shifted, *(getattr(case, name) for name in case.__slots__[1:]))
    out = torch.full((len(shifted) + 2, 1, 64), 7.0, dtype=shifted.dtype)

    prefill(case, out=out[1:-1])

    assert error_of(out[1:-1], case) <= attention_tolerance(case)
    assert (out[0] == 7.0).all()
    assert (out[-1] == 7.0).all()
