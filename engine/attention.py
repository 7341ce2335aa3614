"""How a flat batch of tokens finds its keys and values in the paged cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where each sequence's tokens lie in one step's flat token axis and in the paged cache.

    All tensors are on the model's device. Sequences that decode (exactly one query token) come first.

    Attributes:
        query_start: `[num_sequences + 1]` int32; sequence i owns tokens `query_start[i]:query_start[i + 1]`.
        context_lens: `[num_sequences]` int32; tokens of the sequence in the cache, this step's included.
        block_tables: `[num_sequences, max_blocks]` int32, padded with 0; padding is never read as context.
        slot_mapping: `[num_tokens]` int64; `block * block_size + offset` of each token's own key and value.
        max_query_len: the longest query of the batch, in tokens.
        max_context_len: the longest context of the batch, in tokens.
        num_decode_sequences: how many leading sequences have exactly one query token.
    """

    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    max_query_len: int
    max_context_len: int
    num_decode_sequences: int
