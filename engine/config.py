"""How one engine is set up: read once at start, never changed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from engine.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "int8", "fp8"]
ActivationDtype = Literal["float32", "bfloat16"]
KVCacheDtype = Literal["auto", "fp8"]
"""vLLM's words; `auto` is the dtype of activations."""
Switch = Literal["auto", "on", "off"]
"""`auto` is on where it pays: on a GPU."""
Kernels = Literal["auto", "native", "reference"]

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine.

    Attributes:
        model: A folder in Hugging Face layout, or a hub name.
        dtype: Of weights, activations and, unless `kv_cache_dtype` says otherwise, cache. `int8` rounds the
            weights of dense layers, each output on a scale of its own, and keeps the rest in bfloat16; on the
            CPU it rounds embeddings that are the head's too, and each row that a layer reads. `fp8` rounds
            weights and rows to e4m3, but for the head, and keeps the rest in bfloat16; slow on the CPU.
            Layers stored as codes keep those on a GPU.
        device: `cpu`, `cuda` for the first GPU, `cuda:N`, or `auto`: the first GPU if there is one.
        block_size: Tokens per block of the KV cache.
        num_blocks: Blocks in the KV cache; `None` derives it from `kv_cache_bytes`.
        kv_cache_dtype: `fp8` keeps keys and values as float8 e4m3, by the checkpoint's scales where it has
            any: half the memory of bfloat16, less accurate, and slow on a CPU, which has no kernel for it.
        kv_cache_bytes: Upper bound for the cache when `num_blocks` is `None`. A model so small that every
            running sequence at full length needs less gets less. `None` is 1 GiB on the CPU, and on a GPU
            what `gpu_memory_share` leaves.
        tensor_parallel_size: Processes that share the model out, a GPU each from `device` on, or on the CPU.
        gpu_memory_share: Of a GPU's memory, what weights, cache and the largest step may take together.
        max_num_sequences: Sequences running at once; a request of n sequences takes n of these seats.
        max_num_batched_tokens: Token budget of one step. Not below `max_num_sequences`, so that everything
            that decodes always fits and only prefill is rationed.
        max_model_len: Prompt plus generated tokens; `None` takes the model's own limit.
        num_speculative_tokens: Tokens of a sequence run ahead of their turn in a step, at most: what followed
            when the same tokens stood before (`speculation.py`). 0 is none; the tokens stay the same.
        keeps_prefixes: Whether full blocks are kept after their requests, for prompts that begin alike.
        num_threads: Threads of the CPU operators; `None` leaves the process as it is.
        is_batch_invariant: A token's logits are the same to the last bit whatever else is in the batch. Takes
            native kernels, attention's above all, and time; on a GPU there are no graphs with it.
        decode_graphs: Steps in which every sequence runs one token are replayed: from CUDA graphs that were
            captured at start, on the CPU from recorded calls of the native kernels, one recording for each
            size of batch that comes. Without native kernels `on` runs the same static buffers, for tests.
        async_steps: Each step is scheduled and launched before the tokens of the one before are read, where
            the requests in it allow that (`SamplingParams.can_run_ahead`); never with speculation.
        kernels: What the ops on the CPU run, for the whole process: `auto` takes native kernels where they
            are built, `native` insists on them, `reference` is plain torch.
    """

    model: str
    dtype: Dtype = "float32"
    device: str = "cpu"
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_dtype: KVCacheDtype = "auto"
    kv_cache_bytes: int | None = None
    gpu_memory_share: float = 0.9
    tensor_parallel_size: int = 1
    max_num_sequences: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    keeps_prefixes: bool = True
    num_speculative_tokens: int = 0
    num_threads: int | None = None
    decode_graphs: Switch = "auto"
    async_steps: Switch = "auto"
    kernels: Kernels = "auto"
    is_batch_invariant: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError("model", self.model, "must be a folder or a hub name, and not empty")
        _check_choice("dtype", self.dtype, get_args(Dtype))
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise ConfigError("device", self.device, "must be auto, cpu, cuda or cuda:N")
        _check_choice("kernels", self.kernels, get_args(Kernels))
        _check_choice("kv_cache_dtype", self.kv_cache_dtype, get_args(KVCacheDtype))
        if self.kv_cache_dtype == "fp8" and self.is_batch_invariant and self.device == "cpu":
            raise ConfigError(
                "kv_cache_dtype", "fp8", "must be auto with is_batch_invariant on the device cpu"
            )
        for field in ("decode_graphs", "async_steps"):
            _check_choice(field, getattr(self, field), get_args(Switch))
        for field in ("block_size", "tensor_parallel_size", "max_num_sequences", "max_num_batched_tokens"):
            _check_positive(field, getattr(self, field))
        for field in ("num_blocks", "kv_cache_bytes", "max_model_len", "num_threads"):
            if getattr(self, field) is not None:
                _check_positive(field, getattr(self, field))
        _check_count("num_speculative_tokens", self.num_speculative_tokens)
        _check_share("gpu_memory_share", self.gpu_memory_share)
        if self.is_batch_invariant and self.decode_graphs == "on":
            raise ConfigError("is_batch_invariant", True, "must be off with decode_graphs")
        if self.is_batch_invariant and self.tensor_parallel_size > 1:
            raise ConfigError("is_batch_invariant", True, "must be off with tensor_parallel_size above 1")
        if self.max_num_batched_tokens < self.max_num_sequences:
            raise ConfigError(
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                f"must be at least max_num_sequences ({self.max_num_sequences}), one token for each",
            )

    @property
    def is_on_gpu(self) -> bool:
        """False for `auto` too, until it is made into a device."""
        return self.device.startswith("cuda")

    def is_on(self, switch: Switch) -> bool:
        return switch == "on" or (switch == "auto" and self.is_on_gpu)

    @property
    def activation_dtype(self) -> ActivationDtype:
        """Of all that is not the weight of a dense layer."""
        return "float32" if self.dtype == "float32" else "bfloat16"


def _check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(field, value, f"must be one of {', '.join(choices)}")


def _check_count(field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(field, value, "must be a whole number of at least 0")


def _check_positive(field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(field, value, "must be a whole number of at least 1")


def _check_share(field: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise ConfigError(field, value, "must be above 0 and at most 1")
