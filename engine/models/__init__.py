"""Decoder-only language models over a paged cache, one file a family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from engine.attention import AttentionMetadata
from engine.model_config import ModelConfig


class CausalLM(Protocol):
    """What the model runner needs of a model. Not thread-safe: one step at a time."""

    @property
    def config(self) -> ModelConfig: ...

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_cache: Sequence[tuple[Tensor, Tensor]],
        metadata: AttentionMetadata,
    ) -> Tensor:
        """Run one step's tokens through all layers and store their keys and values.

        Args:
            input_ids: `[num_tokens]` int64.
            positions: `[num_tokens]` int64, each token's place in its sequence, from 0.
            kv_cache: for each layer keys and values, each `[num_blocks, num_kv_heads, block_size, head_dim]`
                in the model's dtype; mutated.
            metadata: which tokens belong together and where their cache lies.

        Returns:
            `[num_tokens, hidden_size]`, what `compute_logits` takes rows of.
        """
        ...

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Map `[num_rows, hidden_size]` to `[num_rows, vocab_size]` float32."""
        ...
