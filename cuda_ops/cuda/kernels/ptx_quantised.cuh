// Instructions on pairs of 16-bit floats, for weights that are widened in registers; see ptx.cuh.
// On the CPU the tests put another file of this name in its place.
#pragma once

// a * 1 + b for both halves: architectures before Hopper have no addition of two bfloat16.
__device__ __forceinline__ unsigned add_bf16x2(unsigned a, unsigned b) {
  unsigned sum;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return sum;
}

__device__ __forceinline__ unsigned add_fp16x2(unsigned a, unsigned b) {
  unsigned sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}
