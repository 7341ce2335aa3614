"""What a model has a row of for each token: embeddings, and the head that makes logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from cuda_ops.dense import PackedWeight, rows_of
from engine.checkpoint import Checkpoint
from engine.layers.linear import Linear


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Attributes:
    embeddings: `[vocab_size, size]`; the head's own weight where the two are tied and it is not int8.
    head: from `size` to `vocab_size`.
    """

    embeddings: Tensor | PackedWeight
    head: Linear

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, name: str, vocab_size: int, size: int, *, is_tied: bool
    ) -> Vocabulary:
        """Take the embeddings `name` and, unless they are tied, the head `lm_head.weight`."""
        embeddings = checkpoint.take(name, vocab_size, size)
        if not is_tied:
            return cls(embeddings, Linear.load(checkpoint, "lm_head", vocab_size, size, has_bias=False))
        head = Linear.lay_out(embeddings, None, checkpoint.layout)
        return cls(head.weight if checkpoint.layout == "packed" else embeddings, head)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Map `[num_tokens]` to `[num_tokens, size]`."""
        if isinstance(self.embeddings, PackedWeight):
            return rows_of(self.embeddings, token_ids)
        return F.embedding(token_ids, self.embeddings)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map `[num_rows, size]` to `[num_rows, vocab_size]` float32."""
        return self.head(hidden, gives_float32=True)
