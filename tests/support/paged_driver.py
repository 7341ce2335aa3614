"""Runs a model's forward pass by hand: lays tokens out in shuffled pages and builds the metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.attention import AttentionMetadata
from engine.models import CausalLM


@dataclass
class PagedSequence:
    """Attributes:
    token_ids: all tokens so far.
    blocks: pages that it owns, in the order of its tokens.
    num_cached: tokens whose keys and values are in the cache.
    """

    token_ids: list[int]
    blocks: list[int] = field(default_factory=list)
    num_cached: int = 0


class PagedDriver:
    """One cache and the sequences in it; pages are handed out in random order, so that none are
    neighbours.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        dtype: torch.dtype = torch.float32,
        block_size: int = 4,
        num_blocks: int = 96,
        seed: int = 0,
    ) -> None:
        config = model.config
        self.model = model
        self.block_size = block_size
        generator = torch.Generator().manual_seed(seed)
        self._free = torch.randperm(num_blocks, generator=generator).tolist()
        shape = (num_blocks, config.num_kv_heads, block_size, config.head_dim)
        self.kv_cache = [
            (torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(config.num_layers)
        ]

    def run(self, work: Sequence[tuple[PagedSequence, int]]) -> list[Tensor]:
        """Run the next `count` uncached tokens of each sequence in one step.

        Sequences with one token must come first. Returns each one's logits, `[count, vocab_size]`.
        """
        parts = [(sequence, self._reserve(sequence, count)) for sequence, count in work]
        input_ids = [sequence.token_ids[place] for sequence, places in parts for place in places]
        positions = [place for _, places in parts for place in places]
        hidden = self.model.forward(
            torch.tensor(input_ids), torch.tensor(positions), self.kv_cache, self._metadata(parts)
        )
        for sequence, places in parts:
            sequence.num_cached = places.stop
        logits = self.model.compute_logits(hidden)
        return list(logits.split([len(places) for _, places in parts]))

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """Decode greedily, all prompts in one batch; returns the new tokens."""
        sequences = [PagedSequence(list(prompt)) for prompt in prompts]
        order = sorted(sequences, key=lambda sequence: len(sequence.token_ids))
        for _ in range(num_tokens):
            pending = [(sequence, len(sequence.token_ids) - sequence.num_cached) for sequence in order]
            for sequence, logits in zip(order, self.run(pending), strict=True):
                sequence.token_ids.append(int(logits[-1].argmax()))
        return [
            sequence.token_ids[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)
        ]

    def _reserve(self, sequence: PagedSequence, count: int) -> range:
        places = range(sequence.num_cached, sequence.num_cached + count)
        while len(sequence.blocks) * self.block_size < places.stop:
            sequence.blocks.append(self._free.pop())
        return places

    def _metadata(self, parts: Sequence[tuple[PagedSequence, range]]) -> AttentionMetadata:
        counts = [len(places) for _, places in parts]
        contexts = [places.stop for _, places in parts]
        slots = [
            sequence.blocks[place // self.block_size] * self.block_size + place % self.block_size
            for sequence, places in parts
            for place in places
        ]
        tables = [torch.tensor(sequence.blocks, dtype=torch.int32) for sequence, _ in parts]
        num_decodes = next((index for index, count in enumerate(counts) if count > 1), len(counts))
        return AttentionMetadata(
            query_start=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=torch.nn.utils.rnn.pad_sequence(tables, batch_first=True),
            slot_mapping=torch.tensor(slots),
            max_query_len=max(counts),
            max_context_len=max(contexts),
            num_decode_sequences=num_decodes,
        )
