// RMSNorm and LayerNorm of rows, alone or after adding to the residual stream; moments in float32.
//
// Work: a block takes a row, whose elements stay in its registers between the passes: a thread has RUNS runs of
// COUNT elements (16 bytes), THREADS apart. LayerNorm sums squares around the mean, not around zero.
// With an OUTPUT of eight bits the largest result of a row becomes the type's largest number, and `scales` says how much
// one stands for: what a product of eight bits reads, without results in sixteen bits that would be read again.
// Moves: read x, write out; with ADDS_RESIDUAL also read and write the residual. Weight and bias come from L2.
// Limits: a row has at most RUNS * THREADS * COUNT elements, which the host chooses to fit.
#include <quantised.cuh>
#include <reduce.cuh>

using Stored = ELEMENT::Stored;
using Elements = Run<ELEMENT, COUNT>;
using Results = Run<OUTPUT, COUNT>;

// out: [num_rows, size], contiguous.  scales: [num_rows], touched with an OUTPUT of eight bits alone.  x: row r lies at r / per_outer * outer_stride + r % per_outer * inner_stride, so
// that the heads of a projection are rows too.  residual: rows residual_stride apart, touched with ADDS_RESIDUAL alone.
// weight, bias: [size], or null for 1 and 0.  COUNT divides size and the strides.
extern "C" __global__ void __launch_bounds__(THREADS)
    normalise(OUTPUT::Stored* __restrict__ out, float* __restrict__ scales, const Stored* __restrict__ x,
              Stored* __restrict__ residual, const Stored* __restrict__ weight, const Stored* __restrict__ bias,
              long long outer_stride, long long inner_stride, long long residual_stride, int per_outer, int size,
              float eps) {
  __shared__ float scratch[THREADS / 32];
  const long long row = blockIdx.x;
  x += row / per_outer * outer_stride + row % per_outer * inner_stride;
  float wide[RUNS][COUNT];
  float sum = 0.0f;
#pragma unroll
  for (int run = 0; run < RUNS; ++run) {
    const int column = (run * THREADS + threadIdx.x) * COUNT;
    if (column < size) {
      Elements elements = *reinterpret_cast<const Elements*>(x + column);
      if constexpr (ADDS_RESIDUAL) {
        Elements* place = reinterpret_cast<Elements*>(residual + row * residual_stride + column);
        const Elements added = *place;
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
          elements.elements[i] =
              ELEMENT::round(ELEMENT::widen(elements.elements[i]) + ELEMENT::widen(added.elements[i]));
        *place = elements;
      }
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        wide[run][i] = ELEMENT::widen(elements.elements[i]);
        sum += CENTRES ? wide[run][i] : wide[run][i] * wide[run][i];
      }
    }
  }
  sum = block_sum<THREADS>(sum, scratch);
  float mean = 0.0f;
  if constexpr (CENTRES) {
    mean = sum / size;
    sum = 0.0f;
#pragma unroll
    for (int run = 0; run < RUNS; ++run)
      if ((run * THREADS + threadIdx.x) * COUNT < size)
#pragma unroll
        for (int i = 0; i < COUNT; ++i) sum += (wide[run][i] - mean) * (wide[run][i] - mean);
    sum = block_sum<THREADS>(sum, scratch);
  }
  const float scale = rsqrtf(sum / size + eps);
  float largest = 0.0f;
#pragma unroll
  for (int run = 0; run < RUNS; ++run) {
    const int column = (run * THREADS + threadIdx.x) * COUNT;
    if (column < size) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const float factor = weight == nullptr ? 1.0f : ELEMENT::widen(weight[column + i]);
        const float offset = bias == nullptr ? 0.0f : ELEMENT::widen(bias[column + i]);
        wide[run][i] = (wide[run][i] - mean) * scale * factor + offset;
        largest = larger(largest, fabsf(wide[run][i]));
      }
    }
  }
  float inverse = 1.0f;
  if constexpr (OUTPUT::kLargest > 0.0f) {
    largest = block_max<THREADS>(largest, scratch);
    inverse = largest == 0.0f ? 0.0f : OUTPUT::kLargest / largest;
    if (threadIdx.x == 0) scales[row] = largest / OUTPUT::kLargest;
  }
#pragma unroll
  for (int run = 0; run < RUNS; ++run) {
    const int column = (run * THREADS + threadIdx.x) * COUNT;
    if (column < size) {
      Results results;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) results.elements[i] = OUTPUT::round(wide[run][i] * inverse);
      *reinterpret_cast<Results*>(out + row * size + column) = results;
    }
  }
}
