// Rows of activations to e4m3, each on a scale of its own, for a product that torch does.
//
// Work: a block a row; the row is read once for its largest magnitude and again, from the cache, to be rounded.
// Moves: reads x, writes half as much. The rounding is arithmetic on bits, so every architecture compiles it.
#include <element.cuh>

using Stored = ELEMENT::Stored;
using Elements = Run<ELEMENT, COUNT>;

constexpr float kLargest = 448.0f;
constexpr float kTiny = 1.17549435e-38f;  // the smallest normal number: what a row of zeros is divided by

struct alignas(COUNT) Bytes {
  unsigned char bytes[COUNT];
};

// To the nearest of the numbers of e4m3, ties to even; |x| is at most 448, or not finite.
__device__ __forceinline__ unsigned char round_to_e4m3(float x) {
  const unsigned bits = __float_as_uint(x), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) return static_cast<unsigned char>(sign | 0x7fu);
  // Below 2^-6 steps are 2^-9, which is what the last place of 2^14 is worth in float32.
  if (magnitude < 0x3c800000u)
    return static_cast<unsigned char>(
        sign | (__float_as_uint(__uint_as_float(magnitude) + 16384.0f) - __float_as_uint(16384.0f)));
  // Three bits of the fraction stay, and the exponent's bias of 127 becomes 7.
  const unsigned rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u) - (120u << 23);
  return static_cast<unsigned char>(sign | min(rounded >> 20, 0x7eu));
}

// The largest of a block's numbers, NaN where one is; `scratch`: a float a warp.
__device__ __forceinline__ float block_largest(float value, float* scratch) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, value, distance);
    value = other > value || other != other ? other : value;
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0.0f;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) value = scratch[warp] > value || scratch[warp] != scratch[warp] ? scratch[warp] : value;
  return value;
}

// out: [num_rows, size] e4m3, contiguous; scales: [num_rows]; x: rows x_stride apart. COUNT divides size and stride.
extern "C" __global__ void __launch_bounds__(THREADS)
    round_rows(unsigned char* __restrict__ out, float* __restrict__ scales, const Stored* __restrict__ x,
               long long x_stride, int size) {
  __shared__ float scratch[THREADS / 32];
  const long long row = blockIdx.x;
  x += row * x_stride;
  float largest = 0.0f;
  for (int column = threadIdx.x * COUNT; column < size; column += THREADS * COUNT) {
    const Elements elements = *reinterpret_cast<const Elements*>(x + column);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const float magnitude = fabsf(ELEMENT::widen(elements.elements[i]));
      largest = magnitude > largest || magnitude != magnitude ? magnitude : largest;
    }
  }
  const float scale = block_largest(largest, scratch) / kLargest;
  const float divisor = scale < kTiny ? kTiny : scale;
  if (threadIdx.x == 0) scales[row] = divisor;
  for (int column = threadIdx.x * COUNT; column < size; column += THREADS * COUNT) {
    const Elements elements = *reinterpret_cast<const Elements*>(x + column);
    Bytes rounded;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) rounded.bytes[i] = round_to_e4m3(ELEMENT::widen(elements.elements[i]) / divisor);
    *reinterpret_cast<Bytes*>(out + row * size + column) = rounded;
  }
}
