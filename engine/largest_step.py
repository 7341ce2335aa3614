"""Runs the largest step there can be once, so that a GPU's memory is known before the cache is made."""

from __future__ import annotations

import numpy as np
import torch

from engine.batch import BatchLayout
from engine.kv_cache import KVCache, KVCacheShape
from engine.model_runner import ModelRunner
from engine.models import CausalLM
from engine.sampler import SamplerRow, sample
from engine.sampling import SamplingParams
from engine.sequence import Sequence


def run_largest_step(
    model: CausalLM,
    shape: KVCacheShape,
    device: torch.device,
    *,
    num_tokens: int,
    max_model_len: int,
    num_rows: int,
) -> int:
    """Compute `num_tokens` of prompts at the end of full contexts, and draw from `num_rows` rows of logits.

    Returns the bytes of the small cache that it took meanwhile.
    """
    cache = KVCache(shape, -(-num_tokens // shape.block_size), device)
    runner = ModelRunner(model, cache, device)
    hidden = runner.execute(_layout(num_tokens, max_model_len, cache))
    logits = runner.logits(hidden, range(min(num_rows, num_tokens)))
    # What sampling can take most for: a copy of the logits for what changes them, and a cut.
    params = SamplingParams(top_p=0.5, repetition_penalty=2.0)
    sample(logits, [SamplerRow(row, Sequence(0, [0], 1), params, seed=row) for row in range(len(logits))])
    return cache.num_blocks * shape.bytes_per_block


def _layout(num_tokens: int, max_model_len: int, cache: KVCache) -> BatchLayout:
    """As many prompts as that takes. Each token has a slot of its own, and contexts are of any blocks."""
    num_sequences = -(-num_tokens // max_model_len)
    lengths = np.full(num_sequences, max_model_len, dtype=np.int64)
    lengths[-1] = num_tokens - max_model_len * (num_sequences - 1)
    owners = np.repeat(np.arange(num_sequences), lengths)
    first_tokens = np.cumsum(lengths) - lengths
    starts = max_model_len - lengths
    width = -(-max_model_len // cache.block_size)
    return BatchLayout(
        starts=starts,
        lengths=lengths,
        owners=owners,
        token_ids=np.zeros(num_tokens, dtype=np.int64),
        positions=np.arange(num_tokens) + np.repeat(starts - first_tokens, lengths),
        slots=np.arange(num_tokens),
        tables=np.resize(np.arange(cache.num_blocks, dtype=np.int32), (num_sequences, width)),
    )
