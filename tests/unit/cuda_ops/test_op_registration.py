"""Schemas, fakes and mutation marks of every op, as torch itself checks them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cuda_ops
from cuda_ops.dense import pack_weight, quantise_weight
from cuda_ops.float8 import round_to_float8
from cuda_ops.quantised import lay_out_codes
from cuda_ops.registry import NAMESPACE
from tests.support.op_checks import check_registration

torch.set_num_threads(1)

BLOCKS = (3, 2, 4, 8)


def make_arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    torch.manual_seed(0)
    rows, residual, size = torch.randn(5, 16, dtype=dtype), torch.randn(5, 16, dtype=dtype), 16
    weight, bias = torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype)
    query, key = torch.randn(5, 4, 8, dtype=dtype), torch.randn(5, 2, 8, dtype=dtype)
    caches = torch.randn(BLOCKS, dtype=dtype), torch.randn(BLOCKS, dtype=dtype)
    tables = torch.tensor([[2, 0], [1, 0]], dtype=torch.int32)
    lengths = torch.tensor([6, 3], dtype=torch.int32)
    starts = torch.tensor([0, 3, 5], dtype=torch.int32)
    float8 = [cache.to(torch.float8_e4m3fn) for cache in caches]
    decoding, out = query[:2], torch.empty_like(query)
    dense, int8 = pack_weight(torch.randn(35, size, dtype=dtype)), quantise_weight(torch.randn(35, size))
    narrow = round_to_float8(torch.randn(35, size))
    codes = torch.randint(0, 16, (35, size), dtype=torch.uint8)
    coded = lay_out_codes(codes, torch.rand(1, 35), codes[:, :1].T, bits=4)
    coded_parts, order = (coded.codes, coded.scales, coded.zeros), torch.randperm(size)
    return {
        "quantised_linear": (rows, *coded_parts, order, bias.new_zeros(35), 4, 0, 35),
        "float8_linear": (rows, narrow.values.view(torch.uint8), narrow.scales, bias.new_zeros(35)),
        "linear": (rows, dense.panels, None, None, bias.new_zeros(35), 35, True, False),
        "linear, int8": (rows, int8.panels, int8.scales, int8.sums, None, 35, False, True),
        "panel_rows": (dense.panels, None, torch.tensor([34, 0]), 35, size, dtype is torch.float32),
        "panel_rows, int8": (int8.panels, int8.scales, torch.tensor([34, 0]), 35, size, False),
        "add_rows": (rows, residual, torch.tensor([3, 0, 3, 1, 2]), 1),
        "add": (rows, residual),
        "rms_norm": (rows, weight, 1e-5),
        "add_rms_norm": (rows, residual, weight, 1e-5),
        "layer_norm": (rows, weight, bias, 1e-5),
        "add_layer_norm": (rows, residual, None, None, 1e-5),
        "rms_norm_quantised": (rows, weight, 1e-5, torch.int8),
        "add_rms_norm_quantised": (rows, residual, weight, 1e-5, torch.float8_e4m3fn),
        "layer_norm_quantised": (rows, weight, bias, 1e-5, torch.float8_e4m3fn),
        "add_layer_norm_quantised": (rows, residual, None, None, 1e-5, torch.int8),
        "rotary_embedding": (query.clone(), key.clone(), torch.randn(5, 8)),
        "rotary_write_kv": (
            query.clone(),
            key,
            key.clone(),
            torch.randn(5, 6),
            weight[:8],
            weight[8:],
            1e-5,
            *caches,
            torch.tensor([11, 0, 3, 4, 9]),
        ),
        "silu_and_mul": (rows,),
        "gelu_and_mul": (rows,),
        "argmax": (rows,),
        "sample_tokens": (
            rows,
            torch.arange(20).view(5, 4),
            torch.rand(5, 6),
            torch.arange(6, dtype=torch.int32),
            torch.ones(5, 3, dtype=torch.int32),
            torch.randn(5),
            torch.ones(1, 1, dtype=torch.int32),
            torch.tensor([0, -1, 0, -1, 0], dtype=torch.int32),
            True,
            True,
            3,
        ),
        "softmax_at": (rows, torch.rand(5) + 0.1),
        "write_kv": (key, key.clone(), *caches, torch.tensor([11, 0, 3, 4, 9])),
        "paged_attention_decode": (out[:2], decoding, *caches, tables, lengths, 6, 0.3, 4, None, 16),
        "paged_attention_prefill": (out, query, *caches, starts, lengths, tables, 0.3, None, 5.0),
        "write_kv_float8": (key, key.clone(), *float8, torch.tensor([11, 0, 3, 4, 9]), 0.5, 2.0),
        "rotary_write_kv_float8": (
            query.clone(),
            key,
            key.clone(),
            torch.randn(5, 6),
            None,
            weight[8:],
            1e-5,
            *float8,
            torch.tensor([11, 0, 3, 4, 9]),
            0.5,
            2.0,
        ),
        "paged_attention_decode_float8": (
            out[:2],
            decoding,
            *float8,
            tables,
            lengths,
            6,
            0.3,
            4,
            None,
            16,
            0.5,
            2.0,
        ),
        "paged_attention_prefill_float8": (
            out,
            query,
            *float8,
            starts,
            lengths,
            tables,
            0.3,
            None,
            5.0,
            0.5,
            2.0,
        ),
    }


OPS = sorted(make_arguments(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_op_passes_torchs_checks_of_its_registration(name: str, dtype: torch.dtype) -> None:
    overload = getattr(getattr(torch.ops, NAMESPACE), name.partition(",")[0]).default

    check_registration(overload, make_arguments(dtype)[name])


def test_every_exported_op_is_checked() -> None:
    # A cache in float8 is the same function's affair.
    assert set(cuda_ops.__all__) == {name.partition(",")[0].removesuffix("_float8") for name in OPS}
