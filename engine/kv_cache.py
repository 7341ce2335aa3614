"""The tensors behind the block manager's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cuda_ops.memory import LargePages
from engine.batch import to_device
from engine.block_manager import BlockCopy


@dataclass(frozen=True, slots=True)
class KVCacheShape:
    """Attributes:
    num_layers: Each has a key and a value tensor `[num_blocks, num_kv_heads, block_size, head_dim]`.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def bytes_per_block(self) -> int:
        """Keys and values of all layers."""
        elements = self.num_layers * self.num_kv_heads * self.head_dim * self.block_size
        return 2 * elements * self.dtype.itemsize


class KVCache:
    """Keys and values of all layers.

    Attributes:
        layers: `(keys, values)` per layer, each `[num_blocks, num_kv_heads, block_size, head_dim]`. A block's
            tokens of one head lie together, which is what the attention of one head reads.
    """

    def __init__(self, shape: KVCacheShape, num_blocks: int, device: torch.device) -> None:
        size = (num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim)
        # Zeros rather than empty: attention may multiply masked slots by zero, and zero times NaN is NaN. On
        # the CPU a block takes memory when it is first written to.
        zeros = LargePages().zeros if device.type == "cpu" else partial(torch.zeros, device=device)
        # torch moves no float8 by index, but bytes.
        moved = torch.uint8 if shape.dtype.itemsize == 1 else shape.dtype
        self._moved = [(zeros(size, dtype=moved), zeros(size, dtype=moved)) for _ in range(shape.num_layers)]
        self.layers: list[tuple[Tensor, Tensor]] = [
            (keys.view(shape.dtype), values.view(shape.dtype)) for keys, values in self._moved
        ]
        self.num_blocks = num_blocks
        self.block_size = shape.block_size
        self._device = device

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """All sources are read before any target is written, as the copies of one step require."""
        if not copies:
            return
        sources = to_device(np.array([copy.source for copy in copies]), self._device)
        targets = to_device(np.array([copy.target for copy in copies]), self._device)
        for keys, values in self._moved:
            keys[targets] = keys[sources]
            values[targets] = values[sources]
