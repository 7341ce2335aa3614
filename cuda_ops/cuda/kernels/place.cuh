// A token's place in its row by (logit, lower token first), as a whole number: no two are equal, and a larger one is better.
#pragma once

using Place = unsigned long long;

constexpr int kIdBits = 23;
constexpr Place kLastId = (1u << kIdBits) - 1;

// Never 0 for tokens below 2^23 - 1.
__device__ __forceinline__ Place place_of(float logit, int token) {
  const unsigned bits = __float_as_uint(logit + 0.0f);  // -0 and 0 are one
  const unsigned key = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  return static_cast<Place>(key) << kIdBits | (kLastId - static_cast<unsigned>(token));
}

__device__ __forceinline__ int token_at(Place place) { return static_cast<int>(kLastId - (place & kLastId)); }
