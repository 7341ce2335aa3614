"""A runner whose numbers for a token depend on the tokens before it and on nothing else that runs.

Three things make a token's last bits depend on its company: products over another number of rows take other
kernels, a prompt's chunks begin and end elsewhere, and a token attends by another kernel when it comes alone.
So here the model only ever sees `NUM_ROWS` tokens at once, the last ones padded, and each token attends as a
decoding one does, by a kernel that takes every token for itself.

    step's tokens   a0 a1 a2 a3 a4 | b7 | c9         tiles of 4   a0 a1 a2 a3 | a4 b7 c9 --

On a GPU the context of each token is summed in parts of `SPLIT_LEN`, and not in as many as fill the device.

Assumed, and held by a test, is that a product gives a row the same whatever the other rows hold and whichever
row of the tile it is; on a GPU, where the products are cuBLAS's, no machine has run that test yet. See He and
Thinking Machines Lab 2025, "Defeating Nondeterminism in LLM Inference".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention import AttentionMetadata
from engine.batch import BatchLayout, Feed, Integers, ModelInput, to_device
from engine.kv_cache import KVCache
from engine.models import CausalLM
from engine.scheduler import ScheduledBatch

# Of 16, 32 and 64 the one that slows decoding least (docs/LOG.md).
NUM_ROWS: Final = 16
# A context of 8,192 tokens with 8 key heads is then 128 blocks of a GPU's for each token.
SPLIT_LEN: Final = 512


def num_spare_blocks(block_size: int) -> int:
    """Blocks past those of the block manager that the cache needs, for the keys and values of padding."""
    return -(-NUM_ROWS // block_size)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Tokens in the order in which they run, padded to whole tiles; arrays as in `BatchLayout`."""

    token_ids: Integers
    positions: Integers
    slots: Integers
    tables: np.ndarray[tuple[int, ...], np.dtype[np.int32]]

    def tiles(self, device: torch.device) -> Iterator[ModelInput]:
        for first in range(0, len(self.token_ids), NUM_ROWS):
            rows = slice(first, first + NUM_ROWS)
            context_lens = (self.positions[rows] + 1).astype(np.int32)
            yield ModelInput(
                input_ids=to_device(self.token_ids[rows], device),
                positions=to_device(self.positions[rows], device),
                metadata=AttentionMetadata(
                    query_start=torch.arange(NUM_ROWS + 1, dtype=torch.int32, device=device),
                    context_lens=to_device(context_lens, device),
                    block_tables=to_device(self.tables[rows], device),
                    slot_mapping=to_device(self.slots[rows], device),
                    max_query_len=1,
                    max_context_len=int(context_lens.max()),
                    num_decode_sequences=NUM_ROWS,
                    split_len=SPLIT_LEN,
                ),
            )


class BatchInvariantRunner:
    """Takes the place of a `ModelRunner`.

    The cache has `num_spare_blocks` more blocks than the block manager hands out.
    """

    def __init__(self, model: CausalLM, cache: KVCache, device: torch.device) -> None:
        self._model = model
        self._cache = cache
        self._block_size = cache.block_size
        self._device = device
        self._first_spare_block = cache.num_blocks - num_spare_blocks(cache.block_size)

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch, feed: Feed | None = None) -> Tensor:
        """As `Runner.run`."""
        self._cache.copy_blocks(batch.copies)
        layout = BatchLayout.of(batch, self._block_size)
        if feed is not None:  # on a GPU this waits for the step before
            layout.token_ids[feed.rows] = feed.ids.cpu().numpy()[feed.sources]
        order = _order(batch, layout)
        hidden = torch.cat(
            [
                self._model.forward(tile.input_ids, tile.positions, self._cache.layers, tile.metadata)
                for tile in self._rows(layout, order).tiles(self._device)
            ]
        )
        return hidden[to_device(np.argsort(order), self._device)]

    @torch.inference_mode()
    def logits(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """As `Runner.logits`."""
        chosen = hidden[torch.tensor(rows, device=self._device)]
        padded = F.pad(chosen, (0, 0, 0, -len(rows) % NUM_ROWS))
        tiles = (padded[first : first + NUM_ROWS] for first in range(0, len(rows), NUM_ROWS))
        return torch.cat([self._model.compute_logits(tile) for tile in tiles])[: len(rows)]

    def _rows(self, layout: BatchLayout, order: Integers) -> _Rows:
        """Padding is a first token, each with a slot of its own behind all others."""
        num_padding = -len(order) % NUM_ROWS
        zeros = np.zeros(num_padding, dtype=np.int64)
        slots = self._first_spare_block * self._block_size + np.arange(num_padding)
        tables = np.zeros((num_padding, layout.tables.shape[1]), dtype=np.int32)
        tables[:, 0] = slots // self._block_size
        return _Rows(
            np.concatenate((layout.token_ids[order], zeros)),
            np.concatenate((layout.positions[order], zeros)),
            np.concatenate((layout.slots[order], slots)),
            np.concatenate((layout.tables[layout.owners[order]], tables)),
        )


def _order(batch: ScheduledBatch, layout: BatchLayout) -> Integers:
    """Tokens of requests' first sequences come first, for others may share blocks that these fill now."""
    ranks = np.array([entry.request.sequences.index(entry.sequence) for entry in batch.entries])
    return np.argsort(ranks[layout.owners], kind="stable")
