"""The engine's ops: one `torch.library` name each, a meaning in plain torch, room for native kernels."""

from __future__ import annotations

from cuda_ops.activation import gelu_and_mul, silu_and_mul
from cuda_ops.attention import paged_attention_decode, paged_attention_prefill
from cuda_ops.dense import linear
from cuda_ops.float8 import float8_linear
from cuda_ops.kv_cache import rotary_write_kv, write_kv
from cuda_ops.lookup import add, add_rows, panel_rows
from cuda_ops.norm import (
    add_layer_norm,
    add_layer_norm_quantised,
    add_rms_norm,
    add_rms_norm_quantised,
    layer_norm,
    layer_norm_quantised,
    rms_norm,
    rms_norm_quantised,
)
from cuda_ops.quantised import quantised_linear
from cuda_ops.rotary import rotary_embedding
from cuda_ops.sampling import argmax, sample_tokens, softmax_at

__all__ = [
    "add",
    "add_layer_norm",
    "add_layer_norm_quantised",
    "add_rms_norm",
    "add_rms_norm_quantised",
    "add_rows",
    "argmax",
    "float8_linear",
    "gelu_and_mul",
    "layer_norm",
    "layer_norm_quantised",
    "linear",
    "paged_attention_decode",
    "paged_attention_prefill",
    "panel_rows",
    "quantised_linear",
    "rms_norm",
    "rms_norm_quantised",
    "rotary_embedding",
    "rotary_write_kv",
    "sample_tokens",
    "silu_and_mul",
    "softmax_at",
    "write_kv",
]
