// A warp's query rows against tiles of keys and values in shared memory: what decode and prefill share.
//
// Rows of 16-bit elements stand kPadding further apart than they are long, an odd multiple of 16 bytes, so that the
// eight rows that ldmatrix takes at once lie in different banks. With g = lane / 4 and t = lane % 4, a lane has rows g
// and g + 8 of each 16 rows of scores, at columns 2t and 2t + 1 of every eight.
#pragma once
#include <quantised.cuh>

using Stored = ELEMENT::Stored;
using Cached = CACHE::Stored;

constexpr int kPadding = 8;
constexpr int kRows = 16;
constexpr float kHidden = -1e30f;  // a score that weighs nothing; finite, so that differences are no NaN

constexpr bool kIsFloat8 = CACHE::kLargest > 0.0f;
constexpr int kRow = HEAD_DIM + kPadding;
constexpr int kCachedRow = kIsFloat8 ? HEAD_DIM : kRow;  // of keys and values as they are loaded
constexpr int kCopied = 16 / static_cast<int>(sizeof(Cached));  // elements of one asynchronous copy

// Rows of float8 as numbers that the tensor cores take, eight at a time: [num_rows, HEAD_DIM] to [num_rows, kRow]. What
// one of them stands for is multiplied with scores and results.
__device__ __forceinline__ void widen_rows(Stored* to, const Cached* from, int num_rows, int thread, int num_threads) {
  struct alignas(8) Codes {
    unsigned words[2];
  };
  struct alignas(16) Numbers {
    unsigned pairs[4];
  };
  for (int i = thread; i < num_rows * (HEAD_DIM / 8); i += num_threads) {
    const int row = i / (HEAD_DIM / 8), column = i % (HEAD_DIM / 8) * 8;
    const Codes codes = *reinterpret_cast<const Codes*>(from + row * HEAD_DIM + column);
    Numbers numbers;
#pragma unroll
    for (int k = 0; k < 4; ++k) numbers.pairs[k] = unpack_e4m3<ELEMENT>(codes.words[k / 2] >> k % 2 * 16 & 0xffffu);
    *reinterpret_cast<Numbers*>(to + row * kRow + column) = numbers;
  }
}

// From the product of a query and a key to a score, in powers of two: scaled and, with SOFT_CAP, bent towards a largest
// one by tanh(y) = 1 - 2 / (1 + e^2y).
struct Scoring {
  static constexpr float kLog2E = 1.4426950408889634f;
  float scale;  // times log2(e)
  float cap;    // of scaled scores

  __device__ __forceinline__ float operator()(float product) const {
    const float score = product * scale;
    if constexpr (SOFT_CAP)
      return cap * kLog2E * (1.0f - 2.0f / (1.0f + fast_exp2(score * (2.0f / cap))));
    else
      return score;
  }
};

// The queries as the first factor: in registers where they fit there beside the output, else read again for every tile.
template <class Element, int kDim, int kRowTiles>
struct QueryRows {
  static constexpr bool kIsKept = kDim <= 128 && kRowTiles == 1;
  const typename Element::Stored* mine;
  unsigned kept[kIsKept ? kDim / 16 : 1][4];

  // shared: [16 * kRowTiles, kDim + kPadding]
  __device__ __forceinline__ QueryRows(const typename Element::Stored* shared, int lane)
      : mine(shared + (lane % 8 + lane / 8 % 2 * 8) * (kDim + kPadding) + lane / 16 * 8) {
    if constexpr (kIsKept) {
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) ldmatrix(kept[k], mine + k * 16);
    }
  }

  __device__ __forceinline__ void load(unsigned (&part)[4], int tile, int k) const {
    if constexpr (kIsKept) {
#pragma unroll
      for (int i = 0; i < 4; ++i) part[i] = kept[k][i];
    } else {
      ldmatrix(part, mine + tile * kRows * (kDim + kPadding) + k * 16);
    }
  }
};

// A softmax that has seen some of its tokens (Milakov and Gimelshein 2018): weights are relative to the largest score
// so far, in powers of two. A part of keys or values that was loaded from shared memory serves all of the warp's
// kRowTiles tiles of 16 rows: with one, shared memory is what limits, with two the tensor cores are.
template <class Element, int kDim, int kTokens, int kRowTiles>
struct AttendedRows {
  using Stored = typename Element::Stored;
  using Queries = QueryRows<Element, kDim, kRowTiles>;
  float output[kRowTiles][kDim / 8][4];            // the values' sum by weight
  float largest[kRowTiles][2], sum[kRowTiles][2];  // rows g and g + 8; until finish(), `sum` is of this lane's columns

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) output[m][n][i] = 0.0f;
      largest[m][0] = largest[m][1] = kHidden;
      sum[m][0] = sum[m][1] = 0.0f;
    }
  }

  // keys, values: [kTokens, kDim + kPadding] in shared memory.
  // is_visible(row, token): whether this row of the warp looks at a token of the tile.
  template <class IsVisible>
  __device__ __forceinline__ void attend(const Queries& query, const Stored* keys, const Stored* values, int lane,
                                         Scoring score, IsVisible is_visible) {
    float scores[kRowTiles][kTokens / 8][4];
    multiply_keys(scores, query, keys, lane);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          scores[m][n][i] = is_visible(m * kRows + lane / 4 + i / 2 * 8, n * 8 + lane % 4 * 2 + i % 2)
                                ? score(scores[m][n][i])
                                : kHidden;
      weigh(scores[m], m);
    }
    add_values(scores, values, lane);
  }

  // Makes `sum` the rows' whole sum in each of their lanes.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[m][half] += __shfl_xor_sync(0xffffffffu, sum[m][half], 1);
        sum[m][half] += __shfl_xor_sync(0xffffffffu, sum[m][half], 2);
      }
  }

  // Scores to weights; what was summed before is made relative to the new largest score.
  __device__ __forceinline__ void weigh(float (&scores)[kTokens / 8][4], int m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = largest[m][half];
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n)
        highest = fmaxf(highest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      const float shrunk = fast_exp2(largest[m][half] - highest);
      largest[m][half] = highest;
      sum[m][half] *= shrunk;
      // A row that has seen no token yet gives weight to none, and not to all alike.
      const float base = highest == kHidden ? 0.0f : highest;
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[n][i] = fast_exp2(scores[n][i] - base);
          sum[m][half] += scores[n][i];
        }
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        output[m][n][2 * half] *= shrunk;
        output[m][n][2 * half + 1] *= shrunk;
      }
    }
  }

 private:
  __device__ __forceinline__ void multiply_keys(float (&scores)[kRowTiles][kTokens / 8][4], const Queries& query,
                                                const Stored* keys, int lane) {
    const Stored* mine = keys + (lane % 8 + lane / 16 * 8) * (kDim + kPadding) + lane / 8 % 2 * 8;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[m][n][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      unsigned a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) query.load(a[m], m, k);
#pragma unroll
      for (int n = 0; n < kTokens / 16; ++n) {
        unsigned b[4];
        ldmatrix(b, mine + n * 16 * (kDim + kPadding) + k * 16);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          Element::multiply(scores[m][2 * n], a[m], b[0], b[1]);
          Element::multiply(scores[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void add_values(const float (&weights)[kRowTiles][kTokens / 8][4], const Stored* values,
                                             int lane) {
    const Stored* mine = values + (lane % 8 + lane / 8 % 2 * 8) * (kDim + kPadding) + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
      unsigned a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[m][i] = Element::pack(weights[m][2 * k + i / 2][i % 2 * 2], weights[m][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        unsigned b[4];
        ldmatrix_transposed(b, mine + k * 16 * (kDim + kPadding) + n * 16);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          Element::multiply(output[m][2 * n], a[m], b[0], b[1]);
          Element::multiply(output[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
};
