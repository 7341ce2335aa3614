// Types of eight bits that stand for a number by a scale: what -DOUTPUT or -DCACHE of a kernel may be besides -DELEMENT.
#pragma once
#include <float8.cuh>

struct Float8 {
  using Stored = unsigned char;
  static constexpr float kLargest = 448.0f;
  static __device__ __forceinline__ Stored round(float scaled) {
    return static_cast<Stored>(pack_e4m3(scaled, 0.0f));
  }
};

struct Int8 {
  using Stored = signed char;
  static constexpr float kLargest = 127.0f;
  static __device__ __forceinline__ Stored round(float scaled) {
    return static_cast<Stored>(__float2int_rn(fminf(fmaxf(scaled, -kLargest), kLargest)));
  }
};
