"""How one engine is set up: read once at start, never changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from engine.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "int8"]
ActivationDtype = Literal["float32", "bfloat16"]
Device = Literal["cpu", "cuda"]
Kernels = Literal["auto", "native", "reference"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine.

    Attributes:
        model: A folder in Hugging Face layout, or a hub name.
        dtype: Of weights, activations and cache. `int8` rounds the weights of dense layers, each output on a
            scale of its own, and keeps the rest in bfloat16; on the CPU only.
        block_size: Tokens per block of the KV cache.
        num_blocks: Blocks in the KV cache; `None` derives it from `kv_cache_bytes`.
        kv_cache_bytes: Upper bound for the cache when `num_blocks` is `None`. A model so small that every
            running sequence at full length needs less gets less.
        max_num_sequences: Sequences running at once; a request of n sequences takes n of these seats.
        max_num_batched_tokens: Token budget of one step. Not below `max_num_sequences`, so that everything
            that decodes always fits and only prefill is rationed.
        max_model_len: Prompt plus generated tokens; `None` takes the model's own limit.
        num_speculative_tokens: Tokens of a sequence run ahead of their turn in a step, at most: what followed
            when the same tokens stood before (`speculation.py`). 0 is none; the tokens stay the same.
        keeps_prefixes: Whether full blocks are kept after their requests, for prompts that begin alike.
        num_threads: Threads of the CPU operators; `None` leaves the process as it is.
        is_batch_invariant: A token's logits are the same to the last bit whatever else is in the batch. Takes
            native kernels on the CPU, and time.
        kernels: What the ops on the CPU run, for the whole process: `auto` takes native kernels where they
            are built, `native` insists on them, `reference` is plain torch.
    """

    model: str
    dtype: Dtype = "float32"
    device: Device = "cpu"
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_bytes: int = 1 << 30
    max_num_sequences: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    keeps_prefixes: bool = True
    num_speculative_tokens: int = 0
    num_threads: int | None = None
    kernels: Kernels = "auto"
    is_batch_invariant: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError("model", self.model, "must be a folder or a hub name, and not empty")
        _check_choice("dtype", self.dtype, get_args(Dtype))
        _check_choice("device", self.device, get_args(Device))
        if self.dtype == "int8" and self.device != "cpu":
            raise ConfigError("dtype", self.dtype, f"needs the device cpu, not {self.device}")
        _check_choice("kernels", self.kernels, get_args(Kernels))
        for field in ("block_size", "kv_cache_bytes", "max_num_sequences", "max_num_batched_tokens"):
            _check_positive(field, getattr(self, field))
        for field in ("num_blocks", "max_model_len", "num_threads"):
            if getattr(self, field) is not None:
                _check_positive(field, getattr(self, field))
        _check_count("num_speculative_tokens", self.num_speculative_tokens)
        if self.is_batch_invariant and self.device != "cpu":
            raise ConfigError("is_batch_invariant", True, "must be off on any device but the CPU")
        if self.max_num_batched_tokens < self.max_num_sequences:
            raise ConfigError(
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                f"must be at least max_num_sequences ({self.max_num_sequences}), one token for each",
            )

    @property
    def activation_dtype(self) -> ActivationDtype:
        """Of all that is not the weight of a dense layer."""
        return "bfloat16" if self.dtype == "int8" else self.dtype


def _check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(field, value, f"must be one of {', '.join(choices)}")


def _check_count(field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(field, value, "must be a whole number of at least 0")


def _check_positive(field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(field, value, "must be a whole number of at least 1")
