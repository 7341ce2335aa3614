// silu(gate) * up for rows [gate | up], in float32, rounded once.
//
// Work: block (row, part) takes THREADS * COUNT elements of a row; a thread makes COUNT of them (16 bytes).
// Moves: 3 * size elements a row, each once, so it runs at the memory's speed from a few hundred rows up.
// Limits: for a handful of rows the launch itself is what is paid for.
#include <element.cuh>

using Stored = ELEMENT::Stored;
using Elements = Run<ELEMENT, COUNT>;

// out: [num_rows, size], contiguous.  x: [num_rows, 2 * size], rows x_stride apart.  COUNT divides size and x_stride.
extern "C" __global__ void __launch_bounds__(THREADS)
    silu_and_mul(Stored* __restrict__ out, const Stored* __restrict__ x, long long x_stride, int size) {
  const int column = (blockIdx.y * THREADS + threadIdx.x) * COUNT;
  if (column >= size) return;
  const long long row = blockIdx.x;
  const Elements gate = *reinterpret_cast<const Elements*>(x + row * x_stride + column);
  const Elements up = *reinterpret_cast<const Elements*>(x + row * x_stride + size + column);
  Elements result;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const float wide = ELEMENT::widen(gate.elements[i]);
    result.elements[i] = ELEMENT::round(wide / (1.0f + __expf(-wide)) * ELEMENT::widen(up.elements[i]));
  }
  *reinterpret_cast<Elements*>(out + row * size + column) = result;
}
