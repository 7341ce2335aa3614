// The element types of tensors, without CUDA's headers: what a kernel is compiled for is -DELEMENT=<one of them>.
// kLargest: what a row's largest number is scaled to before it is rounded; 0 where rows are not scaled.
#pragma once
#include <ptx.cuh>

struct Float32 {
  using Stored = float;
  static constexpr float kLargest = 0.0f;
  static __device__ __forceinline__ float widen(Stored stored) { return stored; }
  static __device__ __forceinline__ Stored round(float wide) { return wide; }
};

struct BFloat16 {
  using Stored = unsigned short;
  static constexpr float kLargest = 0.0f;
  static __device__ __forceinline__ float widen(Stored stored) {
    return __uint_as_float(static_cast<unsigned>(stored) << 16);
  }
  static __device__ __forceinline__ Stored round(float wide) {
    return static_cast<Stored>(pack_bf16(wide, 0.0f));
  }
  static __device__ __forceinline__ unsigned pack(float low, float high) { return pack_bf16(low, high); }
  static __device__ __forceinline__ unsigned from_halves(unsigned halves) {
    return pack_bf16(fp16_to_float(static_cast<unsigned short>(halves)),
                     fp16_to_float(static_cast<unsigned short>(halves >> 16)));
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    mma_bf16(d, a, b0, b1);
  }
};

struct Float16 {
  using Stored = unsigned short;
  static constexpr float kLargest = 0.0f;
  static __device__ __forceinline__ float widen(Stored stored) { return fp16_to_float(stored); }
  static __device__ __forceinline__ Stored round(float wide) {
    return static_cast<Stored>(pack_fp16(wide, 0.0f));
  }
  static __device__ __forceinline__ unsigned pack(float low, float high) { return pack_fp16(low, high); }
  static __device__ __forceinline__ unsigned from_halves(unsigned halves) { return halves; }
  static __device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    mma_fp16(d, a, b0, b1);
  }
};

// As many elements as one load or store moves: 16 bytes, or one element where rows are not so aligned.
template <class Element, int kCount>
struct alignas(sizeof(typename Element::Stored) * kCount) Run {
  typename Element::Stored elements[kCount];
};
