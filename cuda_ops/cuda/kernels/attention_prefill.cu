// Paged prefill attention: several query tokens a sequence, causal, aligned at the end of a context that may have begun
// in earlier chunks (after Dao 2023, FlashAttention-2).
//
// Work: block (query head, tile of 64 * ROW_TILES query tokens of a sequence), the tiles with the longest contexts
// first. Which sequence and tile that is, the block finds from `query_start`: the host knows how many tiles there can be,
// not which, and asks nothing. A warp has ROW_TILES * 16 of the rows; tiles of 32 keys and values come by cp.async, one
// ahead, and serve all warps. Tiles that no row of the block may see are not loaded.
// With a CACHE of float8 the block widens each tile in shared memory first.
// Moves: keys and values once a block, from L2 for all blocks of a kv head but the first.
// Computes 4 * HEAD_DIM FLOP a visible pair; on top of those the halves of diagonal tiles that are hidden.
// Takes (sm_90a, bfloat16, HEAD_DIM 128): 250 registers and 68 KB of shared memory, so two blocks a multiprocessor; 20
// bytes spill on sm_120. HEAD_DIM 256 has one tile of rows a warp instead of two, for its registers.
// Limits: mma.sync, which on Hopper reaches about 60 % of what wgmma does. Not measured on a GPU yet.
#include <prefill.cuh>

constexpr int kTokens = 32;
constexpr int kWarps = 4;
constexpr int kStage = 2 * kTokens * kCachedRow;  // elements: keys and values of a tile as they are loaded
constexpr int kQueries = kWarps * ROW_TILES * kRows;

// Starts to load a tile of keys and values; slots past the context become zeros.
__device__ __forceinline__ void fetch(Cached* stage, const Cached* keys, const Cached* values, const int* table,
                                      long long page_stride, int tile, int context_len) {
#pragma unroll
  for (int run = threadIdx.x; run < kTokens * HEAD_DIM / kCopied; run += kWarps * 32) {
    const int row = run / (HEAD_DIM / kCopied), column = run % (HEAD_DIM / kCopied) * kCopied;
    const int token = tile * kTokens + row;
    const bool is_context = token < context_len;
    const long long start =
        is_context ? table[token / BLOCK_SIZE] * page_stride + token % BLOCK_SIZE * HEAD_DIM + column : column;
    cp_async_16(stage + row * kCachedRow + column, keys + start, is_context);
    cp_async_16(stage + (kTokens + row) * kCachedRow + column, values + start, is_context);
  }
}

// out, query: [num_tokens, num_kv_heads * GROUP, HEAD_DIM] by their strides.  caches: [num_blocks, num_kv_heads,
// BLOCK_SIZE, HEAD_DIM], contiguous.  query_start: [num_sequences + 1].  context_lens: [num_sequences].  tables:
// [num_sequences, ...], rows table_stride apart.  scale, value_scale: as in `decode`.  window: tokens seen, 0 for all.
// soft_cap: of scaled scores, read with SOFT_CAP alone.  QUERY_RUN divides the strides of query.
extern "C" __global__ void __launch_bounds__(kWarps * 32)
    prefill(Stored* __restrict__ out, const Stored* __restrict__ query, const Cached* __restrict__ key_cache,
            const Cached* __restrict__ value_cache, const int* __restrict__ query_start,
            const int* __restrict__ context_lens, const int* __restrict__ tables, long long out_stride,
            long long out_head_stride, long long query_stride, long long query_head_stride, long long table_stride,
            int num_sequences, int num_kv_heads, int window, float scale, float value_scale,
            float soft_cap) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.x;
  Place place;
  if (!find_place<kQueries>(place, query_start, num_sequences, blockIdx.y, lane)) return;
  const int first_row = place.tile * kQueries, context_len = context_lens[place.sequence];
  const long long first_token = query_start[place.sequence] + first_row;
  const int num_rows = query_start[place.sequence + 1] - query_start[place.sequence] - first_row;
  const int position = context_len - num_rows;  // of the block's first row

  Stored* queries = reinterpret_cast<Stored*>(dynamic_shared());
  Cached* stages = reinterpret_cast<Cached*>(queries + kQueries * kRow);
  Stored* widened = reinterpret_cast<Stored*>(stages + 2 * kStage);  // with a CACHE of float8: the tile of this turn
  using Elements = Run<ELEMENT, QUERY_RUN>;
  for (int i = threadIdx.x; i < kQueries * HEAD_DIM / QUERY_RUN; i += kWarps * 32) {
    const int row = i / (HEAD_DIM / QUERY_RUN), column = i % (HEAD_DIM / QUERY_RUN) * QUERY_RUN;
    Elements elements = {};
    if (row < num_rows)
      elements = *reinterpret_cast<const Elements*>(query + (first_token + row) * query_stride +
                                                    head * query_head_stride + column);
    *reinterpret_cast<Elements*>(queries + row * kRow + column) = elements;
  }

  const long long page_stride = static_cast<long long>(num_kv_heads) * BLOCK_SIZE * HEAD_DIM;
  const long long head_start = static_cast<long long>(head / GROUP) * BLOCK_SIZE * HEAD_DIM;
  const Cached *keys = key_cache + head_start, *values = value_cache + head_start;
  const int* table = tables + place.sequence * table_stride;
  const int first_tile = window > 0 ? max(0, position - window + 1) / kTokens : 0;
  const int past_tile = (min(context_len, position + kQueries) + kTokens - 1) / kTokens;

  fetch(stages, keys, values, table, page_stride, first_tile, context_len);
  cp_async_commit();
  __syncthreads();
  const Stored* my_queries = queries + warp * ROW_TILES * kRows * kRow;
  const QueryRows<ELEMENT, HEAD_DIM, ROW_TILES> query_rows(my_queries, lane);
  AttendedRows<ELEMENT, HEAD_DIM, kTokens, ROW_TILES> rows;
  rows.start();
  const int my_position = position + warp * ROW_TILES * kRows;
  for (int tile = first_tile; tile < past_tile; ++tile) {
    if (tile + 1 < past_tile) {
      Cached* next = stages + (tile + 1 - first_tile) % 2 * kStage;
      fetch(next, keys, values, table, page_stride, tile + 1, context_len);
    }
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const Cached* stage = stages + (tile - first_tile) % 2 * kStage;
    if constexpr (kIsFloat8) {
      widen_rows(widened, stage, 2 * kTokens, threadIdx.x, kWarps * 32);
      __syncthreads();
    }
    const Stored* ready = kIsFloat8 ? widened : reinterpret_cast<const Stored*>(stage);
    const int first = tile * kTokens;
    // The same for all rows of the warp: most tiles lie wholly in what each of them sees.
    const bool is_inner = first + kTokens <= my_position + 1 &&
                          (window == 0 || first > my_position + ROW_TILES * kRows - 1 - window);
    rows.attend(query_rows, ready, ready + kTokens * kRow, lane, Scoring{scale, soft_cap}, [&](int row, int token) {
      const int behind = my_position + row - (first + token);
      return is_inner || (behind >= 0 && (window == 0 || behind < window));
    });
    __syncthreads();
  }
  rows.finish();

#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
    const int row = (warp * ROW_TILES + m) * kRows;
    Stored* target = out + (first_token + row) * out_stride + head * out_head_stride + lane % 4 * 2;
    write_rows<ELEMENT, HEAD_DIM>(target, out_stride, rows, m, num_rows - row, lane, value_scale);
  }
}
