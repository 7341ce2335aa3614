// From codes to the first factor of mma.m16n8k16, exactly: a code less its zero is a whole number that 16-bit floats hold.
// A float whose last place is worth 1 takes a code as its last bits, so no conversion is needed: 128 + q in bfloat16,
// 1024 + q in float16, 2^23 + q in float32. The layout of the words: cuda_ops/quantised.py.
#pragma once
#include <element.cuh>
#include <ptx_quantised.cuh>

constexpr int kChunk = 64;   // inputs that are loaded together
constexpr int kOutputs = 16;  // of a tile
constexpr int kSteps = kChunk / 16;
constexpr int kWords = BITS;                // a lane's, of a chunk of a tile
constexpr int kTileWords = 32 * kWords;     // of a chunk of a tile

template <class Element>
struct Units;
template <>
struct Units<BFloat16> {
  static constexpr unsigned kBase = 0x43004300u;  // 128, twice
  static __device__ __forceinline__ unsigned add(unsigned a, unsigned b) { return add_bf16x2(a, b); }
};
template <>
struct Units<Float16> {
  static constexpr unsigned kBase = 0x64006400u;  // 1024, twice
  static __device__ __forceinline__ unsigned add(unsigned a, unsigned b) { return add_fp16x2(a, b); }
};

// A row's zero as it is subtracted.
template <class Element, int kBits>
struct Zero;

template <class Element>
struct Zero<Element, 4> {
  unsigned negative;
  __device__ __forceinline__ explicit Zero(unsigned zero)
      : negative((Units<Element>::kBase | 0x80008000u) | zero * 0x00010001u) {}
  // Nibbles 0 and 4 of `codes`.
  __device__ __forceinline__ unsigned widen(unsigned codes) const {
    return Units<Element>::add((codes & 0x000f000fu) | Units<Element>::kBase, negative);
  }
};

template <class Element>
struct Zero<Element, 8> {
  float raised;
  __device__ __forceinline__ explicit Zero(unsigned zero) : raised(__uint_as_float(0x4b000000u | zero)) {}
  // Bytes 0 and 2.
  __device__ __forceinline__ unsigned widen(unsigned codes) const {
    return Element::pack(__uint_as_float(0x4b000000u | (codes & 0xffu)) - raised,
                         __uint_as_float(0x4b000000u | (codes >> 16 & 0xffu)) - raised);
  }
};

// What a lane holds of the 16 x 16 weights of a step; mine: its words of a chunk, 128 words apart where there are eight.
template <class Element>
__device__ __forceinline__ void widen_step(unsigned (&a)[4], const uint4 (&mine)[kWords / 4], int step,
                                           const Zero<Element, BITS>& upper, const Zero<Element, BITS>& lower) {
  if constexpr (BITS == 4) {
    const unsigned word = step == 0 ? mine[0].x : step == 1 ? mine[0].y : step == 2 ? mine[0].z : mine[0].w;
    a[0] = upper.widen(word);
    a[1] = lower.widen(word >> 4);
    a[2] = upper.widen(word >> 8);
    a[3] = lower.widen(word >> 12);
  } else {
    const uint4 pair = mine[step / 2];
    const unsigned first = step % 2 == 0 ? pair.x : pair.z, second = step % 2 == 0 ? pair.y : pair.w;
    a[0] = upper.widen(first);
    a[1] = lower.widen(first >> 8);
    a[2] = upper.widen(second);
    a[3] = lower.widen(second >> 8);
  }
}
