// Sums over a warp and over a block, the same in every lane that gets one, in the same order every time.
#pragma once

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// Every thread of the block calls it; `scratch` is shared memory, one float a warp, free again on return.
template <int kThreads>
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  value = warp_sum(value);
  if constexpr (kThreads > 32) {
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) value += scratch[warp];
    __syncthreads();
  }
  return value;
}
