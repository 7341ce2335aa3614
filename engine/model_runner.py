"""Runs the model over one scheduled batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import build_model_input
from engine.kv_cache import KVCache
from engine.models import CausalLM
from engine.scheduler import ScheduledBatch


class ModelRunner:
    """Owns the model and the cache's contents; knows nothing of requests beyond one batch."""

    def __init__(self, model: CausalLM, cache: KVCache, block_size: int, device: torch.device) -> None:
        self._model = model
        self._cache = cache
        self._block_size = block_size
        self._device = device

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> Tensor:
        """Compute all the batch's tokens and put their keys and values into the cache.

        Returns `[num_tokens, hidden_size]`, tokens in the order of the batch's entries.
        """
        self._cache.copy_blocks(batch.copies)
        inputs = build_model_input(batch, self._block_size, self._device)
        return self._model.forward(inputs.input_ids, inputs.positions, self._cache.layers, inputs.metadata)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """`[len(rows), vocab_size]` float32, for these rows of `run`'s result: ascending, none twice."""
        if len(rows) != hidden.shape[0]:
            hidden = hidden[torch.tensor(rows, device=self._device)]
        return self._model.compute_logits(hidden)


def count_parameters(model: CausalLM) -> int:
    """Elements of all tensors that the model holds, those it holds twice counted once."""
    seen: set[int] = set()
    return _count_elements(model, seen)


def _count_elements(part: object, seen: set[int]) -> int:
    if isinstance(part, Tensor):
        key = id(part) if part.is_mkldnn else part.data_ptr()  # a packed weight has no address
    elif isinstance(part, list | tuple) or type(part).__module__.startswith("engine."):
        key = id(part)
    else:
        return 0
    if key in seen:
        return 0
    seen.add(key)
    return part.numel() if isinstance(part, Tensor) else sum(_count_elements(p, seen) for p in _members(part))


def _members(part: object) -> Sequence[object]:
    if isinstance(part, list | tuple):
        return part
    slots = [getattr(part, name) for name in getattr(part, "__slots__", ()) if hasattr(part, name)]
    return [*slots, *vars(part).values()] if hasattr(part, "__dict__") else slots
