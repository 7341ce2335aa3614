"""Ops that run GPU kernels, emulated, as torch's own checks and its compiler see them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops.cuda.library import OPS
from cuda_ops.quantised import quantise_to_int8
from cuda_ops.registry import NAMESPACE
from tests.support.emulated_kernels import EmulatedLauncher, registered, require_compiler
from tests.support.kernel_calls import (
    EPS,
    MODELS,
    attention_calls,
    coded_calls,
    float8_calls,
    float8_linear_calls,
    quantised_calls,
    row_calls,
)  # fmt: skip
from tests.support.op_checks import check_registration

SMALLEST = MODELS[0]


def calls() -> dict[str, tuple[Any, ...]]:
    families = (row_calls, quantised_calls, float8_calls)
    made = [call for family in families for call in family(SMALLEST, 2, torch.bfloat16)]
    made += [*attention_calls(SMALLEST, torch.bfloat16), *coded_calls(torch.bfloat16), *float8_linear_calls()]
    return dict(made)


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


CODED = quantise_to_int8(torch.randn(40, 128))


def products(x: Tensor) -> Tensor:
    return cuda_ops.quantised_linear(x * 2, CODED) + 1


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


def test_compiled_graph_calls_the_kernels_of_quantised_products_without_a_break() -> None:
    require_compiler()
    x = torch.randn(3, 128).bfloat16()
    compiled = torch.compile(products, fullgraph=True, backend="aot_eager")

    with registered(EmulatedLauncher()):
        assert torch.equal(compiled(x), products(x))
