// Paged decode attention: one query token a sequence against its whole context.
//
// Work: block (kv head and part of its group, sequence, split). The context's tiles of 16 tokens are dealt out to the
// splits, as many to each as the sequence's own length asks for, so that the grid is the same for every length and a
// graph can keep it: splits without tiles end at once. With splits of a given length a sequence's sums are taken in
// the same order whatever the grid, so that its bits do not depend on the batch. Within a block the tiles go to the
// warps in turn. A warp loads its own tiles by cp.async, STAGES - 1 ahead, and needs no other warp until the end, where
// softmaxes are merged through shared memory. All query heads of a kv head (up to 16 at a time) are rows of the same
// tensor core products: one row or sixteen cost the same, and far less than the load, so there is no second path for
// small groups. A sequence in one split is written to `out`, others in float32 to `partial`, which the last of its
// splits to end adds up, in their order.
//
// With a CACHE of float8 a tile is loaded as codes, half the bytes, and its warp widens it in shared memory before it
// attends to it; three passes through shared memory are then made for one from the cache.
//
// What a grid for the longest context costs short ones: the host asks for four blocks a multiprocessor at most, or one
// split, whatever that context is, and for no more splits than a window has tokens for; so at most that many blocks find
// no tiles. Splits are the grid's last axis: those that always have tiles are started first, and the others read
// one length and end while these are loading. Nothing is launched, zeroed or read for merging that does not happen.
//
// Moves: keys and values once, in runs of 16 * HEAD_DIM elements (4 KB at 128); per split HEAD_DIM + 1 floats a query
// head twice. In flight on a multiprocessor of an H200 at HEAD_DIM 128: 3 blocks * 4 warps * 8 KB = 96 KB, where its
// share of 4.3 TB/s at 700 ns of latency asks for 23 KB.
// Takes (sm_90a, bfloat16, HEAD_DIM 128, groups of 4): 168 registers and 72 KB of shared memory, so three blocks a
// multiprocessor. The limit of 99 KB on sm_89 and sm_120 is why there are two stages.
// Limits: 16-bit elements, BLOCK_SIZE a multiple of 16, HEAD_DIM one of 16. Not measured on a GPU yet.
#include <attention.cuh>

constexpr int kTile = 16;
constexpr int kStage = 2 * kTile * kCachedRow;  // elements: keys and values of a tile as they are loaded
constexpr int kRuns = kTile * HEAD_DIM / kCopied;
// Of a warp: its stages, and with a CACHE of float8 the tile that it attends to.
constexpr int kWarpBytes = STAGES * kStage * static_cast<int>(sizeof(Cached)) +
                           (kIsFloat8 ? 2 * kTile * kRow * static_cast<int>(sizeof(Stored)) : 0);
constexpr int kPart = GROUP < kRows ? GROUP : kRows;  // query heads of a block
constexpr int kParts = (GROUP + kRows - 1) / kRows;
constexpr int kMinTiles = 16;  // of a split: 256 tokens, so that merging stays small

// Which of a sequence's tiles a split has: [first, past), and how many splits have some.
struct Span {
  int first, past;
  int num_used;  // splits that have tiles; a sequence without any counts as one
};

// split_tiles: of each split; 0 deals them out to all.
__device__ __forceinline__ Span span_of(int split, int num_splits, int split_tiles, int context_len, int first_token) {
  const int first = first_token / kTile, past = (context_len + kTile - 1) / kTile;
  const int each = split_tiles > 0 ? split_tiles : max(kMinTiles, (past - first + num_splits - 1) / num_splits);
  return {first + split * each, min(past, first + (split + 1) * each), max(1, (past - first + each - 1) / each)};
}

__device__ __forceinline__ int first_visible(int context_len, int window) {
  return window > 0 ? max(0, context_len - window) : 0;
}

// One warp's tiles, on their way from the cache through shared memory.
struct Pipeline {
  const Cached *keys, *values;  // of the kv head in block 0
  const int* table;
  long long page_stride;  // elements of a block of the cache
  Cached* stages;         // [STAGES, keys and values, kTile, kCachedRow]
  int first, past, context_len, lane;
  int pages;  // lane l: of the warp's tile l, l + 32, ...

  // Starts to load the warp's tile number `turn`, if it has so many; always closes a group of copies.
  __device__ __forceinline__ void fetch(int turn) {
    const int tile = first + turn * WARPS;
    if (tile < past) {
      if (turn % 32 == 0) {
        const int ahead = tile + lane * WARPS;
        pages = ahead < past ? table[ahead * kTile / BLOCK_SIZE] : 0;
      }
      const int page = __shfl_sync(0xffffffffu, pages, turn % 32);
      const long long start = page * page_stride + tile * kTile % BLOCK_SIZE * HEAD_DIM;
      Cached* stage = stages + turn % STAGES * kStage;
#pragma unroll
      for (int i = 0; i < (kRuns + 31) / 32; ++i) {
        const int run = i * 32 + lane, row = run / (HEAD_DIM / kCopied), column = run % (HEAD_DIM / kCopied) * kCopied;
        if (kRuns % 32 != 0 && run >= kRuns) continue;
        const bool is_context = tile * kTile + row < context_len;
        cp_async_16(stage + row * kCachedRow + column, keys + start + run * kCopied, is_context);
        cp_async_16(stage + (kTile + row) * kCachedRow + column, values + start + run * kCopied, is_context);
      }
    }
    cp_async_commit();
  }
};

// What a warp leaves for the others: its rows' sums over its own tiles.
struct Leftover {
  float* outputs;  // [kPart, HEAD_DIM], in the warp's stages
  float* states;   // [kPart, 2]: largest score, sum of weights
};

__device__ __forceinline__ void leave(const AttendedRows<ELEMENT, HEAD_DIM, kTile, 1>& rows, Leftover leftover, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + half * 8;
    if (row < kPart) {
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; ++n) {
        float* place = leftover.outputs + row * HEAD_DIM + n * 8 + lane % 4 * 2;
        place[0] = rows.output[0][n][2 * half];
        place[1] = rows.output[0][n][2 * half + 1];
      }
      if (lane % 4 == 0) {
        leftover.states[row * 2] = rows.largest[0][half];
        leftover.states[row * 2 + 1] = rows.sum[0][half];
      }
    }
  }
}

// Whether all others of `count` blocks have come here before, whose writes this one then sees. Every thread calls it.
__device__ __forceinline__ bool is_last_of(int* arrivals, int count) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(arrivals, 1) == count - 1;
    if (is_last) *arrivals = 0;
  }
  __syncthreads();
  __threadfence();
  return is_last;
}

// One element of a head: the splits' sums, HEAD_DIM apart, by the weights that they stand for.
__device__ __forceinline__ float merge_splits(const float* partial, const float* scales, int count) {
  float largest = kHidden, sum = 0.0f, output = 0.0f;
  for (int split = 0; split < count; ++split) largest = fmaxf(largest, scales[split]);
  for (int split = 0; split < count; ++split) {
    const float weight = fast_exp2(scales[split] - largest);
    sum += weight;
    output += weight * partial[static_cast<long long>(split) * HEAD_DIM];
  }
  return output / sum;
}

// out, query: [num_sequences, num_kv_heads * GROUP, HEAD_DIM] by their strides.  caches: [num_blocks, num_kv_heads,
// BLOCK_SIZE, HEAD_DIM], contiguous.  tables: [num_sequences, ...], rows table_stride apart.  context_lens:
// [num_sequences]; 0 marks a row that fills up a batch and gives zeros.  partial: [num_sequences, heads, splits,
// HEAD_DIM] and scales: [num_sequences, heads, splits] (log2 of the sum of weights); both null with one split.  arrivals: [num_sequences,
// gridDim.x], zero before and after, null with one split.
// scale: of scores, times log2(e) and, with a CACHE of float8, times what one of its keys stands for; value_scale: what
// one of its values does, else 1.  window: tokens that are seen, 0 for all.  split_tiles: as in span_of.  soft_cap: of
// scaled scores, read with SOFT_CAP alone.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    decode(Stored* __restrict__ out, float* partial, float* scales, int* arrivals, const Stored* __restrict__ query, const Cached* __restrict__ key_cache,
           const Cached* __restrict__ value_cache, const int* __restrict__ tables, const int* __restrict__ context_lens,
           long long out_stride, long long out_head_stride, long long query_stride, long long query_head_stride,
           long long table_stride, int num_kv_heads, int window, int split_tiles, float scale,
           float value_scale, float soft_cap) {
  const int sequence = blockIdx.y, kv_head = blockIdx.x / kParts, first_row = blockIdx.x % kParts * kRows;
  const int split = blockIdx.z, num_splits = gridDim.z;
  const int context_len = context_lens[sequence], first_token = first_visible(context_len, window);
  const Span span = span_of(split, num_splits, split_tiles, context_len, first_token);
  if (span.first >= span.past && split > 0) return;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Stored* queries = reinterpret_cast<Stored*>(dynamic_shared());
  unsigned char* of_warps = reinterpret_cast<unsigned char*>(queries + kRows * kRow);
  Cached* stages = reinterpret_cast<Cached*>(of_warps + warp * kWarpBytes);
  Stored* widened = reinterpret_cast<Stored*>(stages + STAGES * kStage);  // [keys and values, kTile, kRow]
  float* states = reinterpret_cast<float*>(of_warps + WARPS * kWarpBytes);
  const long long head_start = static_cast<long long>(kv_head) * BLOCK_SIZE * HEAD_DIM;
  Pipeline pipeline{key_cache + head_start, value_cache + head_start, tables + sequence * table_stride,
                    static_cast<long long>(num_kv_heads) * BLOCK_SIZE * HEAD_DIM, stages, span.first + warp,
                    span.past, context_len, lane, 0};
#pragma unroll
  for (int turn = 0; turn < STAGES - 1; ++turn) pipeline.fetch(turn);

  const int num_rows = min(kPart, GROUP - first_row), first_head = kv_head * GROUP + first_row;
  for (int i = threadIdx.x; i < kRows * HEAD_DIM; i += WARPS * 32) {
    const int row = i / HEAD_DIM, column = i % HEAD_DIM;
    queries[row * kRow + column] =
        row < num_rows ? query[sequence * query_stride + (first_head + row) * query_head_stride + column]
                       : ELEMENT::round(0.0f);
  }
  __syncthreads();

  const QueryRows<ELEMENT, HEAD_DIM, 1> query_rows(queries, lane);
  AttendedRows<ELEMENT, HEAD_DIM, kTile, 1> rows;
  rows.start();
  for (int turn = 0, tile = span.first + warp; tile < span.past; ++turn, tile += WARPS) {
    pipeline.fetch(turn + STAGES - 1);
    cp_async_wait<STAGES - 1>();
    __syncwarp();
    const Cached* stage = stages + turn % STAGES * kStage;
    if constexpr (kIsFloat8) {
      widen_rows(widened, stage, 2 * kTile, lane, 32);
      __syncwarp();
    }
    const Stored* ready = kIsFloat8 ? widened : reinterpret_cast<const Stored*>(stage);
    rows.attend(query_rows, ready, ready + kTile * kRow, lane, Scoring{scale, soft_cap}, [&](int, int token) {
      const int place = tile * kTile + token;
      return place >= first_token && place < context_len;
    });
    __syncwarp();
  }
  rows.finish();
  cp_async_wait<0>();
  leave(rows, {reinterpret_cast<float*>(stages), states + warp * kPart * 2}, lane);
  __syncthreads();

  const int num_heads = num_kv_heads * GROUP;
  for (int i = threadIdx.x; i < num_rows * HEAD_DIM; i += WARPS * 32) {
    const int row = i / HEAD_DIM, column = i % HEAD_DIM;
    float largest = kHidden, sum = 0.0f, output = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) largest = fmaxf(largest, states[(w * kPart + row) * 2]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float weight = fast_exp2(states[(w * kPart + row) * 2] - largest);
      const float* other = reinterpret_cast<const float*>(of_warps + w * kWarpBytes);
      sum += weight * states[(w * kPart + row) * 2 + 1];
      output += weight * other[row * HEAD_DIM + column];
    }
    output = sum == 0.0f ? 0.0f : output / sum * value_scale;  // a NaN stays one
    const int head = first_head + row;
    if (span.num_used == 1) {
      out[sequence * out_stride + head * out_head_stride + column] = ELEMENT::round(output);
    } else {
      const long long place = (static_cast<long long>(sequence) * num_heads + head) * num_splits + split;
      partial[place * HEAD_DIM + column] = output;
      if (column == 0) scales[place] = largest + log2f(sum);
    }
  }
  if (span.num_used == 1) return;

  int* arrived = arrivals + static_cast<long long>(sequence) * gridDim.x + blockIdx.x;
  if (!is_last_of(arrived, span.num_used)) return;
  for (int i = threadIdx.x; i < num_rows * HEAD_DIM; i += WARPS * 32) {
    const int head = first_head + i / HEAD_DIM, column = i % HEAD_DIM;
    const long long first = (static_cast<long long>(sequence) * num_heads + head) * num_splits;
    const float merged = merge_splits(partial + first * HEAD_DIM + column, scales + first, span.num_used);
    out[sequence * out_stride + head * out_head_stride + column] = ELEMENT::round(merged);
  }
}
