"""From a scheduled batch to the tensors a model takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.attention import AttentionMetadata
from engine.scheduler import ScheduledBatch


@dataclass(frozen=True, slots=True)
class ModelInput:
    """Attributes:
    input_ids: `[num_tokens]` int64.
    positions: `[num_tokens]` int64.
    """

    input_ids: Tensor
    positions: Tensor
    metadata: AttentionMetadata


def build_model_input(batch: ScheduledBatch, block_size: int, device: torch.device) -> ModelInput:
    """Lay the batch's tokens out flat, sequence after sequence, in the order of its entries."""
    starts = np.array([entry.start for entry in batch.entries], dtype=np.int64)
    lengths = np.array([entry.num_tokens for entry in batch.entries], dtype=np.int64)
    query_start = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=query_start[1:])
    tables = _pad_block_tables(batch)
    owners = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(query_start[-1]) + np.repeat(starts - query_start[:-1], lengths)
    slots = tables[owners, positions // block_size].astype(np.int64) * block_size + positions % block_size
    return ModelInput(
        input_ids=_to(device, _token_ids(batch)),
        positions=_to(device, positions),
        metadata=AttentionMetadata(
            query_start=_to(device, query_start.astype(np.int32)),
            context_lens=_to(device, (starts + lengths).astype(np.int32)),
            block_tables=_to(device, tables),
            slot_mapping=_to(device, slots),
            max_query_len=int(lengths.max()),
            max_context_len=int((starts + lengths).max()),
            num_decode_sequences=int((lengths == 1).sum()),
        ),
    )


def _token_ids(batch: ScheduledBatch) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
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


def _to(device: torch.device, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
