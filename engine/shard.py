"""One rank's share of a model, and what the ranks do together over `torch.distributed`.

    split by      whose                               afterwards
    outputs       q, k, v; up and gate; the head      each rank has its own heads or columns
    inputs        the projections that follow them    partial sums, added over all ranks
    rows          embeddings                          zeros for other ranks' tokens, added over all ranks

See Shoeybi et al. 2019, "Megatron-LM", section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import ConfigError
from engine.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Shard:
    """Attributes:
    rank: From 0 to `size - 1`.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_whole(self) -> bool:
        return self.size == 1

    def check_fits(self, model: ModelConfig) -> None:
        """A head is never split, nor a key head given to two ranks.

        Raises:
            ConfigError: there are not as many for each rank.
        """
        counts = {
            "num_heads": model.num_heads,
            "num_kv_heads": model.num_kv_heads,
            "ffn_size": model.ffn_size,
        }
        for name, count in counts.items():
            if count % self.size:
                rule = f"must divide the model's {name}, {count}"
                raise ConfigError("tensor_parallel_size", self.size, rule)

    def part_of(self, count: int) -> int:
        """How many of `count` heads or columns are this rank's."""
        return count // self.size

    def slices(self, length: int, num_parts: int = 1) -> list[slice]:
        """Where this rank's share lies along an axis of `num_parts` equal parts, each of which is split."""
        part = length // num_parts
        own = part // self.size
        return [
            slice(first + self.rank * own, first + (self.rank + 1) * own) for first in range(0, length, part)
        ]

    def rows_of(self, num_rows: int) -> range:
        """This rank's rows of a vocabulary, which need not come out even: the last ranks have fewer."""
        most = -(-num_rows // self.size)
        first = min(self.rank * most, num_rows)
        return range(first, min(first + most, num_rows))

    def sum(self, partial: Tensor) -> Tensor:
        """Add up all ranks' tensors, in place."""
        if not self.is_whole:
            dist.all_reduce(partial)
        return partial

    def gather_columns(self, own: Tensor) -> Tensor:
        """All ranks' `[num_rows, n]` side by side, in the order of the ranks."""
        if self.is_whole:
            return own
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return torch.cat(parts, dim=-1)


WHOLE: Final = Shard()
