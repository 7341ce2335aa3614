"""Runs the model over one scheduled batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.batch import BatchLayout, Feed, ModelInput, to_device
from engine.kv_cache import KVCache
from engine.models import CausalLM
from engine.scheduler import ScheduledBatch


class Runner(Protocol):
    """What the engine needs of a device's part."""

    def run(self, batch: ScheduledBatch, feed: Feed | None = None) -> Tensor:
        """Compute all the batch's tokens and put their keys and values into the cache.

        `feed`: tokens of the batch that are on the device only. Returns `[num_tokens, hidden_size]`, tokens
        in the order of the batch's entries.
        """
        ...

    def logits(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """`[len(rows), vocab_size]` float32, for these rows of `run`'s result: ascending, none twice."""
        ...


class ModelRunner:
    """Owns the model and the cache's contents; knows nothing of requests beyond one batch."""

    def __init__(self, model: CausalLM, cache: KVCache, device: torch.device) -> None:
        self._model = model
        self._cache = cache
        self._block_size = cache.block_size
        self._device = device

    def run(self, batch: ScheduledBatch, feed: Feed | None = None) -> Tensor:
        """As `Runner.run`."""
        return self.execute(BatchLayout.of(batch, self._block_size), feed)

    @torch.inference_mode()
    def execute(self, layout: BatchLayout, feed: Feed | None = None) -> Tensor:
        """As `run`, of a batch laid out already."""
        self._cache.copy_blocks(layout.copies)
        inputs = ModelInput.of(layout, self._device)
        if feed is not None:
            feed.put_into(inputs.input_ids)
        return self._model.forward(inputs.input_ids, inputs.positions, self._cache.layers, inputs.metadata)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """As `Runner.logits`."""
        if len(rows) != hidden.shape[0]:
            hidden = hidden[to_device(np.array(rows, dtype=np.int64), self._device)]
        return self._model.compute_logits(hidden)
