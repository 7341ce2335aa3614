"""What rows of the sampler ask for, as the tensors of `cuda_ops.sample_tokens`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cuda_ops.sampling import LogitChanges
from engine.batch import to_device

if TYPE_CHECKING:
    from engine.sampler import SamplerRow

_ALLOWS_ALL = -1


def pack_draws(rows: SequenceOf[SamplerRow], device: torch.device) -> tuple[Tensor, Tensor]:
    """`numbers` and `controls`, a row for each."""
    numbers = [(row.seed, row.sequence.index, row.position, row.params.top_k) for row in rows]
    controls = [
        (
            row.params.temperature,
            row.params.top_p,
            row.params.min_p,
            row.params.repetition_penalty,
            row.params.presence_penalty,
            row.params.frequency_penalty,
        )
        for row in rows
    ]
    return (
        to_device(np.array(numbers, dtype=np.int64), device),
        to_device(np.array(controls, dtype=np.float32), device),
    )


def pack_changes(rows: SequenceOf[SamplerRow], vocab_size: int, device: torch.device) -> LogitChanges | None:
    """Penalties, biases, forbidden tokens and masks; None where no row has any."""
    if not any(row.changes_logits for row in rows):
        return None
    lists = [_listed(row, vocab_size) for row in rows]
    entries = [(token, *entry) for listed in lists for token, entry in sorted(listed.items())]
    starts = np.zeros(len(rows) + 1, dtype=np.int32)
    starts[1:] = np.cumsum([len(listed) for listed in lists])
    masks = [_words(row.allowed, vocab_size) for row in rows if row.allowed is not None]
    mask_rows = np.full(len(rows), _ALLOWS_ALL, dtype=np.int32)
    mask_rows[[row.allowed is not None for row in rows]] = np.arange(len(masks))
    tokens = np.array([entry[:3] for entry in entries], dtype=np.int32).reshape(-1, 3)
    biases = np.array([entry[3] for entry in entries], dtype=np.float32)
    all_masks = np.stack(masks) if masks else np.zeros((0, -(-vocab_size // 32)), dtype=np.int32)
    return LogitChanges(*(to_device(part, device) for part in (starts, tokens, biases, all_masks, mask_rows)))


def _listed(row: SamplerRow, vocab_size: int) -> dict[int, tuple[int, int, float]]:
    """By token whether it was seen, how often it was put out, and its bias; only what has an effect."""
    params, sequence = row.params, row.sequence
    biases = dict(params.logit_bias)
    if len(row.forbidden) < vocab_size:
        biases |= dict.fromkeys(row.forbidden, -float("inf"))
    has_repetition = params.repetition_penalty != 1.0
    seen = {*sequence.token_ids, *row.ahead} if has_repetition else set()
    counts: Counter[int] = Counter()
    if params.presence_penalty or params.frequency_penalty:
        counts.update((*sequence.output_token_ids, *row.ahead))
    return {
        token: (int(token in seen), counts[token], biases.get(token, 0.0))
        for token in {*biases, *seen, *counts}
    }


def _words(allowed: bytes, vocab_size: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """As many whole words as the vocabulary has; what it has no bit for is not allowed."""
    words = np.zeros(-(-vocab_size // 32), dtype=np.int32)
    held = np.frombuffer(allowed, dtype=np.uint8)[: words.nbytes]
    words.view(np.uint8)[: len(held)] = held
    return words
