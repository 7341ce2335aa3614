// silu(gate) * up, or with IS_GELU gelu(gate) * up by its tanh form, for rows [gate | up]; in float32, rounded once.
//
// Work: block (row, part) takes THREADS * COUNT elements of a row; a thread makes COUNT of them (16 bytes).
// Moves: 3 * size elements a row, each once, so it runs at the memory's speed from a few hundred rows up.
// Limits: for a handful of rows the launch itself is what is paid for.
#include <element.cuh>

using Stored = ELEMENT::Stored;
using Elements = Run<ELEMENT, COUNT>;

// Both are x times a logistic function: (1 + tanh(u)) / 2 is 1 / (1 + exp(-2u)).
__device__ __forceinline__ float activate(float x) {
  const float exponent = IS_GELU ? 1.5957691216f * (x + 0.044715f * x * x * x) : x;  // 2 * sqrt(2 / pi)
  return x / (1.0f + __expf(-exponent));
}

// out: [num_rows, size], contiguous.  x: [num_rows, 2 * size], rows x_stride apart.  COUNT divides size and x_stride.
extern "C" __global__ void __launch_bounds__(THREADS)
    activate_and_mul(Stored* __restrict__ out, const Stored* __restrict__ x, long long x_stride, int size) {
  const int column = (blockIdx.y * THREADS + threadIdx.x) * COUNT;
  if (column >= size) return;
  const long long row = blockIdx.x;
  const Elements gate = *reinterpret_cast<const Elements*>(x + row * x_stride + column);
  const Elements up = *reinterpret_cast<const Elements*>(x + row * x_stride + size + column);
  Elements result;
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    result.elements[i] =
        ELEMENT::round(activate(ELEMENT::widen(gate.elements[i])) * ELEMENT::widen(up.elements[i]));
  *reinterpret_cast<Elements*>(out + row * size + column) = result;
}
