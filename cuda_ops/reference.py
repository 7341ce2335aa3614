"""What every op means, in plain torch: the oracle of native kernels, and the fallback on every device.

Written to be read first and to be fast enough second: no loop over decoding sequences one by one, temporaries
small enough to stay in a core's cache. Reductions (norms, scores, softmax, weighted sums) accumulate in
float32 whatever the input dtype; results are rounded once, on the way out.

Caches are `[num_blocks, num_kv_heads, block_size, head_dim]`: a head's tokens in a block are contiguous, so a
(block, head) pair is one row of a matrix and a sequence's context is one `index_select`.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

# Decode gathers the keys of a few sequences at a time. 768 Ki elements are 3 MB in float32: large enough
# that the cost of a round is not its calls, small enough that the gathered keys are still in cache for the
# product. Measured on 64 sequences of 112 (bfloat16) and 400 (float32) tokens: a fifth slower at 192 Ki;
# past 32 MB the allocator maps fresh pages at every call, up to 3 times slower.
GATHERED_ELEMENTS: Final = 768 * 1024

_WORD: Final = 0xFFFFFFFF


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    num_kv_heads, block_size = key_cache.shape[1:3]
    block = slot_mapping // block_size
    offset = slot_mapping - block * block_size
    heads = torch.arange(num_kv_heads, device=key.device)
    rows = ((block.unsqueeze(1) * num_kv_heads + heads) * block_size + offset.unsqueeze(1)).view(-1)
    for source, cache in ((key, key_cache), (value, value_cache)):
        head_dim = cache.shape[3]
        cache.view(-1, head_dim).index_copy_(0, rows, source.reshape(-1, head_dim))


def paged_attention_decode(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    max_context_len: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    split_len: int | None,
) -> None:
    num_sequences, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    num_blocks = -(-max_context_len // block_size)
    tables = block_tables[:, :num_blocks]
    grouped = query.reshape(num_sequences, num_kv_heads, num_heads // num_kv_heads, head_dim)
    hidden = _hidden_from_decode(context_lens, num_blocks * block_size, sliding_window)
    chunk = max(1, GATHERED_ELEMENTS // (num_kv_heads * num_blocks * block_size * head_dim))
    for start in range(0, num_sequences, chunk):
        part = slice(start, start + chunk)
        pages = _pages(tables[part], num_kv_heads)
        weights = _attention_weights(grouped[part], _gather(key_cache, pages), hidden[part], scale, soft_cap)
        out[part] = _sum_values(weights, value_cache, pages, hidden[part], context_lens[part])


def paged_attention_prefill(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> None:
    num_kv_heads, block_size = key_cache.shape[1:3]
    # Two device syncs on CUDA; a native kernel reads the lengths on the device.
    starts = query_start.tolist()
    lengths = context_lens.tolist()
    for index, context_len in enumerate(lengths):
        part = slice(starts[index], starts[index + 1])
        table = block_tables[index : index + 1, : -(-context_len // block_size)]
        pages = _pages(table, num_kv_heads)
        key = _gather(key_cache, pages)[0, :, :context_len]
        value = _gather(value_cache, pages)[0, :, :context_len]
        out[part] = _attend_causally(query[part], key, value, scale, sliding_window, soft_cap)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    residual += x
    return rms_norm(residual, weight, eps)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    # torch's own kernel accumulates in float32 for every dtype used here.
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    residual += x
    return layer_norm(residual, weight, bias, eps)


def rotary_embedding(query: Tensor, key: Tensor, cos_sin: Tensor) -> None:
    for heads in (query, key):
        heads[..., : cos_sin.shape[-1]] = _rotated(heads, cos_sin)


def rotary_write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    turned = normed_and_rotated(key, key_weight, eps, cos_sin)
    query.copy_(normed_and_rotated(query, query_weight, eps, cos_sin))
    write_kv(turned.to(key.dtype), value, key_cache, value_cache, slot_mapping)


def normed_and_rotated(heads: Tensor, weight: Tensor | None, eps: float, cos_sin: Tensor) -> Tensor:
    """Float32, for the result to be rounded once."""
    wide = heads.float()
    if weight is not None:
        wide = rms_norm(wide, weight, eps)
    return torch.cat((_rotated(wide, cos_sin), wide[..., cos_sin.shape[-1] :]), dim=-1)


def _rotated(heads: Tensor, cos_sin: Tensor) -> Tensor:
    """The part of each head that turns, in float32."""
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    first, second = heads[..., : cos_sin.shape[-1]].float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up).to(x.dtype)


def gelu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return (F.gelu(gate.float(), approximate="tanh") * up).to(x.dtype)


def argmax(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def softmax_at(logits: Tensor, temperatures: Tensor) -> Tensor:
    wide = logits.float()
    # The maximum moves to 0 first, so that no quotient overflows.
    return torch.softmax((wide - wide.amax(dim=-1, keepdim=True)) / temperatures.unsqueeze(1), dim=-1)


def sample_tokens(
    logits: Tensor,
    numbers: Tensor,
    controls: Tensor,
    starts: Tensor | None,
    changes: Tensor | None,
    biases: Tensor | None,
    masks: Tensor | None,
    mask_rows: Tensor | None,
    truncates: bool,
    scores: bool,
    num_top: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    own = logits.float()
    raced = own
    if starts is not None and changes is not None and biases is not None:
        raced = _changed(own, controls, starts, changes, biases)
    if masks is not None and mask_rows is not None:
        raced = _masked(raced, masks, mask_rows)
    temperatures = controls[:, :1]
    if truncates:
        raced = raced.masked_fill(~_kept(raced, numbers[:, 3:], controls), -torch.inf)
    noise = torch.log(-torch.log1p(-_uniform_below_one(numbers, logits.shape[1])))
    token_ids = _first_maximum(raced - torch.where(temperatures > 0, temperatures * noise, 0.0))
    are_sound = own.amax(-1).isfinite() & ~own.isnan().any(-1)
    # Equal ones in the order of their tokens.
    values, order = torch.sort(own, dim=-1, descending=True, stable=True)
    top_ids, total = order[:, :num_top].contiguous(), own.logsumexp(-1, keepdim=True)
    top_logprobs = values[:, :num_top] - total
    logprobs = (own.gather(1, token_ids[:, None]) - total)[:, 0] if scores else own.new_empty(0)
    return token_ids, logprobs, are_sound, top_ids, top_logprobs


def philox(
    group: Tensor, position: Tensor, sequence: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words of Philox4x32-10 (Salmon et al. 2011) for the counter (group, position, sequence, 0).

    All are int64 and broadcast; of the seed, the key, all 64 bits count, of the others 32.
    """
    a, b, c, d = group & _WORD, position & _WORD, sequence & _WORD, torch.zeros_like(group)
    low_key, high_key = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # A product past 63 bits wraps, and its bits are right all the same.
        of_a, of_c = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = (of_c >> 32 & _WORD) ^ b ^ low_key, of_c & _WORD
        c, d = (of_a >> 32 & _WORD) ^ d ^ high_key, of_a & _WORD
        low_key, high_key = low_key + 0x9E3779B9 & _WORD, high_key + 0xBB67AE85 & _WORD
    return a, b, c, d


def _uniform_below_one(numbers: Tensor, vocab_size: int) -> Tensor:
    """`[num_rows, vocab_size]` float32 in (0, 1): the numbers of each row's tokens."""
    seed, sequence, position = (numbers[:, column : column + 1] for column in range(3))
    groups = torch.arange(-(-vocab_size // 4), device=numbers.device).expand(len(numbers), -1)
    words = torch.stack(philox(groups, position, sequence, seed), -1).flatten(1)[:, :vocab_size]
    return (words.float() * 2.0**-32 + 2.0**-33).clamp_(max=1.0 - 2.0**-24)


def _changed(own: Tensor, controls: Tensor, starts: Tensor, changes: Tensor, biases: Tensor) -> Tensor:
    """Bias, repetition, then the two penalties that subtract, each on the tokens that are listed."""
    rows = torch.repeat_interleave(torch.arange(len(own), device=own.device), starts.diff())
    token_ids = changes[:, 0].long()
    repetition, presence, frequency = controls[rows, 3:].unbind(1)
    values = own[rows, token_ids] + biases
    repeated = torch.where(values > 0, values / repetition, values * repetition)
    values = torch.where(changes[:, 1] != 0, repeated, values)
    penalty = presence + frequency * changes[:, 2]
    changed = own.clone()
    changed[rows, token_ids] = torch.where(changes[:, 2] > 0, values - penalty, values)
    return changed


def _masked(raced: Tensor, masks: Tensor, mask_rows: Tensor) -> Tensor:
    bits = masks[:, :, None] >> torch.arange(32, device=masks.device, dtype=torch.int32) & 1
    allowed = bits.flatten(1)[:, : raced.shape[1]].bool()
    allowed = torch.cat((allowed, torch.ones_like(raced[:1], dtype=torch.bool)))
    # A negative row counts from the end, where the one that allows all is.
    return raced.masked_fill(~allowed[mask_rows.long().clamp(min=-1)], -torch.inf)


def _kept(raced: Tensor, top_ks: Tensor, controls: Tensor) -> Tensor:
    """What min_p, then top_k, then top_p leave; equal logits in the order of their tokens."""
    temperatures, top_ps, min_ps = (controls[:, column : column + 1] for column in range(3))
    values, order = torch.sort(raced, dim=-1, descending=True, stable=True)
    top = values[:, :1]
    vocab_size = raced.shape[1]
    limits = torch.where(top_ks > 0, top_ks, vocab_size)
    floors = torch.where(min_ps > 0, top + temperatures * torch.log(min_ps), -torch.inf)
    kept = (values >= floors) & (torch.arange(vocab_size, device=raced.device) < limits)
    weights = torch.where(values == top, 1.0, torch.exp((values - top) * (1.0 / temperatures)))
    # Whole numbers, whose sum is the same in any order.
    masses = (weights.nan_to_num(0.0) * 2.0**40).to(torch.int64) * kept
    before = masses.cumsum(-1) - masses
    targets = torch.ceil(top_ps.double() * masses.sum(-1, keepdim=True).double()).clamp_(min=1.0)
    kept &= (before < targets) | (top_ps >= 1.0)
    return torch.zeros_like(kept).scatter_(1, order, kept | (temperatures == 0))


def _first_maximum(scores: Tensor) -> Tensor:
    """Of equal ones the first, which argmax does not promise; 0 where all are NaN."""
    token_ids = torch.arange(scores.shape[1], device=scores.device)
    is_maximum = scores == scores.amax(-1, keepdim=True)
    first = torch.where(is_maximum, token_ids, scores.shape[1]).amin(-1)
    return torch.where(first < scores.shape[1], first, 0)


def _pages(tables: Tensor, num_kv_heads: int) -> Tensor:
    """Name the (block, head) pairs of each sequence: `[num_sequences, num_kv_heads, num_blocks]`."""
    heads = torch.arange(num_kv_heads, device=tables.device, dtype=tables.dtype)
    return tables.unsqueeze(1) * num_kv_heads + heads.view(1, -1, 1)


def _gather(cache: Tensor, pages: Tensor) -> Tensor:
    """Copy pages into `[num_sequences, num_kv_heads, num_blocks * block_size, head_dim]`."""
    gathered = cache.view(-1, cache.shape[2] * cache.shape[3]).index_select(0, pages.view(-1))
    return gathered.view(pages.shape[0], pages.shape[1], -1, cache.shape[3])


def _hidden_from_decode(context_lens: Tensor, num_tokens: int, sliding_window: int | None) -> Tensor:
    """True where a decoding token may not look: `[num_sequences, 1, num_tokens]`."""
    position = torch.arange(num_tokens, device=context_lens.device)
    hidden = position >= context_lens.unsqueeze(1)
    if sliding_window is not None:
        hidden |= position < context_lens.unsqueeze(1) - sliding_window
    return hidden.unsqueeze(1)


def _attention_weights(
    query: Tensor, key: Tensor, hidden: Tensor, scale: float, soft_cap: float | None
) -> Tensor:
    """Softmax of `[n, num_kv_heads, group, head_dim]` queries over `[n, num_kv_heads, context, head_dim]`.

    Hidden keys are written over, not added to: they may be another sequence's, and NaN.

    Returns:
        `[n, num_kv_heads, group, context]` float32.
    """
    scores = torch.matmul(query.float(), key.float().transpose(-1, -2)).mul_(scale)
    if soft_cap is not None:
        scores = scores.div_(soft_cap).tanh_().mul_(soft_cap)
    return torch.softmax(scores.masked_fill_(hidden.unsqueeze(1), float("-inf")), dim=-1)


def _sum_values(
    weights: Tensor, value_cache: Tensor, pages: Tensor, hidden: Tensor, context_lens: Tensor
) -> Tensor:
    """Sum the pages' values by weight, where they lie: `[n, num_heads, head_dim]`.

    A weighted sum of rows is what an embedding bag is. It reads the cache in place, with the weights rounded
    to the cache's dtype and a float32 sum; in bfloat16 that saves a third of the time of gathering and
    multiplying. Instead of a hidden token, whose weight is 0 and whose value may be another sequence's NaN,
    it reads the sequence's last one.
    """
    num_sequences, num_kv_heads, group, context = weights.shape
    block_size, head_dim = value_cache.shape[2:]
    offsets = torch.arange(block_size, device=pages.device, dtype=pages.dtype)
    tokens = (pages.unsqueeze(-1) * block_size + offsets).view(num_sequences, num_kv_heads, context)
    last = (context_lens - 1).clamp(min=0).long().view(-1, 1, 1).expand(-1, num_kv_heads, 1)
    own = torch.where(hidden, tokens.gather(2, last), tokens)
    bags = own.unsqueeze(2).expand(-1, -1, group, -1)
    summed = F.embedding_bag(
        bags.reshape(-1, context),
        value_cache.view(-1, head_dim),
        per_sample_weights=weights.to(value_cache.dtype).view(-1, context),
        mode="sum",
    )
    return summed.view(num_sequences, num_kv_heads * group, head_dim)


def _attend_causally(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """One sequence: `[q, num_heads, head_dim]` over `[num_kv_heads, context, head_dim]`, aligned at the end.

    torch's fused attention keeps scores and sums in float32. The heads that share a key head are its "heads"
    and the key heads its "batch", so keys and values are broadcast, not copied. It knows no soft cap.
    """
    query_len, num_heads, head_dim = query.shape
    num_kv_heads, context_len, _ = key.shape
    group = num_heads // num_kv_heads
    grouped = query.reshape(query_len, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    if soft_cap is not None:
        hidden = ~_causal_mask(query_len, context_len, sliding_window, query.device)
        rows = grouped.flatten(1, 2).unsqueeze(0)
        of_rows = hidden.repeat(group, 1).unsqueeze(0)
        weights = _attention_weights(rows, key.unsqueeze(0), of_rows, scale, soft_cap)[0]
        attended = torch.matmul(weights, value.float()).view(num_kv_heads, group, query_len, head_dim)
        return attended.permute(2, 0, 1, 3).reshape(query_len, num_heads, head_dim).to(query.dtype)
    is_plain = query_len == context_len and (sliding_window is None or sliding_window >= context_len)
    attended = F.scaled_dot_product_attention(
        grouped,
        key.unsqueeze(1).expand(-1, group, -1, -1),
        value.unsqueeze(1).expand(-1, group, -1, -1),
        attn_mask=None if is_plain else _causal_mask(query_len, context_len, sliding_window, query.device),
        is_causal=is_plain,
        scale=scale,
    )
    return attended.permute(2, 0, 1, 3).reshape(query_len, num_heads, head_dim)


def _causal_mask(
    query_len: int, context_len: int, sliding_window: int | None, device: torch.device
) -> Tensor:
    """True where a query may look: `[query_len, context_len]`; the last query is the context's last token."""
    query_position = torch.arange(context_len - query_len, context_len, device=device).unsqueeze(1)
    key_position = torch.arange(context_len, device=device)
    visible = key_position <= query_position
    if sliding_window is not None:
        visible &= key_position > query_position - sliding_window
    return visible


def linear(
    x: Tensor,
    panels: Tensor,
    scales: Tensor | None,
    sums: Tensor | None,
    bias: Tensor | None,
    num_outputs: int,
    has_relu: bool,
    gives_float32: bool,
) -> Tensor:
    weight = panels.transpose(1, 2).flatten(0, 1).flatten(1)[:num_outputs, : x.shape[1]]
    exact = None if bias is None else bias.float()
    product = _int8_product(x, weight, scales) if scales is not None else x.float() @ weight.float().T
    summed = product if exact is None else product + exact
    if has_relu:
        summed = summed.relu_()
    return summed if gives_float32 else summed.to(x.dtype)


def _int8_product(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    rows = x.float()
    largest = rows.abs().amax(dim=1, keepdim=True) if x.shape[1] else rows.new_zeros(x.shape[0], 1)
    values = torch.round(rows * (127 / largest).masked_fill(largest == 0, 0))
    return (values @ weight.float().T) * (scales * (largest / 127))


def panel_rows(
    panels: Tensor,
    scales: Tensor | None,
    indices: Tensor,
    num_outputs: int,
    num_inputs: int,
    gives_float32: bool,
) -> Tensor:
    panel = panels.shape[2]
    # Whole groups are gathered: a fourth of the elements to look up, or half, and never a row's neighbours.
    words = panels.view(torch.int32)[indices // panel, :, indices % panel]
    rows = words.flatten(1).view(panels.dtype)[:, :num_inputs]
    dtype = torch.float32 if gives_float32 else torch.bfloat16
    if scales is None:
        return rows.to(dtype)
    return (rows * scales[indices].unsqueeze(1)).to(dtype)


def add_rows(x: Tensor, table: Tensor, indices: Tensor, offset: int) -> None:
    x += table[indices + offset]


def add(x: Tensor, delta: Tensor) -> None:
    x += delta
