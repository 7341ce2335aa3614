// Vectors of float as wide as the level's registers, in the compiler's own vector types: one source for
// AVX-512, AVX2, SSE2 and NEON. Storage is float32 or bfloat16, arithmetic always float32.
//
// Included by level.cpp only, inside its unnamed namespace. No templates of the standard library here or in the
// kernels: the linker would keep one copy of an inline function for all levels, perhaps the AVX-512 one.
#pragma once

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
  uint16_t bits;
};

struct Int8 {
  int8_t value;
};

#define INLINE inline __attribute__((always_inline))

INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

INLINE Floats splat(float value) { return value - Floats{}; }

template <class To, class From>
INLINE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  __builtin_memcpy(&result, &value, sizeof result);
  return result;
}

INLINE float widen(float value) { return value; }
INLINE float widen(Int8 value) { return value.value; }
INLINE float widen(BFloat16 value) { return bits_as<float>(static_cast<uint32_t>(value.bits) << 16); }

INLINE Floats load(const float* from) {
  Floats result;
  __builtin_memcpy(&result, from, sizeof result);
  return result;
}

// GCC 12 makes six instructions of these two conversions where the machine has one or two.
#if defined(__AVX512F__)
INLINE Words zero_extend(Halves halves) { return bits_as<Words>(_mm512_cvtepu16_epi32(bits_as<__m256i>(halves))); }
INLINE Halves low_halves(Words words) { return bits_as<Halves>(_mm512_cvtepi32_epi16(bits_as<__m512i>(words))); }
#elif defined(__AVX2__)
INLINE Words zero_extend(Halves halves) { return bits_as<Words>(_mm256_cvtepu16_epi32(bits_as<__m128i>(halves))); }
INLINE Halves low_halves(Words words) {
  const __m256i packed = _mm256_packus_epi32(bits_as<__m256i>(words), _mm256_setzero_si256());
  return bits_as<Halves>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
#else
INLINE Words zero_extend(Halves halves) { return __builtin_convertvector(halves, Words); }
INLINE Halves low_halves(Words words) { return __builtin_convertvector(words, Halves); }
#endif

INLINE Floats load(const BFloat16* from) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof halves);
  return bits_as<Floats>(zero_extend(halves) << 16);
}

// Rounds to nearest even; a NaN stays one.
INLINE void store(BFloat16* to, Floats values) {
  const Words bits = bits_as<Words>(values);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words kept = (values == values) ? rounded : ((bits >> 16) | 0x40);
  const Halves halves = low_halves(kept);
  __builtin_memcpy(to, &halves, sizeof halves);
}

INLINE void store(float* to, Floats values) { __builtin_memcpy(to, &values, sizeof values); }

// The first `count` lanes; the rest is 0, and memory behind them stays untouched.
template <class T>
INLINE Floats load_part(const T* from, int64_t count) {
  T padded[kLanes] = {};
  __builtin_memcpy(padded, from, count * sizeof(T));
  return load(padded);
}

template <class T>
INLINE void store_part(T* to, Floats values, int64_t count) {
  T padded[kLanes];
  store(padded, values);
  __builtin_memcpy(to, padded, count * sizeof(T));
}

template <class T>
INLINE T narrow(float value) {
  T result[kLanes];
  store(result, splat(value));
  return result[0];
}

// Rows between memory of any stride and float32 scratch, which is padded with zeros to whole vectors.
template <class T>
INLINE void read_row(float* to, const T* from, int64_t stride, int64_t count) {
  if (stride != 1) {
    for (int64_t i = 0; i < round_up(count); ++i) to[i] = i < count ? widen(from[i * stride]) : 0.0f;
    return;
  }
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store(to + i, load_part(from + i, count - i));
}

template <class T>
INLINE void write_row(T* to, int64_t stride, const float* from, int64_t count) {
  if (stride != 1) {
    for (int64_t i = 0; i < count; ++i) to[i * stride] = narrow<T>(from[i]);
    return;
  }
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store_part(to + i, load(from + i), count - i);
}

// Segments of `kLength` lanes: `low` keeps the even ones of a and puts those of b after each, `high` does so
// with the odd ones. Transposing and summing across lanes are both made of this pair.
template <int kLength>
INLINE Ints low_order() {
  Ints order{};
  for (int j = 0; j < kLanes; ++j) order[j] = j / kLength % 2 ? kLanes + j - kLength : j;
  return order;
}

template <int kLength>
INLINE Ints high_order() {
  Ints order{};
  for (int j = 0; j < kLanes; ++j) order[j] = j / kLength % 2 ? kLanes + j : j + kLength;
  return order;
}

template <int kLength>
INLINE Floats low(Floats a, Floats b) { return __builtin_shuffle(a, b, low_order<kLength>()); }

template <int kLength>
INLINE Floats high(Floats a, Floats b) { return __builtin_shuffle(a, b, high_order<kLength>()); }

// Lane i of the result is the sum over rows[i]; rows is used up.
template <int kLength = kLanes / 2>
INLINE Floats sums_of(Floats* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLength; ++i) {
    rows[i] = low<kLength>(rows[i], rows[i + kLength]) + high<kLength>(rows[i], rows[i + kLength]);
  }
  if constexpr (kLength == 1) return rows[0];
  else return sums_of<kLength / 2>(rows);
}

// rows[kLanes] becomes its transpose.
template <int kLength = kLanes / 2>
INLINE void transpose(Floats* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kLength) continue;
    const Floats a = rows[i], b = rows[i + kLength];
    rows[i] = low<kLength>(a, b);
    rows[i + kLength] = high<kLength>(a, b);
  }
  if constexpr (kLength > 1) transpose<kLength / 2>(rows);
}

INLINE float sum_of(Floats values) {
  float lanes[kLanes];
  store(lanes, values);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

INLINE float max_of_lanes(Floats values) {
  float lanes[kLanes];
  store(lanes, values);
  for (int i = 1; i < kLanes; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}

// e^x within 2 units in the last place; 0 below -87.3, where float32 would turn denormal. Range reduction by
// Cody and Waite: x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial in r.
INLINE Floats exponential(Floats x) {
  const Floats lowest = splat(-87.3f), highest = splat(88.3f);
  Floats clamped = x < lowest ? lowest : x;  // written so that a NaN stays one
  clamped = clamped > highest ? highest : clamped;
  // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the lowest bits.
  const Floats shifted = clamped * 1.44269504f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;
  const Floats r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Words scaled = bits_as<Words>(p) + (bits_as<Words>(shifted) << 23);
  return x < lowest ? Floats{} : bits_as<Floats>(scaled);
}

INLINE float exponential(float x) { return exponential(splat(x))[0]; }

// Float32 working memory of one call, aligned for whole vectors.
class Scratch {
 public:
  explicit Scratch(int64_t capacity)
      : memory_(static_cast<float*>(__builtin_malloc(capacity * sizeof(float) + 64))),
        next_(memory_ + (64 - reinterpret_cast<uintptr_t>(memory_) % 64) / sizeof(float)),
        end_(memory_ + capacity + 16) {
    if (memory_ == nullptr) __builtin_abort();
  }
  ~Scratch() { __builtin_free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* take(int64_t count) {
    float* taken = next_;
    next_ += round_up(count);
    if (next_ > end_) __builtin_abort();
    return taken;
  }

 private:
  float* memory_;
  float* next_;
  float* end_;
};
