"""Registers the kernels' side of the ops under a device's dispatch key."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from cuda_ops.cuda import attention, float8, quantised, rows, sampling
from cuda_ops.cuda.launcher import Launcher
from cuda_ops.registry import NAMESPACE

OPS: Final[Mapping[str, Callable[..., Any]]] = {
    "add_layer_norm": rows.add_layer_norm,
    "add_layer_norm_quantised": rows.add_layer_norm_quantised,
    "add_rms_norm": rows.add_rms_norm,
    "add_rms_norm_quantised": rows.add_rms_norm_quantised,
    "float8_linear": float8.float8_linear,
    "gelu_and_mul": rows.gelu_and_mul,
    "layer_norm": rows.layer_norm,
    "layer_norm_quantised": rows.layer_norm_quantised,
    "paged_attention_decode": attention.paged_attention_decode,
    "paged_attention_decode_float8": attention.paged_attention_decode,
    "paged_attention_prefill": attention.paged_attention_prefill,
    "paged_attention_prefill_float8": attention.paged_attention_prefill,
    "quantised_linear": quantised.quantised_linear,
    "rms_norm": rows.rms_norm,
    "rms_norm_quantised": rows.rms_norm_quantised,
    "rotary_embedding": rows.rotary_embedding,
    "rotary_write_kv": rows.rotary_write_kv,
    "rotary_write_kv_float8": rows.rotary_write_kv,
    "sample_tokens": sampling.sample_tokens,
    "silu_and_mul": rows.silu_and_mul,
    "write_kv": rows.write_kv,
    "write_kv_float8": rows.write_kv,
}
"""By name; each takes a launcher before the op's own arguments."""


def register(launcher: Launcher, dispatch_key: str) -> torch.library.Library:
    """Let these ops run through `launcher` on a device's tensors, for as long as the result is kept."""
    library = torch.library.Library(NAMESPACE, "IMPL")  # type: ignore[no-untyped-call]
    for name, implementation in OPS.items():
        library.impl(name, functools.partial(implementation, launcher), dispatch_key)  # type: ignore[no-untyped-call]
    return library
