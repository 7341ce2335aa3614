from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.layers.linear import Linear

torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (33, 7), (768, 96)])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 65])
@pytest.mark.parametrize("has_bias", [True, False])
def test_packed_layer_equals_the_plain_product(
    num_rows: int, shape: tuple[int, int], dtype: torch.dtype, has_bias: bool
) -> None:
    torch.manual_seed(0)
    num_inputs, num_outputs = shape
    weight = torch.randn(num_outputs, num_inputs).to(dtype)
    bias = torch.randn(num_outputs).to(dtype) if has_bias else None
    x = torch.randn(num_rows, num_inputs).to(dtype)

    with torch.inference_mode():
        product = Linear.pack(weight, bias)(x)

    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    # One rounding of the result; sums in float32, at worst one rounding a term.
    size = (x.double().abs() @ weight.double().abs().T).max() + 4 if num_rows else torch.zeros(())
    roundoff = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}[dtype]
    bound = roundoff * (exact.abs().amax() if num_rows else 0) + size * num_inputs * 2.0**-24
    assert product.dtype is dtype
    assert product.shape == exact.shape
    assert num_rows == 0 or (product.double() - exact).abs().max() <= bound


def test_layer_is_packed_where_onednn_is_there() -> None:
    assert Linear.pack(torch.randn(8, 8)).is_packed == torch.backends.mkldnn.is_available()
    assert not Linear.pack(torch.randn(8, 8, dtype=torch.float64)).is_packed
