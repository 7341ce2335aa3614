"""Which device the engine runs on, and what of its memory there is to give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError, DeviceMemoryError, MemoryStage

_REMEDIES: Final[Mapping[MemoryStage, str]] = {
    "load": "dtype=bfloat16 halves the weights of float32, a larger tensor_parallel_size shares them out",
    "profile": "lower max_num_batched_tokens or max_num_sequences",
    "cache": "lower kv_cache_bytes or num_blocks, or leave both to gpu_memory_share",
    "capture": "lower gpu_memory_share or max_num_sequences, or set decode_graphs=off",
    "step": "lower gpu_memory_share or max_num_batched_tokens",
}


def choose_device(config: EngineConfig) -> EngineConfig:
    """The same settings with `auto` made into a device, and that device made torch's current one.

    Raises:
        ConfigError: there is no such device, or the other settings do not go with it.
    """
    name = config.device
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    if name != "cpu":
        name = _check_cuda(name, config)
    return config if name == config.device else replace(config, device=name)


def _check_cuda(name: str, config: EngineConfig) -> str:
    if not torch.cuda.is_available():
        raise ConfigError("device", config.device, "needs a CUDA device that torch can use")
    number = torch.device(name).index or 0
    num_devices = torch.cuda.device_count()
    if number + config.tensor_parallel_size > num_devices:
        rule = f"needs {config.tensor_parallel_size} GPU(s) from number {number} on, there are {num_devices}"
        raise ConfigError("device", config.device, rule)
    torch.cuda.set_device(number)
    return f"cuda:{number}"


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Of one GPU, in bytes.

    Attributes:
        total: It has.
        elsewhere: Held by other processes, and by CUDA for itself.
        peak: Ours in the largest step, the weights included and the cache not.
    """

    total: int
    elsewhere: int
    peak: int

    def left_within(self, share: float) -> int:
        """What all of ours may yet take so that `share` of the memory is used; never below 0."""
        return max(0, int(self.total * share) - self.elsewhere - self.peak)


def measured_use(device: torch.device, cache_bytes: int) -> MemoryUse:
    """Since `torch.cuda.reset_peak_memory_stats`; `cache_bytes` were held by a cache that is gone by now."""
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    elsewhere = total - free - torch.cuda.memory_reserved(device)
    return MemoryUse(total, elsewhere, torch.cuda.max_memory_allocated(device) - cache_bytes)


@contextmanager
def memory_for(stage: MemoryStage, device: str) -> Iterator[None]:
    """Tell of a device without memory by what to change.

    Raises:
        DeviceMemoryError: in place of torch's own error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(device, stage, _REMEDIES[stage]) from error


def knows_float8(device: str) -> bool:
    """Whether a GPU's tensor cores multiply e4m3."""
    return torch.cuda.get_device_capability(device) >= (8, 9)
