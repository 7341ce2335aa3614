"""How a flat batch of tokens finds its keys and values in the paged cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import cuda_ops
from cuda_ops.kv_cache import NO_SCALES, Scales


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
        split_len: tokens of a context that are summed together, for the same bits in any batch; None is free.
    """

    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    max_query_len: int
    max_context_len: int
    num_decode_sequences: int
    split_len: int | None = None


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMSNorms of each query head and of each key head, their weights `[head_dim]`."""

    query: Tensor
    key: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """One layer's attention: stores the step's keys and values, then lets its tokens look back.

    Attributes:
        scale: multiplies the scores before the softmax.
        sliding_window: tokens a token sees, itself included; None is all of them.
        cache_scales: what one of the cache's keys and one of its values stands for where it is float8.
    """

    scale: float
    sliding_window: int | None = None
    cache_scales: Scales = NO_SCALES

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
    ) -> Tensor:
        """Attend over the pages, the step's own tokens included.

        Args:
            query: `[num_tokens, num_heads, head_dim]`, any strides.
            key: `[num_tokens, num_kv_heads, head_dim]`, any strides.
            value: like `key`.
            kv_cache: keys and values, each `[num_blocks, num_kv_heads, block_size, head_dim]`, mutated in the
                slots of this step's tokens.
            metadata: where the tokens lie.

        Returns:
            `[num_tokens, num_heads * head_dim]`, contiguous.
        """
        scales = self._scales_of(kv_cache)
        cuda_ops.write_kv(key, value, *kv_cache, metadata.slot_mapping, scales=scales)
        return self._look_back(query, kv_cache, metadata)

    def after_rotating(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos_sin: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
        norms: HeadNorms | None = None,
    ) -> Tensor:
        """Attend as a call does, with queries and keys normalised per head and rotated first.

        `query` is mutated; `cos_sin`: `[num_tokens, rotary_dim]` float32.
        """
        cuda_ops.rotary_write_kv(
            query,
            key,
            value,
            cos_sin,
            *kv_cache,
            metadata.slot_mapping,
            query_weight=None if norms is None else norms.query,
            key_weight=None if norms is None else norms.key,
            eps=0.0 if norms is None else norms.eps,
            scales=self._scales_of(kv_cache),
        )
        return self._look_back(query, kv_cache, metadata)

    def _look_back(
        self, query: Tensor, kv_cache: tuple[Tensor, Tensor], metadata: AttentionMetadata
    ) -> Tensor:
        key_cache, value_cache = kv_cache
        scales = self._scales_of(kv_cache)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        num_decodes = metadata.num_decode_sequences
        if num_decodes:
            cuda_ops.paged_attention_decode(
                out[:num_decodes],
                query[:num_decodes],
                key_cache,
                value_cache,
                metadata.block_tables[:num_decodes],
                metadata.context_lens[:num_decodes],
                max_context_len=metadata.max_context_len,
                scale=self.scale,
                sliding_window=self.sliding_window,
                split_len=metadata.split_len,
                scales=scales,
            )
        if num_decodes < metadata.context_lens.shape[0]:
            cuda_ops.paged_attention_prefill(
                out,
                query,
                key_cache,
                value_cache,
                metadata.query_start[num_decodes:],
                metadata.context_lens[num_decodes:],
                metadata.block_tables[num_decodes:],
                scale=self.scale,
                sliding_window=self.sliding_window,
                scales=scales,
            )
        return out.flatten(1)

    def _scales_of(self, kv_cache: tuple[Tensor, Tensor]) -> Scales:
        return self.cache_scales if kv_cache[0].dtype == torch.float8_e4m3fn else NO_SCALES
