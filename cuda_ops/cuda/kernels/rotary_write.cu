// The heads of a step's tokens on their way to attention: queries and keys normalised (with NORMS) and rotated in
// float32, rounded once; queries in place, keys and values into their slots of the paged cache, with a CACHE of float8
// divided by their scale.
//
// Work: LANES lanes take a head, a block THREADS / LANES heads of one token: queries, then keys, then values. A lane has
// runs of COUNT elements (16 bytes) of the first half of what turns and the runs that turn with them, so that norm and
// rotation happen in its registers; what does not turn follows. A head at HEAD_DIM 128 is 8 lanes with two loads each.
// Moves: reads queries, keys and values once, and writes them once; the token's angles (float32, [cosines | sines])
// come from L1 for all its heads but the first.
// Limits: a short launch for decode, where it costs what a launch costs: it takes the place of two, or of four with
// norms. Registers: cuda_ops/cuda/resources.json.
#include <quantised.cuh>
#include <reduce.cuh>

using Stored = ELEMENT::Stored;
using Cached = CACHE::Stored;
using Elements = Run<ELEMENT, COUNT>;
using Codes = Run<CACHE, COUNT>;
using Angles = Run<Float32, ANGLE_COUNT>;

constexpr int kPairs = HALF / COUNT, kTails = (HEAD_DIM - 2 * HALF) / COUNT;
constexpr int kPairRounds = (kPairs + LANES - 1) / LANES, kTailRounds = (kTails + LANES - 1) / LANES;

// Of what there is none, an array of one that nothing touches.
constexpr int kPairsKept = kPairRounds > 0 ? kPairRounds : 1, kTailsKept = kTailRounds > 0 ? kTailRounds : 1;

// A lane's part of a head.
struct Part {
  float first[kPairsKept][COUNT], second[kPairsKept][COUNT], tail[kTailsKept][COUNT];

  // Calls visit(column, values) for each run that is this lane's.
  template <class Visit>
  __device__ __forceinline__ void each_run(int lane, Visit visit) {
#pragma unroll
    for (int round = 0; round < kPairRounds; ++round) {
      const int pair = round * LANES + lane;
      if (pair < kPairs) {
        visit(pair * COUNT, first[round]);
        visit(HALF + pair * COUNT, second[round]);
      }
    }
#pragma unroll
    for (int round = 0; round < kTailRounds; ++round) {
      const int run = round * LANES + lane;
      if (run < kTails) visit(2 * HALF + run * COUNT, tail[round]);
    }
  }

  __device__ __forceinline__ void rotate(int lane, const float* angles) {
#pragma unroll
    for (int round = 0; round < kPairRounds; ++round) {
      const int column = (round * LANES + lane) * COUNT;
      if (column < HALF) {
#pragma unroll
        for (int i = 0; i < COUNT; i += ANGLE_COUNT) {
          const Angles cosines = *reinterpret_cast<const Angles*>(angles + column + i);
          const Angles sines = *reinterpret_cast<const Angles*>(angles + HALF + column + i);
#pragma unroll
          for (int k = 0; k < ANGLE_COUNT; ++k) {
            const float x = first[round][i + k], y = second[round][i + k];
            first[round][i + k] = x * cosines.elements[k] - y * sines.elements[k];
            second[round][i + k] = y * cosines.elements[k] + x * sines.elements[k];
          }
        }
      }
    }
  }
};

// query: [num_tokens, num_heads, HEAD_DIM], key and value: [num_tokens, num_kv_heads, HEAD_DIM], by their strides.
// cos_sin: [num_tokens, 2 * HALF], rows angle_stride apart.  weights: [HEAD_DIM], null for no norm, touched with NORMS
// alone.  caches: [num_blocks, num_kv_heads, block_size, HEAD_DIM], contiguous.  slots: [num_tokens]; a negative one marks
// a row that fills up a batch and is not stored.  scales: what one of the cache stands for; 1 with a CACHE that is no
// float8.  COUNT divides HALF, HEAD_DIM and the strides, ANGLE_COUNT divides COUNT
// and angle_stride.
extern "C" __global__ void __launch_bounds__(THREADS)
    rotary_write_kv(Stored* query, const Stored* key, const Stored* value, const float* __restrict__ cos_sin,
                    const Stored* __restrict__ query_weight, const Stored* __restrict__ key_weight,
                    Cached* __restrict__ key_cache, Cached* __restrict__ value_cache,
                    const long long* __restrict__ slots, long long query_token_stride, long long query_head_stride,
                    long long key_token_stride, long long key_head_stride, long long value_token_stride,
                    long long value_head_stride, long long angle_stride, int num_heads, int num_kv_heads,
                    int block_size, float eps, float key_scale, float value_scale) {
  const long long token = blockIdx.x;
  const int lane = threadIdx.x % LANES, place = blockIdx.y * (THREADS / LANES) + threadIdx.x / LANES;
  const bool is_query = place < num_heads, is_key = !is_query && place < num_heads + num_kv_heads;
  const int head = is_query ? place : (place - num_heads) % num_kv_heads;
  const long long slot = is_query ? 0 : slots[token];
  // Lanes without a head stay, for the sums of those beside them.
  const bool is_wanted = place < num_heads + 2 * num_kv_heads && slot >= 0;
  const Stored* from = is_query ? query + token * query_token_stride + head * query_head_stride
                       : is_key ? key + token * key_token_stride + head * key_head_stride
                                : value + token * value_token_stride + head * value_head_stride;
  const long long row = (slot / block_size * num_kv_heads + head) * block_size + slot % block_size;
  Cached* to = (is_key ? key_cache : value_cache) + row * HEAD_DIM;
  const float scale_of_one = is_key ? key_scale : value_scale;

  Part part;
  float sum = 0.0f;
  part.each_run(lane, [&](int column, float(&values)[COUNT]) {
    Elements elements{};
    if (is_wanted) elements = *reinterpret_cast<const Elements*>(from + column);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      values[i] = ELEMENT::widen(elements.elements[i]);
      sum += values[i] * values[i];
    }
  });
  if constexpr (NORMS) {
    const float scale = rsqrtf(warp_sum<LANES>(sum) / HEAD_DIM + eps);
    const Stored* weight = is_query ? query_weight : is_key ? key_weight : nullptr;
    if (weight != nullptr)
      part.each_run(lane, [&](int column, float(&values)[COUNT]) {
        const Elements gains = *reinterpret_cast<const Elements*>(weight + column);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) values[i] *= scale * ELEMENT::widen(gains.elements[i]);
      });
  }
  if (!is_wanted) return;
  if (is_query || is_key) part.rotate(lane, cos_sin + token * angle_stride);
  part.each_run(lane, [&](int column, float(&values)[COUNT]) {
    if (is_query) {
      Elements elements;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) elements.elements[i] = ELEMENT::round(values[i]);
      *reinterpret_cast<Elements*>(query + token * query_token_stride + head * query_head_stride + column) = elements;
    } else {
      Codes codes;
#pragma unroll
      for (int i = 0; i < COUNT; ++i)
        codes.elements[i] = CACHE::round(CACHE::kLargest > 0.0f ? values[i] / scale_of_one : values[i]);
      *reinterpret_cast<Codes*>(to + column) = codes;
    }
  });
}
