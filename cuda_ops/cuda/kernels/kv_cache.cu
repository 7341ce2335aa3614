// Each token's key and value into its slot of the paged cache.
//
// Work: a block takes a token; a thread moves COUNT elements (16 bytes) at a time.
// With a CACHE of float8 a number is divided by its scale and rounded on the way.
// Moves: reads and writes keys and values once.
// Limits: a head's row of head_dim elements is the longest run that is written at once.
#include <quantised.cuh>

using Stored = ELEMENT::Stored;
using Cached = CACHE::Stored;
using Elements = Run<ELEMENT, COUNT>;
using Codes = Run<CACHE, COUNT>;

__device__ __forceinline__ void store(Cached* to, const Stored* from, float scale) {
  const Elements elements = *reinterpret_cast<const Elements*>(from);
  if constexpr (CACHE::kLargest > 0.0f) {
    Codes codes;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) codes.elements[i] = CACHE::round(ELEMENT::widen(elements.elements[i]) / scale);
    *reinterpret_cast<Codes*>(to) = codes;
  } else {
    *reinterpret_cast<Elements*>(to) = elements;
  }
}

// key, value: [num_tokens, num_kv_heads, head_dim] by their strides.  caches: [num_blocks, num_kv_heads, block_size,
// head_dim], contiguous.  slots: [num_tokens]; a negative one marks a row that fills up a batch and is not stored.
// scales: what one of the cache stands for, with a CACHE of float8 alone.  COUNT divides head_dim and the strides.
extern "C" __global__ void __launch_bounds__(THREADS)
    write_kv(const Stored* __restrict__ key, const Stored* __restrict__ value, Cached* __restrict__ key_cache,
             Cached* __restrict__ value_cache, const long long* __restrict__ slots, long long key_token_stride,
             long long key_head_stride, long long value_token_stride, long long value_head_stride, int num_kv_heads,
             int block_size, int head_dim, float key_scale, float value_scale) {
  const long long token = blockIdx.x;
  const long long slot = slots[token];
  if (slot < 0) return;
  const long long block = slot / block_size, offset = slot % block_size;
  const int runs = head_dim / COUNT;
  for (int i = threadIdx.x; i < num_kv_heads * runs; i += THREADS) {
    const int head = i / runs, column = i % runs * COUNT;
    const long long target = ((block * num_kv_heads + head) * block_size + offset) * head_dim + column;
    store(key_cache + target, key + token * key_token_stride + head * key_head_stride + column, key_scale);
    store(value_cache + target, value + token * value_token_stride + head * value_head_stride + column, value_scale);
  }
}
