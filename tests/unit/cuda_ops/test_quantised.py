"""Weights of 4 and 8 bits: their layout, and products in plain torch, against the codes' own values."""

from __future__ import annotations

import pytest
import torch

import cuda_ops
from cuda_ops.errors import OpInputError
from cuda_ops.quantised import codes_of, dequantise, lay_out_codes, quantise_to_int8
from tests.support.dense_oracle import ROUNDOFF
from tests.support.quantised_cases import make_quantised_case

torch.set_num_threads(1)

SHAPES = [(1, 1), (130, 50), (64, 16), (70, 33), (256, 2100)]


@pytest.mark.parametrize("bits", [4, 8])
def test_lane_holds_its_share_of_the_first_factor_word_by_word(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (35, 130), dtype=torch.uint8)
    padded = torch.nn.functional.pad(codes, (0, 62, 0, 13)).tolist()

    words = lay_out_codes(codes, torch.ones(1, 35), bits=bits).codes

    assert words.shape == (3, 3, bits // 4, 32, 4)
    for chunk, tile, lane, step in ((0, 0, 0, 0), (2, 2, 31, 3), (1, 0, 13, 2), (0, 2, 6, 1)):
        g, t = tile * 16 + lane // 4, chunk * 64 + step * 16 + lane % 4 * 2
        if bits == 4:
            places = [
                (g, t),
                (g + 8, t),
                (g, t + 8),
                (g + 8, t + 8),
                (g, t + 1),
                (g + 8, t + 1),
                (g, t + 9),
                (g + 8, t + 9),
            ]
            word = int(words[chunk, tile, 0, lane, step])
            assert [word >> 4 * i & 15 for i in range(8)] == [padded[n][k] for n, k in places]
        else:
            for half in range(2):
                k = t + 8 * half
                word = int(words[chunk, tile, step // 2, lane, step % 2 * 2 + half])
                expected = [padded[g][k], padded[g + 8][k], padded[g][k + 1], padded[g + 8][k + 1]]
                assert [word >> 8 * i & 255 for i in range(4)] == expected


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_come_back_from_their_layout(shape: tuple[int, int], bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (shape[1], shape[0]), dtype=torch.uint8)

    words = lay_out_codes(codes, torch.ones(1, shape[1]), bits=bits).codes

    assert torch.equal(codes_of(words, bits)[: shape[1], : shape[0]], codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("num_inputs", "group_size"), [(1, 0), (7, 0), (70, 32), (128, 64), (130, 128)])
@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_product_is_that_of_the_codes_own_values(
    num_rows: int, num_inputs: int, group_size: int, bits: int, dtype: torch.dtype
) -> None:
    case = make_quantised_case(
        num_rows, num_inputs, 33, bits=bits, group_size=group_size, dtype=dtype, has_order=True, padding=3
    )

    product = cuda_ops.quantised_linear(case.x, case.weight, case.bias)

    assert product.dtype is dtype
    assert product.is_contiguous()
    assert ((product.double() - case.product()).abs() <= case.tolerance()).all()
    assert (dequantise(case.weight).double() - case.values).abs().max() <= case.values.abs().max() * 2.0**-23


def test_int8_is_half_a_step_from_the_weight_at_most() -> None:
    weight = torch.randn(40, 96) * torch.rand(40, 1)
    weight[3] = 0.0

    rounded = dequantise(quantise_to_int8(weight))

    steps = weight.abs().amax(1, keepdim=True) / 127
    assert ((rounded - weight).abs() <= steps * 0.5 * (1 + 2**-12)).all()
    assert not rounded[3].any()
    # The largest magnitude of a row is met.
    assert torch.allclose(rounded.abs().amax(1), weight.abs().amax(1), rtol=2 * ROUNDOFF[torch.float32])


def test_what_does_not_fit_together_is_refused_by_its_shape() -> None:
    codes = torch.zeros(4, 64, dtype=torch.uint8)
    weight = lay_out_codes(codes, torch.ones(2, 4), bits=4, group_size=32)

    with pytest.raises(OpInputError, match=r"x is \[2, 63\], the weight \[4, 64\]"):
        cuda_ops.quantised_linear(torch.zeros(2, 63), weight)
    with pytest.raises(
        OpInputError, match=r"scales is \[1, 4\], codes \[4, 64\] in groups of 32: must be \[2, 4\]"
    ):
        lay_out_codes(codes, torch.ones(1, 4), bits=4, group_size=32)
    with pytest.raises(OpInputError, match="bits is 3: must be one of 4, 8"):
        lay_out_codes(codes, torch.ones(1, 4), bits=3)
