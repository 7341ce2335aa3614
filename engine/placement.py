"""What one device holds beside the weights: how large the cache comes out, and who runs the steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from cuda_ops.cuda.attention import has_kernels
from cuda_ops.native import has_native_kernels
from engine import batch_invariant, graphs
from engine.batch_invariant import BatchInvariantRunner
from engine.config import EngineConfig
from engine.device import measured_use, memory_for
from engine.errors import ConfigError
from engine.graphs import GraphRunner, StaticBatch, graphs_on
from engine.kv_cache import KVCache, KVCacheShape
from engine.largest_step import run_largest_step
from engine.model_runner import ModelRunner
from engine.models import CausalLM
from engine.weights import LoadObserver

_CPU_CACHE_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Placement:
    """One model on one device.

    Attributes:
        config: Its device is one that exists.
        max_model_len: Prompt plus generated tokens of one sequence.
    """

    model: CausalLM
    config: EngineConfig
    max_model_len: int

    @property
    def device(self) -> torch.device:
        return torch.device(self.config.device)

    @property
    def shape(self) -> KVCacheShape:
        model, config = self.model.config, self.config
        return KVCacheShape(
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads // config.tensor_parallel_size,
            head_dim=model.head_dim,
            block_size=config.block_size,
            dtype=torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else self._activation_dtype,
        )

    @property
    def _activation_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.config.activation_dtype)
        return dtype

    def num_blocks_affordable(self) -> int:
        """Blocks to hand out, by the settings and what memory there is; on a GPU the largest step tells.

        Raises:
            ConfigError: not even one.
            DeviceMemoryError: the largest step does not fit.
        """
        config = self.config
        if config.num_blocks is not None:
            return config.num_blocks
        field, value = "kv_cache_bytes", config.kv_cache_bytes
        num_bytes: int
        if value is not None:
            num_bytes = value
        elif config.is_on_gpu:
            field, num_bytes = "gpu_memory_share", self._bytes_left()
        else:
            num_bytes = _CPU_CACHE_BYTES
        num_affordable = num_bytes // self.shape.bytes_per_block
        if num_affordable == 0:
            rule = f"must leave {self.shape.bytes_per_block} bytes, one block of {config.block_size} tokens"
            raise ConfigError(field, getattr(config, field), f"{rule}; it leaves {num_bytes}")
        num_useful = config.max_num_sequences * -(-self.max_model_len // config.block_size)
        return min(num_affordable, num_useful)

    def make_runner(
        self, num_blocks: int, loading: LoadObserver | None = None
    ) -> ModelRunner | GraphRunner | BatchInvariantRunner:
        """Make the cache of so many blocks and whatever the runner needs besides, graphs included.

        Raises:
            DeviceMemoryError: there is no room for it.
            ConfigError: bits that depend on no batch are asked for and attention has no kernel for that.
        """
        if self.config.is_batch_invariant and self.config.is_on_gpu:
            check_invariant_attention(self.shape, self._activation_dtype)
        with memory_for("cache", self.config.device):
            cache = KVCache(self.shape, num_blocks + self._num_spare_blocks(), self.device)
        if self.config.is_batch_invariant:
            return BatchInvariantRunner(self.model, cache, self.device)
        runner = ModelRunner(self.model, cache, self.device)
        if not self._graph_sizes:
            return runner
        with memory_for("capture", self.config.device):
            graphed = self._graph_runner(runner, cache, num_blocks)
            if not self._records_steps:
                graphed.capture(loading.on_stage if loading is not None else _ignore)
        return graphed

    def _graph_runner(self, runner: ModelRunner, cache: KVCache, num_blocks: int) -> GraphRunner:
        config, sizes = self.config, self._graph_sizes
        buffers = StaticBatch(
            sizes,
            max_blocks=-(-self.max_model_len // config.block_size),
            block_size=config.block_size,
            first_spare_block=num_blocks,
            device=self.device,
        )
        new_graph = graphs_on(self.device, is_recorded=self._records_steps)
        return GraphRunner(runner, self.model, cache, buffers, sizes, new_graph)

    @property
    def _records_steps(self) -> bool:
        """Whether a decode step's native calls are replayed: on the CPU, by one process."""
        config = self.config
        is_possible = not config.is_on_gpu and config.tensor_parallel_size == 1 and has_native_kernels()
        return is_possible and config.decode_graphs != "off" and not config.is_batch_invariant

    @property
    def _graph_sizes(self) -> list[int]:
        """Sizes of batch that have graphs; none where steps run as they are."""
        config = self.config
        if self._records_steps:
            return graphs.every_size(config.max_num_sequences)
        is_on = config.is_on(config.decode_graphs) and not config.is_batch_invariant
        return graphs.bucket_sizes(config.max_num_sequences) if is_on else []

    def _num_spare_blocks(self) -> int:
        if self.config.is_batch_invariant:
            return batch_invariant.num_spare_blocks(self.config.block_size)
        return graphs.num_spare_blocks(self._graph_sizes, self.config.block_size)

    def _bytes_left(self) -> int:
        config = self.config
        torch.cuda.reset_peak_memory_stats(self.device)
        with memory_for("profile", config.device):
            cache_bytes = run_largest_step(
                self.model,
                self.shape,
                self.device,
                num_tokens=config.max_num_batched_tokens,
                max_model_len=self.max_model_len,
                num_rows=config.max_num_sequences,
            )
        use = measured_use(self.device, cache_bytes)
        torch.cuda.empty_cache()
        spare_bytes = self._num_spare_blocks() * self.shape.bytes_per_block
        return max(0, use.left_within(config.gpu_memory_share) - spare_bytes)


def check_invariant_attention(shape: KVCacheShape, dtype: torch.dtype) -> None:
    """Refuse what a GPU's kernel does not serve: in plain torch the bits of attention depend on the batch.

    `dtype`: of queries.

    Raises:
        ConfigError: there is no such kernel.
    """
    if not has_kernels(dtype, shape.head_dim, shape.block_size):
        rule = "needs a kernel of paged_attention_decode on a GPU, and there is none for"
        of = f"{dtype}, heads of {shape.head_dim} and blocks of {shape.block_size} tokens"
        raise ConfigError("is_batch_invariant", True, f"{rule} {of}")


def _ignore(_: str) -> None:
    return None
