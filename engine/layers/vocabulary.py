"""What a model has a row of for each token: embeddings, and the head that makes logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import cuda_ops
from cuda_ops.dense import PackedWeight
from engine.checkpoint import Checkpoint, WeightLayout
from engine.layers.linear import Linear
from engine.shard import WHOLE, Shard


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Attributes:
    embeddings: `[vocab_size, size]`; the head's own weight where the two are tied and it is in panels.
    head: from `size` to `vocab_size`.
    dtype: of embedded tokens.
    """

    embeddings: Tensor | PackedWeight
    head: Linear
    dtype: torch.dtype

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, name: str, vocab_size: int, size: int, *, is_tied: bool
    ) -> Vocabulary:
        """Take the embeddings `name` and, unless they are tied, the head `lm_head.weight`."""
        if not checkpoint.shard.is_whole:
            return SplitVocabulary.load_split(checkpoint, name, vocab_size, size, is_tied=is_tied)
        embeddings = checkpoint.take(name, vocab_size, size)
        if not is_tied:
            layout = _head_layout(checkpoint, is_tied=False)
            head = Linear.load(checkpoint, "lm_head", vocab_size, size, has_bias=False, layout=layout)
            return cls(embeddings, head, checkpoint.dtype)
        layout = _head_layout(checkpoint, is_tied=True)
        head = Linear.lay_out(embeddings, None, layout, checkpoint.pages)
        return cls(_rows(head, embeddings), head, checkpoint.dtype)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Map `[num_tokens]` to `[num_tokens, size]`."""
        if isinstance(self.embeddings, PackedWeight):
            return cuda_ops.panel_rows(self.embeddings, token_ids, self.dtype)
        return F.embedding(token_ids, self.embeddings)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map `[num_rows, size]` to `[num_rows, vocab_size]` float32."""
        return self.head(hidden, gives_float32=True)


@dataclass(frozen=True, slots=True)
class SplitVocabulary(Vocabulary):
    """A rank's share of the rows, and zeros up to as many as the first rank has.

    Attributes:
        shard: Whose.
        vocab_size: Of all ranks.
    """

    shard: Shard = WHOLE
    vocab_size: int = 0

    @classmethod
    def load_split(
        cls, checkpoint: Checkpoint, name: str, vocab_size: int, size: int, *, is_tied: bool
    ) -> SplitVocabulary:
        embeddings = checkpoint.take_vocabulary(name, vocab_size, size)
        head = embeddings if is_tied else checkpoint.take_vocabulary("lm_head.weight", vocab_size, size)
        layout = _head_layout(checkpoint, is_tied=is_tied)
        laid_out = Linear.lay_out(head, None, layout, checkpoint.pages)
        rows = _rows(laid_out, embeddings) if is_tied else embeddings
        return cls(rows, laid_out, checkpoint.dtype, checkpoint.shard, vocab_size)

    def embed(self, token_ids: Tensor) -> Tensor:
        own = self.shard.rows_of(self.vocab_size)
        rows = token_ids - own.start
        is_own = (rows >= 0) & (rows < len(own))
        # Super without arguments does not work in a class with slots.
        embedded = Vocabulary.embed(self, rows * is_own)
        return self.shard.sum(embedded * is_own.unsqueeze(1))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.shard.gather_columns(Vocabulary.logits(self, hidden))[:, : self.vocab_size]


def _head_layout(checkpoint: Checkpoint, *, is_tied: bool) -> WeightLayout:
    """Codes have no rows to look up, so embeddings that are the head's weight stay plain.

    In e4m3 every head does: its few bits are felt most where they decide the token.
    """
    stays_plain = checkpoint.layout == "fp8" or (is_tied and checkpoint.layout == "w8a16")
    return "dense" if stays_plain else checkpoint.layout


def _rows(head: Linear, embeddings: Tensor) -> Tensor | PackedWeight:
    return head.weight if isinstance(head.weight, PackedWeight) else embeddings
