"""Ops that run GPU kernels, emulated, as torch's own checks and its compiler see them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops.cuda.library import OPS
from cuda_ops.registry import NAMESPACE
from tests.support.emulated_kernels import EmulatedLauncher, registered, require_compiler
from tests.support.kernel_calls import EPS, MODELS, attention_calls, float8_calls, quantised_calls, row_calls
from tests.support.op_checks import check_registration

SMALLEST = MODELS[0]


def calls() -> dict[str, tuple[Any, ...]]:
    families = (row_calls, quantised_calls, float8_calls)
    made = [call for family in families for call in family(SMALLEST, 2, torch.bfloat16)]
    return dict([*made, *attention_calls(SMALLEST, torch.bfloat16)])


CHECKED = sorted(set(OPS) & set(calls()))


@pytest.mark.parametrize("name", CHECKED)
def test_op_with_a_gpus_kernel_passes_torchs_checks_of_its_registration(name: str) -> None:
    require_compiler()
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    with registered(EmulatedLauncher()):
        check_registration(overload, calls()[name])


def layer(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    normed = cuda_ops.add_rms_norm(x * 2, residual, weight, EPS)
    return cuda_ops.silu_and_mul(torch.cat((normed, residual), dim=-1)) + 1


def test_compiled_graph_calls_the_gpus_kernels_without_a_break() -> None:
    require_compiler()
    x, residual = torch.randn(2, 768).bfloat16(), torch.randn(2, 768).bfloat16()
    weight = torch.randn(768).bfloat16()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    with registered(EmulatedLauncher()):
        expected_residual, actual_residual = residual.clone(), residual.clone()
        expected = layer(x, expected_residual, weight)
        actual = compiled(x, actual_residual, weight)

    assert torch.equal(actual, expected)
    assert torch.equal(actual_residual, expected_residual)
