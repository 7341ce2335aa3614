"""From an engine's settings to its model on a device: which kernels, which layout, which share."""

from __future__ import annotations

import torch

from cuda_ops.errors import KernelsUnavailableError
from cuda_ops.native import KernelsInUse, use_cuda_kernels, use_kernels
from engine.checkpoint import WeightLayout
from engine.config import EngineConfig
from engine.device import memory_for
from engine.errors import ConfigError
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
    in_use = _choose_kernels(config, loading)
    with memory_for("load", config.device):
        return load_model(
            config.model,
            dtype=getattr(torch, config.activation_dtype),
            device=torch.device(config.device),
            layout=_choose_layout(config, in_use),
            observer=loading,
            shard=shard,
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


def _choose_layout(config: EngineConfig, in_use: KernelsInUse) -> WeightLayout:
    if config.dtype == "int8":
        return "int8"
    return "packed" if config.device == "cpu" and in_use.has_fast_linear else "dense"
