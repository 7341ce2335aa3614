// float8 e4m3 (Micikevicius et al. 2022, "FP8 Formats for Deep Learning"): a sign, four bits of exponent with bias 7,
// three of mantissa; no infinity, NaN is all ones, the largest number 448. Rounded to the nearest, of two to the even
// one; what is larger than 448 becomes 448.
//
// From sm_89 on there are instructions; before, integer arithmetic gives the same codes.
#pragma once
#include <element.cuh>

__device__ __forceinline__ float e4m3_to_float_by_integers(unsigned code) {
  if ((code & 0x7fu) == 0x7fu) return __uint_as_float(0x7fffffffu);
  // As the exponent of a float32 stands there it is 120 too small, of denormals too.
  const float magnitude = __uint_as_float((code & 0x7fu) << 20) * 0x1p120f;
  return __uint_as_float(__float_as_uint(magnitude) | (code & 0x80u) << 24);
}

__device__ __forceinline__ unsigned float_to_e4m3_by_integers(float x) {
  const unsigned bits = __float_as_uint(x), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7fu;
  if (magnitude >= __float_as_uint(448.0f)) return sign | 0x7eu;
  // Denormals are whole multiples of 2^-9, which is what the last place of a float32 at 2^14 counts.
  if (magnitude < __float_as_uint(0x1p-6f))
    return sign | (__float_as_uint(__uint_as_float(magnitude) + 0x1p14f) - __float_as_uint(0x1p14f));
  return sign | ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
}

// Two codes in 16 bits, the first in the lower half.
__device__ __forceinline__ unsigned pack_e4m3(float low, float high) {
  if constexpr (kHasFloat8) return pack_float8(low, high);
  else return float_to_e4m3_by_integers(low) | float_to_e4m3_by_integers(high) << 8;
}

// Two codes as two numbers of a type of 16 bits, each of which has them all.
template <class Element>
__device__ __forceinline__ unsigned unpack_e4m3(unsigned packed) {
  if constexpr (kHasFloat8) return Element::from_halves(unpack_float8(packed));
  else return Element::pack(e4m3_to_float_by_integers(packed & 0xffu), e4m3_to_float_by_integers(packed >> 8 & 0xffu));
}
