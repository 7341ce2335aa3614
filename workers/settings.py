"""What one worker serves, on which device, with which limits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from engine import builtin
from workers.engines.protocol import StepSampling

SEED_MODEL = "facebook/opt-125m"
"""The built-in model answers to this name too, so that the client of vLLM's tracing page works as it is."""

DEFAULT_ITEM_SPANS = 64


class WorkerSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="THROUGHLINE_", frozen=True, extra="ignore")

    model: str = ""
    """Folder or hub name; empty is the built-in model."""
    served_model_names: Annotated[tuple[str, ...], NoDecode] = ()
    """The first is canonical, the others are aliases. Empty takes the model's own name."""
    dtype: Literal["float32", "bfloat16", "int8", "fp8"] = "float32"
    device: str = Field(default="cpu", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`cuda` is the first GPU, `cuda:1` the second; `auto` takes the first if there is one."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=64)
    """Processes that share the model out, a GPU each from `device` on."""
    max_model_len: int | None = Field(default=None, ge=1)
    max_num_sequences: int = Field(default=64, ge=1, le=4096)
    """Sequences that the engine runs at once."""
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    """Tokens of one engine step, prefill and decode together."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """`fp8` keeps keys and values as float8 e4m3; `auto` as the model computes."""
    kv_cache_bytes: int | None = Field(default=None, ge=1 << 20)
    """Unset is 1 GiB on the CPU, and on a GPU what `gpu_memory_share` leaves."""
    gpu_memory_share: float = Field(default=0.9, gt=0, le=1, allow_inf_nan=False)
    """Of a GPU's memory, for weights, cache and the largest step together."""
    decode_graphs: Literal["auto", "on", "off"] = "auto"
    """Replay decode steps from CUDA graphs; `auto` is on a GPU."""
    async_steps: Literal["auto", "on", "off"] = "auto"
    """Schedule a step before the tokens of the one before are read; `auto` is on a GPU."""
    prefix_cache: bool = True
    """Keep computed blocks for prompts that begin alike, until their room is needed."""
    speculative_tokens: int = Field(default=0, ge=0, le=64)
    """Tokens of a sequence run ahead of their turn in a step, at most; 0 is off. For text that repeats."""
    num_threads: int | None = Field(default=None, ge=1)
    """Of the CPU operators; unset leaves it to torch."""
    kernels: Literal["auto", "native", "reference"] = "auto"
    """Of our own operators on the CPU: `native` ones where built (`auto`), or plain torch (`reference`)."""
    batch_invariant: bool = False
    """The same request gives the same logits to the last bit whatever else runs; slower, on the CPU only."""
    engine: Literal["process", "inline"] = "process"
    """`inline` runs the engine in the worker itself, for debugging: a crash then costs the worker."""
    engine_start_seconds: float = Field(default=600.0, gt=0)
    """A model that takes longer to load counts as failed."""
    engine_stall_seconds: float = Field(default=60.0, gt=0)
    """An engine with work that says nothing for so long is killed and its jobs are handed back."""
    shutdown_grace_seconds: float = Field(default=25.0, ge=0)
    """After SIGTERM the worker finishes what it holds for so long, then hands the rest back."""
    retry_pause_seconds: float = Field(default=1.0, ge=0, le=86_400, allow_inf_nan=False)
    """Before the attempt after a failed one; doubles with each. A job waits for half of it at least and for
    all of it at most. 0 repeats at once."""
    retry_pause_max_seconds: float = Field(default=60.0, gt=0, le=86_400, allow_inf_nan=False)
    """What that pause grows to."""
    trace_item_spans: int = Field(default=DEFAULT_ITEM_SPANS, ge=0, le=10_000)
    """Prompts of one job whose generations stand in its own trace; each one beyond has a trace of its own,
    linked to the job. A trace page grows slow from about 2,000 spans on; a generation is four."""
    trace_steps: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    """The part of the engine's steps that are drawn as spans, each a trace of its own; 0 draws none."""
    trace_slow_steps_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """A step that takes longer is drawn whatever `trace_steps` says."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Where Prometheus finds `/metrics`; 0 is nowhere."""
    metrics_host: str = "127.0.0.1"
    """The address of that port: 0.0.0.0 where Prometheus runs elsewhere."""

    @model_validator(mode="before")
    @classmethod
    def _split_names(cls, values: Any) -> Any:
        names = values.get("served_model_names") if isinstance(values, dict) else None
        if isinstance(names, str):
            split = tuple(name.strip() for name in names.split(",") if name.strip())
            return {**values, "served_model_names": split}
        return values

    @property
    def model_source(self) -> str:
        return self.model or str(builtin.path())

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical name first."""
        if self.served_model_names:
            return self.served_model_names
        if not self.model:
            return (builtin.NAME, SEED_MODEL)
        folder = Path(self.model)
        return (folder.resolve().name if folder.is_dir() else self.model,)

    @property
    def step_sampling(self) -> StepSampling | None:
        if self.trace_steps == 0 and self.trace_slow_steps_seconds is None:
            return None
        return StepSampling(self.trace_steps, self.trace_slow_steps_seconds)

    @property
    def engine_threads(self) -> int | None:
        """The built-in model is too small to share out: one thread, unless the operator says otherwise."""
        if self.num_threads is not None or self.model or "OMP_NUM_THREADS" in os.environ:
            return self.num_threads
        return 1

    @property
    def concurrency(self) -> int:
        """Jobs held at once: what the engine runs, and a margin that waits at its door."""
        return self.max_num_sequences + max(4, self.max_num_sequences // 4)
