"""Products with 4-bit and 8-bit weights, emulated and on a GPU, against the codes' own values in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cuda_ops
from cuda_ops.cuda import quantised
from tests.support.emulated_kernels import EmulatedLauncher
from tests.support.quantised_cases import QuantisedCase, make_quantised_case


def product(case: QuantisedCase) -> torch.Tensor:
    return cuda_ops.quantised_linear(case.x, case.weight, case.bias)


def exceeds(actual: torch.Tensor, case: QuantisedCase, *, rounds_weights: bool = False) -> bool:
    error = (actual.double() - case.product()).abs()
    return bool((error > case.tolerance(rounds_weights=rounds_weights)).any() or actual.isnan().any())


@pytest.fixture(autouse=True)
def kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case here is a kernel's: the reference in its place would prove nothing."""

    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("left to the reference")

    monkeypatch.setattr(quantised.quantised, "reference", refuse)


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("shape", "group_size"), [((136, 24), 0), ((160, 264), 32), ((200, 40), 64), ((392, 16), 128)]
)
def test_product_of_few_rows_is_that_of_the_codes_own_values(
    shape: tuple[int, int], group_size: int, bits: int, dtype: torch.dtype
) -> None:
    case = make_quantised_case(3, *shape, bits=bits, group_size=group_size, dtype=dtype, padding=8)

    assert not exceeds(product(case), case)


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize("num_rows", [1, 9, 17, 64, 70])
def test_product_takes_batches_that_fill_tiles_of_rows_and_that_do_not(num_rows: int) -> None:
    case = make_quantised_case(num_rows, 128, 40, bits=4, group_size=64, dtype=torch.bfloat16)

    assert not exceeds(product(case), case)


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_product_knows_symmetric_codes_and_inputs_in_an_order_of_their_own(
    bits: int, scale_dtype: torch.dtype
) -> None:
    case = make_quantised_case(
        2, 128, 24, bits=bits, group_size=32, dtype=torch.bfloat16,
        has_zeros=False, has_order=True, scale_dtype=scale_dtype,
    )  # fmt: skip

    assert not exceeds(product(case), case)


def test_row_gives_the_same_bits_in_any_batch_when_the_inputs_are_in_parts(
    launcher: EmulatedLauncher,
) -> None:
    launcher.num_multiprocessors = 5
    case = make_quantised_case(70, 1088, 24, bits=4, group_size=128, dtype=torch.bfloat16)

    together = product(case)

    assert not exceeds(together, case)
    for row in (0, 69):
        alone = cuda_ops.quantised_linear(case.x[row : row + 1], case.weight, case.bias)
        assert torch.equal(alone[0], together[row])


@pytest.mark.usefixtures("launcher")
def test_product_does_without_a_bias() -> None:
    biased = make_quantised_case(4, 64, 16, bits=8, group_size=0, dtype=torch.bfloat16)
    case = replace(biased, bias=torch.zeros(16))

    assert not exceeds(cuda_ops.quantised_linear(case.x, case.weight), case)


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("num_inputs", "group_size"), [(136, 32), (264, 0), (320, 128)])
def test_product_of_many_rows_widens_the_weight_first(num_inputs: int, group_size: int, bits: int) -> None:
    case = make_quantised_case(
        quantised.MOST_ROWS + 1, num_inputs, 40, bits=bits, group_size=group_size, dtype=torch.bfloat16,
        has_order=True,
    )  # fmt: skip

    assert not exceeds(product(case), case, rounds_weights=True)


@pytest.mark.usefixtures("launcher")
def test_rows_that_are_strided_or_shifted_give_the_same() -> None:
    case = make_quantised_case(5, 72, 16, bits=4, group_size=0, dtype=torch.float16, padding=3)

    strided = cuda_ops.quantised_linear(case.x, case.weight)

    assert torch.equal(strided, cuda_ops.quantised_linear(case.x.contiguous(), case.weight))
    assert cuda_ops.quantised_linear(case.x[:0], case.weight).shape == (0, 16)
