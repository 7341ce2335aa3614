// Sums and maxima over a warp and over a block, the same in every lane that gets one, in the same order every time.
#pragma once

// A NaN where there is one.
__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }

// Of each kLanes neighbouring lanes, a power of two; every lane of the warp calls it.
template <int kLanes = 32>
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value = larger(value, __shfl_xor_sync(0xffffffffu, value, distance));
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

template <int kThreads>
__device__ __forceinline__ float block_max(float value, float* scratch) {
  value = warp_max(value);
  if constexpr (kThreads > 32) {
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = scratch[0];
#pragma unroll
    for (int warp = 1; warp < kThreads / 32; ++warp) value = larger(value, scratch[warp]);
    __syncthreads();
  }
  return value;
}
