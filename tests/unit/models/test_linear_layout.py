from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cuda_ops.dense import PackedWeight
from cuda_ops.quantised import QuantisedWeight
from engine.checkpoint import WeightLayout
from engine.layers.linear import Linear

torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (33, 7), (768, 96)])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 65])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_layer_equals_the_plain_product_in_every_layout(
    num_rows: int, shape: tuple[int, int], dtype: torch.dtype, has_bias: bool, layout: WeightLayout
) -> None:
    torch.manual_seed(0)
    num_inputs, num_outputs = shape
    weight = torch.randn(num_outputs, num_inputs).to(dtype)
    bias = torch.randn(num_outputs).to(dtype) if has_bias else None
    x = torch.randn(num_rows, num_inputs).to(dtype)

    with torch.inference_mode():
        product = Linear.lay_out(weight, bias, layout)(x)

    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    # One rounding of the result; sums in float32, at worst one rounding a term.
    size = (x.double().abs() @ weight.double().abs().T).max() + 4 if num_rows else torch.zeros(())
    roundoff = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}[dtype]
    bound = roundoff * (exact.abs().amax() if num_rows else 0) + size * num_inputs * 2.0**-24
    assert product.dtype is dtype
    assert product.shape == exact.shape
    assert num_rows == 0 or (product.double() - exact).abs().max() <= bound


def test_dense_layer_is_reordered_where_onednn_is_there_and_takes_the_dtype() -> None:
    reordered = Linear.lay_out(torch.randn(8, 8), None, "dense").weight
    kept = Linear.lay_out(torch.randn(8, 8, dtype=torch.float64), None, "dense").weight

    assert isinstance(reordered, torch.Tensor)
    assert reordered.is_mkldnn == torch.backends.mkldnn.is_available()
    assert isinstance(kept, torch.Tensor)
    assert not kept.is_mkldnn


def test_int8_layer_holds_a_byte_an_element() -> None:
    weight = Linear.lay_out(torch.randn(64, 32), None, "int8").weight

    assert isinstance(weight, PackedWeight)
    assert weight.panels.nbytes == 64 * 32


def test_w8a16_layer_holds_a_byte_an_element_and_gives_what_the_layer_asks_for() -> None:
    layer = Linear.lay_out(torch.randn(64, 128), torch.randn(64), "w8a16")
    x = torch.randn(3, 128).bfloat16()

    assert isinstance(layer.weight, QuantisedWeight)
    assert layer.weight.nbytes == 64 * 128 + 4 * 64
    assert torch.equal(layer(x, has_relu=True), layer(x).relu())
    assert layer(x, gives_float32=True).dtype is torch.float32
