// Paged prefill attention by a warpgroup's products (after Shah et al. 2024, FlashAttention-3), for sm_90a.
//
// Work: block (query head, 128 query tokens of a sequence), as in attention_prefill.cu; each of its two warpgroups has 64
// of the rows. Tiles of 64 keys and values come by cp.async, one tile ahead, each thread putting its runs where the
// swizzle has them, and serve both. Scores are the product of two tiles in shared memory; weights are the first factor
// of the second product in the registers in which the scores came.
// Moves, computes: as attention_prefill.cu; a warpgroup leaves out the tiles that none of its rows sees.
// Takes (bfloat16, HEAD_DIM 128): 128 registers and 97 KB of shared memory, so two blocks a multiprocessor: one's products
// then run beside the other's softmax, which nothing here arranges otherwise. With SOFT_CAP two would spill, hence one.
// Limits: HEAD_DIM 64 and 128, a CACHE of the queries' type. Not measured on a GPU yet.
#include <prefill.cuh>
#include <ptx_hopper.cuh>

constexpr int kWarps = 8;
constexpr int kTileRows = 64;  // of queries of a warpgroup, and of keys and values
constexpr int kQueries = kWarps / 4 * kTileRows;
constexpr int kTileColumns = 64;
constexpr int kTileBytes = kTileRows * kTileColumns * 2;
constexpr int kColumnTiles = HEAD_DIM / kTileColumns;
constexpr int kBlocks = SOFT_CAP && HEAD_DIM > 64 ? 1 : 2;  // of a multiprocessor, for which registers must do

template <class Element>
struct Products;
template <>
struct Products<BFloat16> {
  static __device__ __forceinline__ void tiles(float (&d)[8][4], unsigned long long a, unsigned long long b, bool is_first) {
    wgmma_bf16(d, a, b, is_first);
  }
  static __device__ __forceinline__ void rows(float (&d)[8][4], const unsigned (&a)[4], unsigned long long b) {
    wgmma_bf16_rows(d, a, b);
  }
};
template <>
struct Products<Float16> {
  static __device__ __forceinline__ void tiles(float (&d)[8][4], unsigned long long a, unsigned long long b, bool is_first) {
    wgmma_fp16(d, a, b, is_first);
  }
  static __device__ __forceinline__ void rows(float (&d)[8][4], const unsigned (&a)[4], unsigned long long b) {
    wgmma_fp16_rows(d, a, b);
  }
};

// 64 rows of HEAD_DIM elements, as tiles of 64 columns.
struct Rows {
  unsigned char tiles[kColumnTiles][kTileBytes];

  __device__ __forceinline__ Stored* at(int row, int column) {
    const int run = column % kTileColumns / 8 ^ row % 8;
    return reinterpret_cast<Stored*>(tiles[column / kTileColumns] + row * 128 + run * 16) + column % 8;
  }
  // Columns 16 * step and on, as a product's factor.
  __device__ __forceinline__ unsigned long long columns(int step) const {
    return tile_descriptor(tiles[step / 4] + step % 4 * 32);
  }
  // Rows 16 * step and on, of one tile's columns.
  __device__ __forceinline__ unsigned long long rows(int step, int tile) const {
    return tile_descriptor(tiles[tile] + step * 16 * 128);
  }
};

struct Shared {
  Rows queries[kWarps / 4];
  struct {
    Rows keys, values;
  } stages[2];
};

// Starts to load a tile of keys and values; slots past the context become zeros.
__device__ __forceinline__ void fetch(Rows& keys, Rows& values, const Stored* key_pages, const Stored* value_pages,
                                      const int* table, long long page_stride, int tile, int context_len) {
#pragma unroll 4
  for (int run = threadIdx.x; run < kTileRows * HEAD_DIM / 8; run += kWarps * 32) {
    const int row = run / (HEAD_DIM / 8), column = run % (HEAD_DIM / 8) * 8;
    const int token = tile * kTileRows + row;
    const bool is_context = token < context_len;
    const long long start =
        is_context ? table[token / BLOCK_SIZE] * page_stride + token % BLOCK_SIZE * HEAD_DIM + column : column;
    cp_async_16(keys.at(row, column), key_pages + start, is_context);
    cp_async_16(values.at(row, column), value_pages + start, is_context);
  }
}

// What a warpgroup does with a tile; is_visible(row, token): of the warp's rows and the tile's tokens.
template <class Attended, class IsVisible>
__device__ __forceinline__ void attend(Attended& attended, const Rows& queries, const Rows& keys, const Rows& values,
                                       Scoring score, int lane, IsVisible is_visible) {
  float scores[8][4];
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step)
    Products<ELEMENT>::tiles(scores, queries.columns(step), keys.columns(step), step == 0);
  wgmma_finish(scores);
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      scores[n][i] = is_visible(lane / 4 + i / 2 * 8, n * 8 + lane % 4 * 2 + i % 2) ? score(scores[n][i]) : kHidden;
  attended.weigh(scores, 0);

  unsigned weights[4][4];
#pragma unroll
  for (int step = 0; step < 4; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      weights[step][i] =
          ELEMENT::pack(scores[2 * step + i / 2][i % 2 * 2], scores[2 * step + i / 2][i % 2 * 2 + 1]);
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < 4; ++step)
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile)
      Products<ELEMENT>::rows(reinterpret_cast<float(&)[8][4]>(attended.output[0][tile * 8]), weights[step],
                              values.rows(step, tile));
  wgmma_finish(attended.output[0]);
}

// Parameters as in attention_prefill.cu.
extern "C" __global__ void __launch_bounds__(kWarps * 32, kBlocks)
    prefill(Stored* __restrict__ out, const Stored* __restrict__ query, const Stored* __restrict__ key_cache,
            const Stored* __restrict__ value_cache, const int* __restrict__ query_start,
            const int* __restrict__ context_lens, const int* __restrict__ tables, long long out_stride,
            long long out_head_stride, long long query_stride, long long query_head_stride, long long table_stride,
            int num_sequences, int num_kv_heads, int window, float scale, float value_scale, float soft_cap) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.x, warpgroup = warp / 4;
  Place place;
  if (!find_place<kQueries>(place, query_start, num_sequences, blockIdx.y, lane)) return;
  const int first_row = place.tile * kQueries, context_len = context_lens[place.sequence];
  const long long first_token = query_start[place.sequence] + first_row;
  const int num_rows = query_start[place.sequence + 1] - query_start[place.sequence] - first_row;
  const int position = context_len - num_rows;  // of the block's first row

  Shared& shared = *reinterpret_cast<Shared*>(aligned_dynamic_shared());
  using Elements = Run<ELEMENT, QUERY_RUN>;
  for (int i = threadIdx.x; i < kQueries * HEAD_DIM / QUERY_RUN; i += kWarps * 32) {
    const int row = i / (HEAD_DIM / QUERY_RUN), column = i % (HEAD_DIM / QUERY_RUN) * QUERY_RUN;
    Elements elements = {};
    if (row < num_rows)
      elements = *reinterpret_cast<const Elements*>(query + (first_token + row) * query_stride +
                                                    head * query_head_stride + column);
    *reinterpret_cast<Elements*>(shared.queries[row / kTileRows].at(row % kTileRows, column)) = elements;
  }

  const long long page_stride = static_cast<long long>(num_kv_heads) * BLOCK_SIZE * HEAD_DIM;
  const long long head_start = static_cast<long long>(head / GROUP) * BLOCK_SIZE * HEAD_DIM;
  const Stored *keys = key_cache + head_start, *values = value_cache + head_start;
  const int* table = tables + place.sequence * table_stride;
  const int first_tile = window > 0 ? max(0, position - window + 1) / kTileRows : 0;
  const int past_tile = (min(context_len, position + kQueries) + kTileRows - 1) / kTileRows;

  fetch(shared.stages[0].keys, shared.stages[0].values, keys, values, table, page_stride, first_tile, context_len);
  cp_async_commit();
  AttendedRows<ELEMENT, HEAD_DIM, kTileRows, 1> rows;
  rows.start();
  const int my_position = position + warp * kRows, last_position = position + warpgroup * kTileRows + kTileRows - 1;
  for (int tile = first_tile; tile < past_tile; ++tile) {
    if (tile + 1 < past_tile) {
      auto& next = shared.stages[(tile + 1 - first_tile) % 2];
      fetch(next.keys, next.values, keys, values, table, page_stride, tile + 1, context_len);
    }
    cp_async_commit();
    cp_async_wait<1>();
    fence_for_wgmma();
    __syncthreads();
    const auto& stage = shared.stages[(tile - first_tile) % 2];
    const int first = tile * kTileRows;
    const bool is_inner =
        first + kTileRows <= my_position + 1 && (window == 0 || first > my_position + kRows - 1 - window);
    if (first <= last_position)
      attend(rows, shared.queries[warpgroup], stage.keys, stage.values, Scoring{scale, soft_cap}, lane,
             [&](int row, int token) {
               const int behind = my_position + row - (first + token);
               return is_inner || (behind >= 0 && (window == 0 || behind < window));
             });
    __syncthreads();
  }
  rows.finish();
  Stored* target = out + (first_token + warp * kRows) * out_stride + head * out_head_stride + lane % 4 * 2;
  write_rows<ELEMENT, HEAD_DIM>(target, out_stride, rows, 0, num_rows - warp * kRows, lane, value_scale);
}
