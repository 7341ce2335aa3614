// Products of 16-bit rows with weights of 4 or 8 bits, for batches so small that reading the weights is what takes time.
//
// Work: block (256 outputs, part of the inputs, tile of ROW_TILES * 8 rows). A warp has two tiles of 16 outputs, which
// are the first factor; rows of x are the second, so one row costs no more than eight. Chunks of 64 inputs come by
// cp.async, STAGES - 1 ahead: the codes once in a block, x for all its warps, and the scales and zeros of the chunk.
// Codes are widened in registers, less their zero, exactly (codes.cuh); sums of a group are float32 and are scaled
// when the group ends, so no weight is rounded. Parts are added by `add_parts` in their order. A row's sums do not
// depend on how many rows there are.
// Moves: codes, scales and zeros once for every ROW_TILES * 8 rows; x once a block, from L2 for all blocks but the first.
// Computes 2 FLOP a weight and row; 64 rows take tensor cores about as long as memory takes for 4-bit codes.
// Takes (sm_90a, bfloat16, 4 bits in groups of 128, 64 rows): 255 registers and 71 KB of shared memory: one block a
// multiprocessor. One row takes 80 registers and 39 KB.
// Limits: mma.sync. Not measured on a GPU yet.
#include <codes.cuh>

using Stored = ELEMENT::Stored;
using StoredScale = SCALE::Stored;

constexpr int kWarps = 8;
constexpr int kTiles = 2;  // of a warp
constexpr int kBlockTiles = kWarps * kTiles;
constexpr int kBlockOutputs = kBlockTiles * kOutputs;
constexpr int kRows = ROW_TILES * 8;
constexpr int kRowLength = kChunk + 8;  // an odd multiple of 16 bytes: eight rows lie in different banks
constexpr int kGroupsOfChunk = GROUP > 0 && GROUP < kChunk ? kChunk / GROUP : 1;
constexpr int kStepsOfGroup = kSteps / kGroupsOfChunk;

struct Stage {
  uint4 codes[kBlockTiles * kTileWords / 4];
  Stored x[kRows * kRowLength];
  StoredScale scales[kGroupsOfChunk * kBlockOutputs];
  unsigned char zeros[HAS_ZEROS ? kGroupsOfChunk * kBlockOutputs : 16];
};

struct Operands {
  const Stored* x;
  const uint4* codes;
  const StoredScale* scales;
  const unsigned char* zeros;
  long long x_stride;
  int num_rows, num_inputs, num_tiles, num_groups;
};

__device__ __forceinline__ int group_of(int chunk) { return GROUP == 0 ? 0 : chunk * kChunk / (GROUP > 0 ? GROUP : 1); }

// Starts to copy a block's share of each group's [16 * num_tiles] numbers of the chunk, zeros where there are none.
template <class Number>
__device__ __forceinline__ void fetch_by_group(Number* shared, const Number* global, const Operands& from, int chunk) {
  constexpr int kRun = 16 / sizeof(Number), kRuns = kBlockOutputs / kRun;
  for (int i = threadIdx.x; i < kGroupsOfChunk * kRuns; i += kWarps * 32) {
    const int group = group_of(chunk) + i / kRuns, output = blockIdx.x * kBlockOutputs + i % kRuns * kRun;
    const bool is_there = group < from.num_groups && output < from.num_tiles * kOutputs;
    const long long place = static_cast<long long>(group) * from.num_tiles * kOutputs + output;
    cp_async_16(shared + i * kRun, global + (is_there ? place : 0), is_there);
  }
}

__device__ __forceinline__ void fetch(Stage& stage, const Operands& from, int chunk) {
  constexpr int kUnits = kTileWords / 4;
#pragma unroll
  for (int i = threadIdx.x; i < kBlockTiles * kUnits; i += kWarps * 32) {
    const int tile = blockIdx.x * kBlockTiles + i / kUnits;
    const bool is_there = tile < from.num_tiles;
    const long long place = (static_cast<long long>(chunk) * from.num_tiles + tile) * kUnits + i % kUnits;
    cp_async_16(stage.codes + i, from.codes + (is_there ? place : 0), is_there);
  }
  for (int i = threadIdx.x; i < kRows * kChunk / 8; i += kWarps * 32) {
    const int row = i / (kChunk / 8), column = i % (kChunk / 8) * 8;
    const int source_row = blockIdx.z * kRows + row, source_column = chunk * kChunk + column;
    const bool is_there = source_row < from.num_rows && source_column < from.num_inputs;
    const long long place = source_row * from.x_stride + source_column;
    cp_async_16(stage.x + row * kRowLength + column, from.x + (is_there ? place : 0), is_there);
  }
  fetch_by_group(stage.scales, from.scales, from, chunk);
  if constexpr (HAS_ZEROS) fetch_by_group(stage.zeros, from.zeros, from, chunk);
}

// A warp's sums: of the group so far, and scaled of the groups before.
struct Sums {
  float group[kTiles][ROW_TILES][4];
  float total[kTiles][ROW_TILES][4];

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int n = 0; n < ROW_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) group[m][n][i] = total[m][n][i] = 0.0f;
  }

  // scales: of the warp's outputs.
  __device__ __forceinline__ void end_group(const StoredScale* scales, int lane) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const float upper = SCALE::widen(scales[m * kOutputs + lane / 4]);
      const float lower = SCALE::widen(scales[m * kOutputs + lane / 4 + 8]);
#pragma unroll
      for (int n = 0; n < ROW_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[m][n][i] += group[m][n][i] * (i < 2 ? upper : lower);
          group[m][n][i] = 0.0f;
        }
    }
  }

  // Adds the products of `kStepsOfGroup` steps from `first` on; zeros: of the warp's outputs.
  __device__ __forceinline__ void multiply(const Stage& stage, const unsigned char* zeros, int first, int warp, int lane) {
    uint4 words[kTiles][kWords / 4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int w = 0; w < kWords / 4; ++w)
        words[m][w] = stage.codes[(warp * kTiles + m) * (kTileWords / 4) + w * 32 + lane];
    const Stored* mine = stage.x + lane % 8 * kRowLength + lane / 8 * 8;
#pragma unroll
    for (int pair = 0; pair < kStepsOfGroup / 2; ++pair) {
      unsigned b[ROW_TILES][4];
#pragma unroll
      for (int n = 0; n < ROW_TILES; ++n) ldmatrix(b[n], mine + n * 8 * kRowLength + (first + 2 * pair) * 16);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        constexpr unsigned kMiddle = 1u << (BITS - 1);
        const Zero<ELEMENT, BITS> upper(HAS_ZEROS ? zeros[m * kOutputs + lane / 4] : kMiddle);
        const Zero<ELEMENT, BITS> lower(HAS_ZEROS ? zeros[m * kOutputs + lane / 4 + 8] : kMiddle);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          unsigned a[4];
          widen_step(a, words[m], first + 2 * pair + s, upper, lower);
#pragma unroll
          for (int n = 0; n < ROW_TILES; ++n) ELEMENT::multiply(group[m][n], a, b[n][2 * s], b[n][2 * s + 1]);
        }
      }
    }
  }
};

__device__ __forceinline__ void multiply_chunk(Sums& sums, const Stage& stage, bool ends_group, int warp, int lane) {
#pragma unroll
  for (int group = 0; group < kGroupsOfChunk; ++group) {
    const int mine = group * kBlockOutputs + warp * kTiles * kOutputs;
    sums.multiply(stage, stage.zeros + (HAS_ZEROS ? mine : 0), group * kStepsOfGroup, warp, lane);
    if (kGroupsOfChunk > 1 || ends_group) sums.end_group(stage.scales + mine, lane);
  }
}

// out: [num_rows, num_outputs], contiguous; parts: [gridDim.y, num_rows, num_outputs], in its place where the inputs are
// in several parts of chunks_of_part chunks, else null.  x: [num_rows, num_inputs], rows x_stride apart, 16-byte aligned.
// codes: as in cuda_ops/quantised.py.  scales: [num_groups, 16 * num_tiles]; zeros: the same, read with HAS_ZEROS.
// bias: [num_outputs] or null.  GROUP: inputs of a group: 0 for all, 32, or a multiple of 64.  num_inputs % 8 == 0.
extern "C" __global__ void __launch_bounds__(kWarps * 32)
    multiply(Stored* __restrict__ out, float* __restrict__ parts, const Stored* __restrict__ x,
             const uint4* __restrict__ codes, const StoredScale* __restrict__ scales,
             const unsigned char* __restrict__ zeros, const Stored* __restrict__ bias, long long x_stride, int num_rows,
             int num_inputs, int num_outputs, int num_groups, int chunks_of_part) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_tiles = (num_outputs + kOutputs - 1) / kOutputs, num_chunks = (num_inputs + kChunk - 1) / kChunk;
  const Operands from = {x, codes, scales, zeros, x_stride, num_rows, num_inputs, num_tiles, num_groups};
  Stage* stages = reinterpret_cast<Stage*>(dynamic_shared());
  const int first = blockIdx.y * chunks_of_part, past = min(first + chunks_of_part, num_chunks);

  Sums sums;
  sums.start();
  for (int ahead = 0; ahead < STAGES - 1; ++ahead) {
    if (first + ahead < past) fetch(stages[ahead], from, first + ahead);
    cp_async_commit();
  }
  for (int chunk = first; chunk < past; ++chunk) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // and everybody is done with the stage that is filled next
    const int next = chunk + STAGES - 1;
    if (next < past) fetch(stages[(next - first) % STAGES], from, next);
    cp_async_commit();
    const bool ends_group = chunk + 1 == past || group_of(chunk + 1) != group_of(chunk);
    multiply_chunk(sums, stages[(chunk - first) % STAGES], ends_group, warp, lane);
  }

#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int output = (blockIdx.x * kBlockTiles + warp * kTiles + m) * kOutputs + lane / 4 + i / 2 * 8;
        const int row = blockIdx.z * kRows + n * 8 + lane % 4 * 2 + i % 2;
        if (output >= num_outputs || row >= num_rows) continue;
        const long long place = static_cast<long long>(row) * num_outputs + output;
        const float sum = sums.total[m][n][i];
        if (parts != nullptr)
          parts[(static_cast<long long>(blockIdx.y) * num_rows) * num_outputs + place] = sum;
        else
          out[place] = ELEMENT::round(bias != nullptr ? sum + ELEMENT::widen(bias[output]) : sum);
      }
}

// out: [num_rows, num_outputs]; parts: [num_parts, num_rows, num_outputs], added in their order; bias: [num_outputs] or
// null. A thread an element.
extern "C" __global__ void __launch_bounds__(kWarps * 32)
    add_parts(Stored* __restrict__ out, const float* __restrict__ parts, const Stored* __restrict__ bias, int num_rows,
              int num_outputs, int num_parts) {
  const long long size = static_cast<long long>(num_rows) * num_outputs;
  const long long place = blockIdx.x * static_cast<long long>(kWarps * 32) + threadIdx.x;
  if (place >= size) return;
  float sum = 0.0f;
  for (int part = 0; part < num_parts; ++part) sum += parts[part * size + place];
  out[place] = ELEMENT::round(bias != nullptr ? sum + ELEMENT::widen(bias[place % num_outputs]) : sum);
}
