"""From a scheduled batch to the tensors a model takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.attention import AttentionMetadata
from engine.block_manager import BlockCopy
from engine.scheduler import ScheduledBatch

Integers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class ModelInput:
    """Attributes:
    input_ids: `[num_tokens]` int64.
    positions: `[num_tokens]` int64.
    """

    input_ids: Tensor
    positions: Tensor
    metadata: AttentionMetadata

    @classmethod
    def of(cls, layout: BatchLayout, device: torch.device) -> ModelInput:
        query_start = np.zeros(len(layout.lengths) + 1, dtype=np.int32)
        np.cumsum(layout.lengths, out=query_start[1:])
        context_lens = layout.starts + layout.lengths
        return cls(
            input_ids=to_device(layout.token_ids, device),
            positions=to_device(layout.positions, device),
            metadata=AttentionMetadata(
                query_start=to_device(query_start, device),
                context_lens=to_device(context_lens.astype(np.int32), device),
                block_tables=to_device(layout.tables, device),
                slot_mapping=to_device(layout.slots, device),
                max_query_len=int(layout.lengths.max()),
                max_context_len=int(context_lens.max()),
                num_decode_sequences=int((layout.lengths == 1).sum()),
            ),
        )


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """The batch's tokens laid out flat, sequence after sequence, in the order of its entries.

    Attributes:
        starts, lengths: `[num_entries]`: the position of an entry's first token, and how many it has.
        owners, token_ids, positions, slots: `[num_tokens]`: each token's entry, id, place in its sequence,
            and slot in the cache.
        tables: `[num_entries, max_blocks]` int32, padded with 0.
        copies: Blocks to copy before anything is written.
    """

    starts: Integers
    lengths: Integers
    owners: Integers
    token_ids: Integers
    positions: Integers
    slots: Integers
    tables: np.ndarray[tuple[int, int], np.dtype[np.int32]]
    copies: tuple[BlockCopy, ...] = ()

    @property
    def has_single_tokens_only(self) -> bool:
        return len(self.lengths) == len(self.owners)

    @classmethod
    def of(cls, batch: ScheduledBatch, block_size: int) -> BatchLayout:
        starts = np.array([entry.start for entry in batch.entries], dtype=np.int64)
        lengths = np.array([entry.num_tokens for entry in batch.entries], dtype=np.int64)
        tables = _pad_block_tables(batch)
        owners = np.repeat(np.arange(len(lengths)), lengths)
        first_tokens = np.cumsum(lengths) - lengths
        positions = np.arange(len(owners)) + np.repeat(starts - first_tokens, lengths)
        blocks = tables[owners, positions // block_size].astype(np.int64)
        slots = blocks * block_size + positions % block_size
        copies = tuple(batch.copies)
        return cls(starts, lengths, owners, _token_ids(batch), positions, slots, tables, copies)


@dataclass(frozen=True, slots=True)
class Feed:
    """Tokens that a step runs before the host knows them.

    Attributes:
        ids: `[n]` int64 on the device, chosen by the step before.
        rows, sources: Of the step's tokens, those that are fed; and which of `ids` each of them is.
    """

    ids: Tensor
    rows: Integers
    sources: Integers

    def put_into(self, input_ids: Tensor) -> None:
        rows, sources = (to_device(array, self.ids.device) for array in (self.rows, self.sources))
        input_ids.index_copy_(0, rows, self.ids.index_select(0, sources))


def to_device(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], device: torch.device) -> Tensor:
    """Waits for nothing."""
    return to_pinned(array, device).to(device, non_blocking=True)


def to_pinned(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], device: torch.device) -> Tensor:
    """On the host; for a GPU in memory that it can read itself, which torch reuses once that has happened."""
    host = torch.from_numpy(array)
    return host.pin_memory() if device.type == "cuda" else host


def _token_ids(batch: ScheduledBatch) -> Integers:
    ids: list[int] = []
    for entry in batch.entries:
        if entry.num_tokens == 1:
            ids.append(entry.sequence.token_ids[entry.start])
        else:
            ids += entry.token_ids
    return np.array(ids, dtype=np.int64)


def _pad_block_tables(batch: ScheduledBatch) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    width = max(len(entry.sequence.block_table) for entry in batch.entries)
    tables = np.zeros((len(batch.entries), width), dtype=np.int32)
    for row, entry in enumerate(batch.entries):
        table = entry.sequence.block_table
        tables[row, : len(table)] = table
    return tables
