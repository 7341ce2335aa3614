// What kernels of prefill share, however they multiply: which queries a block has, and how they are written.
#pragma once
#include <attention.cuh>

struct Place {
  int sequence, tile;
};

// Which tile of kQueries queries of which sequence is the block's, the same in all lanes; false where there are not so
// many.
template <int kQueries>
__device__ __forceinline__ bool find_place(Place& place, const int* query_start, int num_sequences, int wanted, int lane) {
  for (int first = 0; first < num_sequences; first += 32) {
    const int sequence = first + lane;
    const int length = sequence < num_sequences ? query_start[sequence + 1] - query_start[sequence] : 0;
    const int tiles = (length + kQueries - 1) / kQueries;
    int past = tiles;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, past, distance);
      if (lane >= distance) past += before;
    }
    const unsigned later = __ballot_sync(0xffffffffu, past > wanted);
    if (later != 0) {
      const int owner = __ffs(later) - 1;
      place = {first + owner, __shfl_sync(0xffffffffu, past - 1 - wanted, owner)};
      return true;
    }
    wanted -= __shfl_sync(0xffffffffu, past, 31);
  }
  return false;
}

// Writes a warp's row tile m, divided by its sums and times what 1 of a value stands for; target: this lane's place in the tile's row 0; rows past num_rows are
// nobody's.
template <class Element, int kDim, class Rows>
__device__ __forceinline__ void write_rows(typename Element::Stored* target, long long stride, const Rows& rows, int m,
                                           int num_rows, int lane, float value_scale) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + half * 8;
    if (row >= num_rows) continue;
    const float factor = value_scale / rows.sum[m][half];
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
      *reinterpret_cast<unsigned*>(target + row * stride + n * 8) =
          Element::pack(rows.output[m][n][2 * half] * factor, rows.output[m][n][2 * half + 1] * factor);
  }
}
