"""From an engine's settings to its model on a device: which kernels, which layout, which share."""

from __future__ import annotations

import torch

from cuda_ops.errors import KernelsUnavailableError
from cuda_ops.native import KernelsInUse, use_cuda_kernels, use_kernels
from engine.checkpoint import WeightLayout
from engine.config import EngineConfig
from engine.device import knows_float8, memory_for
from engine.errors import ConfigError
from engine.quantisation import Method
from engine.shard import WHOLE, Shard
from engine.weights import LoadedModel, LoadObserver, load_model


def load_for(config: EngineConfig, loading: LoadObserver | None = None, shard: Shard = WHOLE) -> LoadedModel:
    """Choose this process's kernels and threads and load its share of the weights.

    Raises:
        ConfigError: the kernels are not there, or the model cannot be shared out so.
        ModelLoadError: the folder or name holds no model that can be loaded.
        DeviceMemoryError: the device has no room for it.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    _check_float8(config)
    in_use = _choose_kernels(config, loading)
    with memory_for("load", config.device):
        return load_model(
            config.model,
            dtype=getattr(torch, config.activation_dtype),
            device=torch.device(config.device),
            layout=choose_layout(config, in_use),
            observer=loading,
            shard=shard,
            keeps=_kept_methods(config),
        )


def _choose_kernels(config: EngineConfig, loading: LoadObserver | None) -> KernelsInUse:
    try:
        in_use = use_kernels(config.kernels)
        if config.is_on_gpu:
            in_use = use_cuda_kernels(config.kernels)
    except KernelsUnavailableError as error:
        raise ConfigError("kernels", config.kernels, f"cannot be had: {error}") from error
    if config.is_batch_invariant and in_use.level is None:
        raise ConfigError("is_batch_invariant", True, f"needs native kernels: {in_use.reason}")
    if loading is not None:
        device = "CUDA" if config.is_on_gpu else "CPU"
        loading.on_stage(f"{device} kernels: {in_use.level or f'reference in plain torch ({in_use.reason})'}")
    return in_use


def _kept_methods(config: EngineConfig) -> tuple[Method, ...]:
    """By which weights may be stored and are multiplied so."""
    kept: list[Method] = ["fp8"] if config.dtype == "fp8" else []
    # In float32 there is no kernel for codes, and on the CPU panels of 16 bits are faster than they.
    if config.is_on_gpu and config.activation_dtype != "float32":
        kept += ["awq", "gptq"]
        if config.dtype == "bfloat16" and knows_float8(config.device):
            kept.append("fp8")
    return tuple(kept)


def _check_float8(config: EngineConfig) -> None:
    if config.dtype == "fp8" and config.is_on_gpu and not knows_float8(config.device):
        major, minor = torch.cuda.get_device_capability(config.device)
        rule = f"needs a GPU of compute capability 8.9 or newer, {config.device} has {major}.{minor}"
        raise ConfigError("dtype", "fp8", rule)


def choose_layout(config: EngineConfig, in_use: KernelsInUse) -> WeightLayout:
    """What layers make of the plain weights they load."""
    if config.dtype == "int8":
        return "w8a16" if config.is_on_gpu else "int8"
    if config.dtype == "fp8":
        return "fp8"
    return "packed" if config.device == "cpu" and in_use.has_fast_linear else "dense"
