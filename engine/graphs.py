"""Decode steps as graphs: captured once for each size of batch, then replayed with one launch.

    step of n sequences, one token each ─▶ next larger bucket ─▶ fill the buffers ─▶ replay ─▶ first n rows
    any other step                      ─▶ run as it is

On a GPU the buckets are few and captured at start. On the CPU, where a row of padding costs its arithmetic
and a capture no more than the step itself, every size is a bucket and is captured when it first comes.

A graph reads and writes where it did when it was captured, so its input is copied into buffers of fixed place
and largest shape. Rows that only fill up a bucket write their keys and values behind all blocks that are
handed out, each into a slot of its own, and read one of those.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, pairwise, takewhile
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from cuda_ops.recording import Arena, Recording, record
from engine.attention import AttentionMetadata
from engine.batch import BatchLayout, Feed, ModelInput, to_pinned
from engine.kv_cache import KVCache
from engine.model_runner import ModelRunner
from engine.models import CausalLM
from engine.scheduler import ScheduledBatch

Outputs = tuple[Tensor, Tensor]
"""Hidden states and logits, a row for each row of the bucket."""

_SMALL_SIZES: Final = (1, 2, 4)
# Buckets lie closer together where a row more costs a larger part of the step.
_RANGES: Final = (range(8, 65, 8), range(80, 257, 16), range(288, 1 << 20, 32))


class Graph(Protocol):
    def capture(self, run: Callable[[], Outputs]) -> None:
        """Take down what `run` does; it reads nothing but buffers that stay where they are."""
        ...

    def replay(self) -> Outputs:
        """Do it again on what the buffers hold now; the result is overwritten by the next replay."""
        ...


class CudaGraph:
    def __init__(self, pool: torch.cuda._POOL_HANDLE) -> None:
        """`pool`: of `torch.cuda.graph_pool_handle`; graphs of one pool never run at the same time."""
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()
        self._outputs: Outputs | None = None

    def capture(self, run: Callable[[], Outputs]) -> None:
        run()  # modules are loaded and workspaces made at a kernel's first launch, which cannot be captured
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, pool=self._pool):
            self._outputs = run()

    def replay(self) -> Outputs:
        assert self._outputs is not None, "captured first"
        self._graph.replay()
        return self._outputs


class RecordedGraph:
    """The CPU's form: our kernels' calls without Python in between (`cuda_ops/recording.py`)."""

    def __init__(self, arena: Arena) -> None:
        """`arena`: of all graphs of one runner, none of which runs beside another."""
        self._arena = arena
        self._recording: Recording[Outputs] | None = None

    def capture(self, run: Callable[[], Outputs]) -> None:
        self._recording = record(run, self._arena)

    def replay(self) -> Outputs:
        assert self._recording is not None, "captured first"
        self._recording.replay()
        return self._recording.result


class DirectGraph:
    """Runs what was captured, over the same buffers and into the same result: what a graph means."""

    def __init__(self) -> None:
        self._captured: tuple[Callable[[], Outputs], Outputs] | None = None

    def capture(self, run: Callable[[], Outputs]) -> None:
        self._captured = run, run()

    def replay(self) -> Outputs:
        assert self._captured is not None, "captured first"
        run, outputs = self._captured
        for kept, new in zip(outputs, run(), strict=True):
            kept.copy_(new)
        return outputs


def bucket_sizes(max_num_sequences: int) -> list[int]:
    """A few sizes of batch, ascending, the last `max_num_sequences`: what is captured at a GPU's start."""
    fixed = chain(_SMALL_SIZES, *_RANGES)
    return [*takewhile(lambda size: size < max_num_sequences, fixed), max_num_sequences]


def every_size(max_num_sequences: int) -> list[int]:
    return list(range(1, max_num_sequences + 1))


def num_spare_blocks(sizes: Sequence[int], block_size: int) -> int:
    """Blocks past those of the block manager that the cache needs, for the keys and values of padding."""
    return -(-_most_padding(sizes) // block_size)


def _most_padding(sizes: Sequence[int]) -> int:
    return max((after - before - 1 for before, after in pairwise(sizes)), default=0)


class StaticBatch:
    """The buffers that graphs read, as long as the largest bucket."""

    def __init__(
        self,
        sizes: Sequence[int],
        max_blocks: int,
        block_size: int,
        first_spare_block: int,
        device: torch.device,
    ) -> None:
        """All rows are padding at first.

        Args:
            sizes: of the buckets, ascending.
            max_blocks: of one sequence.
            block_size: tokens of a block.
            first_spare_block: behind all that are handed out.
            device: the model's.
        """
        max_num_sequences = sizes[-1]
        self._max_blocks = max_blocks
        self._max_context_len = max_blocks * block_size
        self._device = device
        self._spare_slots = first_spare_block * block_size + np.arange(_most_padding(sizes))
        self._block_size = block_size
        self._numbers = torch.zeros((3, max_num_sequences), dtype=torch.int64, device=device)
        self._context_lens = torch.ones(max_num_sequences, dtype=torch.int32, device=device)
        self._tables = torch.zeros((max_num_sequences, max_blocks), dtype=torch.int32, device=device)
        self._query_start = torch.arange(max_num_sequences + 1, dtype=torch.int32, device=device)

    def rows(self, size: int) -> ModelInput:
        """Views of the first `size` rows, the same at every call."""
        return ModelInput(
            input_ids=self._numbers[0, :size],
            positions=self._numbers[1, :size],
            metadata=AttentionMetadata(
                query_start=self._query_start[: size + 1],
                context_lens=self._context_lens[:size],
                block_tables=self._tables[:size],
                slot_mapping=self._numbers[2, :size],
                max_query_len=1,
                max_context_len=self._max_context_len,
                num_decode_sequences=size,
            ),
        )

    def fill(self, layout: BatchLayout, size: int, feed: Feed | None) -> None:
        """Copy a decode step in, and padding behind it up to `size`; waits for nothing."""
        num_rows = len(layout.lengths)
        spare_slots = self._spare_slots[: size - num_rows]
        numbers = np.zeros((3, size), dtype=np.int64)
        numbers[0, :num_rows] = layout.token_ids
        numbers[1, :num_rows] = layout.positions
        numbers[2, :num_rows] = layout.slots
        numbers[2, num_rows:] = spare_slots
        context_lens = numbers[1].astype(np.int32) + 1
        tables = np.zeros((size, layout.tables.shape[1]), dtype=np.int32)
        tables[:num_rows] = layout.tables
        tables[num_rows:, 0] = spare_slots // self._block_size
        for buffer, array in (
            (self._numbers[:, :size], numbers),
            (self._context_lens[:size], context_lens),
            (self._tables[:size, : tables.shape[1]], tables),
        ):
            buffer.copy_(to_pinned(array, self._device), non_blocking=True)
        if feed is not None:
            feed.put_into(self._numbers[0])


class GraphRunner:
    """Takes the place of a `ModelRunner`.

    The cache has `num_spare_blocks` more blocks than the block manager hands out.
    """

    def __init__(
        self,
        eager: ModelRunner,
        model: CausalLM,
        cache: KVCache,
        buffers: StaticBatch,
        sizes: Sequence[int],
        new_graph: Callable[[], Graph],
    ) -> None:
        """`sizes`: of the buckets, ascending."""
        self._eager = eager
        self._model = model
        self._cache = cache
        self._block_size = cache.block_size
        self._buffers = buffers
        self._sizes = sizes
        self._new_graph = new_graph
        self._graphs: dict[int, Graph] = {}
        self._replayed: Outputs | None = None

    @torch.inference_mode()
    def capture(self, progress: Callable[[str], None]) -> None:
        """Capture every bucket, the largest first, whose memory then serves the smaller ones."""
        for number, size in enumerate(reversed(self._sizes), 1):
            progress(f"capturing decode graphs: {number} of {len(self._sizes)}, {size} sequences")
            self._graph_of(size)

    def run(self, batch: ScheduledBatch, feed: Feed | None = None) -> Tensor:
        """As `ModelRunner.run`; the result holds until the next call."""
        return self.execute(BatchLayout.of(batch, self._block_size), feed)

    @torch.inference_mode()
    def execute(self, layout: BatchLayout, feed: Feed | None = None) -> Tensor:
        if not layout.has_single_tokens_only or len(layout.lengths) > self._sizes[-1]:
            return self._eager.execute(layout, feed)
        num_rows = len(layout.lengths)
        size = self._sizes[bisect_left(self._sizes, num_rows)]
        self._cache.copy_blocks(layout.copies)
        self._buffers.fill(layout, size, feed)
        hidden, logits = self._graph_of(size).replay()
        self._replayed = hidden[:num_rows], logits[:num_rows]
        return self._replayed[0]

    @torch.inference_mode()
    def logits(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """As `ModelRunner.logits`; of a replayed step they are there already."""
        if self._replayed is None or hidden is not self._replayed[0]:
            return self._eager.logits(hidden, rows)
        logits = self._replayed[1]
        return logits if len(rows) == len(logits) else logits[to_pinned(np.array(rows), logits.device)]

    def _graph_of(self, size: int) -> Graph:
        """One that was not captured at start is now, on what the buffers hold; its replay does it again."""
        if size not in self._graphs:
            graph = self._new_graph()
            graph.capture(self._compute(size))
            self._graphs[size] = graph
        return self._graphs[size]

    def _compute(self, size: int) -> Callable[[], Outputs]:
        inputs = self._buffers.rows(size)

        def compute() -> Outputs:
            hidden = self._model.forward(
                inputs.input_ids, inputs.positions, self._cache.layers, inputs.metadata
            )
            return hidden, self._model.compute_logits(hidden)

        return compute


def graphs_on(device: torch.device, *, is_recorded: bool) -> Callable[[], Graph]:
    """What makes a new graph for this kind of device; `is_recorded`: as our kernels' calls, on the CPU."""
    if device.type == "cuda":
        return partial(CudaGraph, torch.cuda.graph_pool_handle())
    return partial(RecordedGraph, Arena()) if is_recorded else DirectGraph
