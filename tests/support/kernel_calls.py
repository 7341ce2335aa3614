"""Calls of the ops as the models make them, on the smallest tensors that choose the same kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cuda_ops.float8 import round_to_float8
from cuda_ops.quantised import lay_out_codes

EPS = 1e-5


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Attributes:
    hidden: of the residual stream.
    intermediate: of the feed-forward layer.
    """

    name: str
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    soft_cap: float | None = None


# Every head size, groups of 1, 4 and 8, and the hidden sizes between which others choose the same kernels.
MODELS = (
    ModelShape("opt-125m", 768, 3072, 12, 12, 64),
    ModelShape("phi-2", 2560, 10240, 32, 32, 80),
    ModelShape("phi-3", 3072, 8192, 32, 32, 96),
    ModelShape("llama-3-8b", 4096, 14336, 32, 8, 128),
    ModelShape("llama-3-70b", 8192, 28672, 64, 8, 128),
    ModelShape("gemma-7b", 3072, 24576, 16, 16, 256),
    ModelShape("gemma-2-9b", 3584, 14336, 16, 8, 256, soft_cap=50.0),
)

# A kernel's registers hardly depend on how wide it is: of the norms in eight bits these widths are enough.
_QUANTISED = ("opt-125m", "llama-3-8b", "llama-3-70b")

Call = tuple[str, tuple[Any, ...]]


def calls_of_models(dtype: torch.dtype = torch.bfloat16) -> Iterator[Call]:
    for model in MODELS:
        yield from row_calls(model, 2, dtype)
        yield from attention_calls(model, dtype)
        if model.name in _QUANTISED:
            yield from quantised_calls(model, 2, dtype)
        yield from float8_calls(model, 2, dtype)
    yield from sampling_calls()
    yield from coded_calls(dtype)
    yield from float8_linear_calls()


def row_calls(model: ModelShape, num_tokens: int, dtype: torch.dtype) -> Iterator[Call]:
    """Norms of the residual and of heads, rotary embedding, activation and cache write of one layer."""
    hidden = torch.randn(num_tokens, model.hidden).to(dtype)
    residual, weight = torch.randn_like(hidden), torch.randn(model.hidden).to(dtype)
    yield "rms_norm", (hidden, weight, EPS)
    yield "add_rms_norm", (hidden, residual, weight, EPS)
    yield "layer_norm", (hidden, weight, weight, EPS)
    yield "add_layer_norm", (hidden, residual.clone(), weight, weight, EPS)
    gates = torch.randn(num_tokens, 2 * model.intermediate).to(dtype)
    yield "silu_and_mul", (gates,)
    yield "gelu_and_mul", (gates,)
    query, key, value = projected(model, num_tokens, dtype)
    yield "rms_norm", (query, torch.ones(model.head_dim, dtype=dtype), EPS)
    angles = torch.randn(num_tokens, model.head_dim // 2)
    yield "rotary_embedding", (query, key, torch.cat((angles.cos(), angles.sin()), -1))
    caches = [
        torch.zeros(num_tokens + 1, model.num_kv_heads, 16, model.head_dim, dtype=dtype) for _ in range(2)
    ]
    slots = torch.arange(num_tokens) * 17
    yield "write_kv", (key, value, *caches, slots)
    cos_sin, weight = torch.cat((angles.cos(), angles.sin()), -1), torch.ones(model.head_dim, dtype=dtype)
    for weights in ((None, None), (weight, weight)):
        yield "rotary_write_kv", (query, key, value, cos_sin, *weights, EPS, *caches, slots)


def quantised_calls(model: ModelShape, num_tokens: int, dtype: torch.dtype) -> Iterator[Call]:
    """Norms of the residual in eight bits."""
    hidden = torch.randn(num_tokens, model.hidden).to(dtype)
    residual, weight = torch.randn_like(hidden), torch.randn(model.hidden).to(dtype)
    for quantised in (torch.float8_e4m3fn, torch.int8):
        yield "rms_norm_quantised", (hidden, weight, EPS, quantised)
        yield "add_rms_norm_quantised", (hidden, residual.clone(), weight, EPS, quantised)
        yield "layer_norm_quantised", (hidden, weight, weight, EPS, quantised)
        yield "add_layer_norm_quantised", (hidden, residual.clone(), weight, weight, EPS, quantised)


def float8_calls(model: ModelShape, num_tokens: int, dtype: torch.dtype) -> Iterator[Call]:
    """What reads or writes the cache, where that is float8, with the last of calls of a name alone."""
    for op, arguments in dict((*row_calls(model, num_tokens, dtype), *attention_calls(model, dtype))).items():
        if "kv" in op or "attention" in op:
            caches = [part.to(torch.float8_e4m3fn) if _is_cache(part) else part for part in arguments]
            yield f"{op}_float8", (*caches, 0.5, 2.0)


def _is_cache(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.dim() == 4


def sampling_calls() -> Iterator[Call]:
    """Choosing tokens from the engine's logits, as its requests combine, and once from narrow ones."""
    numbers = torch.tensor([(0, 0, 1, 0), (-1, 2, 5, 3)])
    controls = torch.tensor([(0.0, 1.0, 0.0, 1.0, 0.0, 0.0), (0.7, 0.5, 0.01, 1.2, 0.5, 0.5)])
    changes = (
        torch.tensor([0, 1, 3], dtype=torch.int32),
        torch.tensor([(5, 1, 1), (0, 1, 0), (127, 0, 2)], dtype=torch.int32),
        torch.tensor([0.5, -torch.inf, 0.0]),
        torch.full((1, 4), -2, dtype=torch.int32),
        torch.tensor([0, -1], dtype=torch.int32),
    )
    for dtype, scores in ((torch.float32, False), (torch.bfloat16, True)):
        logits = torch.randn(2, 128).to(dtype)
        for listed in ((None,) * 5, changes):
            for truncates in (False, True):
                yield "sample_tokens", (logits, numbers, controls, *listed, truncates, scores, 0)
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(2, 128).to(dtype)
        yield "sample_tokens", (logits, numbers, controls, *(None,) * 5, False, True, 20)


def coded_calls(dtype: torch.dtype) -> Iterator[Call]:
    """Products with weights as checkpoints and `int8` have them, of one row to more than codes serve."""
    # Bits, inputs of a group, zeros of its own, type of scales, numbers of rows.
    kinds = (
        (4, 128, True, torch.float16, (1, 9, 17, 33, 257)),
        (4, 128, False, torch.float16, (1, 33)),
        (4, 32, True, torch.float16, (1, 33)),
        (8, 128, False, torch.float16, (33,)),
        (8, 0, False, torch.float32, (1, 33, 257)),
    )
    num_inputs, num_outputs = 1032, 40
    for bits, group_size, has_zeros, scale_dtype, batches in kinds:
        shape = (-(-num_inputs // group_size) if group_size else 1, num_outputs)
        weight = lay_out_codes(
            torch.randint(0, 1 << bits, (num_outputs, num_inputs), dtype=torch.uint8),
            torch.rand(shape).to(scale_dtype),
            torch.randint(0, 1 << bits, shape, dtype=torch.uint8) if has_zeros else None,
            bits=bits,
            group_size=group_size,
        )
        for num_rows in batches:
            x = torch.randn(num_rows, num_inputs).to(dtype)
            yield "quantised_linear", (
                x, weight.codes, weight.scales, weight.zeros, None, x.new_zeros(num_outputs),
                bits, group_size, num_outputs,
            )  # fmt: skip


def float8_linear_calls() -> Iterator[Call]:
    weight = round_to_float8(torch.randn(32, 48))
    x = torch.randn(3, 48).bfloat16()
    yield "float8_linear", (x, weight.values.view(torch.uint8), weight.scales, None)


def projected(model: ModelShape, num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as models have them: slices of one projection."""
    heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    whole = torch.randn(num_tokens, sum(heads), model.head_dim).to(dtype)
    query, key, value = whole.split(heads, dim=1)
    return query, key, value


def attention_calls(model: ModelShape, dtype: torch.dtype) -> Iterator[Call]:
    """Two sequences that decode within a grid for long contexts, and prefill."""
    query, _, _ = projected(model, 2, dtype)
    caches = [torch.zeros(4, model.num_kv_heads, 16, model.head_dim, dtype=dtype) for _ in range(2)]
    tables = torch.tensor([[0, 2, 1], [3, 0, 0]], dtype=torch.int32)
    lengths = torch.tensor([35, 1], dtype=torch.int32)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32)
    out, scale = torch.empty_like(query, memory_format=torch.contiguous_format), model.head_dim**-0.5
    yield (
        "paged_attention_decode",
        (out, query, *caches, tables, lengths, 4096, scale, None, model.soft_cap, None),
    )
    yield (
        "paged_attention_prefill",
        (out, query, *caches, starts, lengths, tables, scale, None, model.soft_cap),
    )
