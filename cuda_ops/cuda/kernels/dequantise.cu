// Weights of 4 or 8 bits to 16-bit floats, before a product with so many rows that widening once is the least of it.
//
// Work: a warp a tile of 16 outputs by a chunk of 64 inputs, through shared memory so that a row's 128 bytes are written
// together. Moves: the codes, and 2 bytes a weight.
#include <codes.cuh>

using Stored = ELEMENT::Stored;

constexpr int kWarps = 4;
constexpr int kRowLength = kChunk + 8;

// out: [num_outputs, num_inputs], contiguous, in the order of the codes.  codes: as in cuda_ops/quantised.py.  scales:
// [num_groups, 16 * num_tiles]; zeros: the same, read with HAS_ZEROS.  num_inputs % 8 == 0; GROUP: as in
// quantised_linear.cu.
extern "C" __global__ void __launch_bounds__(kWarps * 32)
    dequantise(Stored* __restrict__ out, const uint4* __restrict__ codes, const SCALE::Stored* __restrict__ scales,
               const unsigned char* __restrict__ zeros, int num_inputs, int num_outputs) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_tiles = (num_outputs + kOutputs - 1) / kOutputs;
  const int tile = blockIdx.x * kWarps + warp, chunk = blockIdx.y;
  if (tile >= num_tiles) return;
  Stored* rows = reinterpret_cast<Stored*>(dynamic_shared()) + warp * kOutputs * kRowLength;
  uint4 mine[kWords / 4];
#pragma unroll
  for (int w = 0; w < kWords / 4; ++w)
    mine[w] = codes[(static_cast<long long>(chunk) * num_tiles + tile) * (kTileWords / 4) + w * 32 + lane];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int first = chunk * kChunk + step * 16;
    if (first >= num_inputs) break;  // of the whole warp: there are no groups either
    const int group = GROUP > 0 ? first / (GROUP > 0 ? GROUP : 1) : 0;
    const long long place = static_cast<long long>(group) * num_tiles * kOutputs + tile * kOutputs + lane / 4;
    constexpr unsigned kMiddle = 1u << (BITS - 1);
    const Zero<ELEMENT, BITS> upper(HAS_ZEROS ? zeros[place] : kMiddle), lower(HAS_ZEROS ? zeros[place + 8] : kMiddle);
    const float scale[2] = {SCALE::widen(scales[place]), SCALE::widen(scales[place + 8])};
    unsigned a[4];
    widen_step(a, mine, step, upper, lower);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Stored* target = rows + (lane / 4 + i % 2 * 8) * kRowLength + step * 16 + i / 2 * 8 + lane % 4 * 2;
      const float low = ELEMENT::widen(static_cast<Stored>(a[i] & 0xffffu));
      const float high = ELEMENT::widen(static_cast<Stored>(a[i] >> 16));
      *reinterpret_cast<unsigned*>(target) = ELEMENT::pack(low * scale[i % 2], high * scale[i % 2]);
    }
  }
  __syncwarp();
  for (int i = lane; i < kOutputs * kChunk / 8; i += 32) {
    const int row = i / (kChunk / 8), column = i % (kChunk / 8) * 8;
    const int output = tile * kOutputs + row, input = chunk * kChunk + column;
    if (output < num_outputs && input < num_inputs)
      *reinterpret_cast<uint4*>(out + static_cast<long long>(output) * num_inputs + input) =
          *reinterpret_cast<const uint4*>(rows + row * kRowLength + column);
  }
}
