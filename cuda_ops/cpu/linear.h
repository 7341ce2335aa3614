// Products of rows with a weight that is laid out in panels of 32 outputs:
//
//   weight [panels, groups, 32, n]   n inputs of one output fill 32 bits: 1 float32, 2 bfloat16, 4 int8
//
// A tile is up to kMaxRows rows times one panel. Its sums stay in registers over all inputs: a group's 32 words are
// loaded once for all rows, and each row's word is broadcast. A panel is one run of memory, read from there by the
// first tile and from the cache by the others, so one row runs at the memory's speed, many at the arithmetic's.
//
// int8 rows are kept as value + 128, the unsigned side of the byte product; `sums` takes that off again.
#pragma once

constexpr int kPanel = 32;
constexpr int kVectors = kPanel / kLanes;
constexpr int kMaxRows = kLanes == 16 ? 14 : kLanes == 8 ? 2 : 1;  // sums and operands fill the registers
constexpr int64_t kPrefetchBytes = 4096;                           // ahead; the hardware stops at a page's end

INLINE Words splat_word(const char* from) {
  uint32_t word;
  __builtin_memcpy(&word, from, sizeof word);
  return word + Words{};
}

INLINE Words load_words(const char* from) {
  Words result;
  __builtin_memcpy(&result, from, sizeof result);
  return result;
}

// How words of x and weight are multiplied and added up.
template <class Weight>
struct WordProduct;

template <>
struct WordProduct<float> {
  typedef Floats Sum;
  static INLINE Sum add(Sum sum, Words x, Words weight) { return bits_as<Floats>(x) * bits_as<Floats>(weight) + sum; }
};

template <>
struct WordProduct<BFloat16> {
  typedef Floats Sum;
  static INLINE Sum add(Sum sum, Words x, Words weight) {
#if defined(__AVX512BF16__)
    return bits_as<Floats>(_mm512_dpbf16_ps(bits_as<__m512>(sum), bits_as<__m512bh>(x), bits_as<__m512bh>(weight)));
#else
    sum += bits_as<Floats>(x << 16) * bits_as<Floats>(weight << 16);
    return bits_as<Floats>(x & 0xffff0000u) * bits_as<Floats>(weight & 0xffff0000u) + sum;
#endif
  }
};

template <>
struct WordProduct<Int8> {
  typedef Ints Sum;
  static INLINE Sum add(Sum sum, Words x, Words weight) {
#if defined(__AVX512VNNI__)
    return bits_as<Ints>(_mm512_dpbusd_epi32(bits_as<__m512i>(sum), bits_as<__m512i>(x), bits_as<__m512i>(weight)));
#else
    // Every second byte, widened to 16 bits: products of bytes, added in pairs, would not fit those.
    const Words even = bits_as<Words>((bits_as<Shorts>(weight) << 8) >> 8), odd = bits_as<Words>(bits_as<Shorts>(weight) >> 8);
    return sum + dot_shorts(x & 0x00ff00ffu, even) + dot_shorts((x >> 8) & 0x00ff00ffu, odd);
#endif
  }

 private:
  typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));

  static INLINE Ints dot_shorts(Words a, Words b) {
#if defined(__AVX512BW__)
    return bits_as<Ints>(_mm512_madd_epi16(bits_as<__m512i>(a), bits_as<__m512i>(b)));
#elif defined(__AVX2__)
    return bits_as<Ints>(_mm256_madd_epi16(bits_as<__m256i>(a), bits_as<__m256i>(b)));
#else
    const Ints x = bits_as<Ints>(a), y = bits_as<Ints>(b);
    return ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
  }
};

// What a tile's sums become outputs with; of one vector of outputs, `count` of which exist.
struct Epilogue {
  const LinearArguments* arguments;
  int64_t output;
  int64_t count;
  Floats bias;
  Floats scales;
  Ints sums;

  template <class T>
  static INLINE Epilogue load_for(const LinearArguments& arguments, int64_t output) {
    Epilogue result{&arguments, output, min_of(kLanes, arguments.num_outputs - output), {}, {}, {}};
    if (result.count <= 0) return result;
    if (arguments.bias != nullptr) result.bias = load_upto(static_cast<const T*>(arguments.bias) + output, result.count);
    if (arguments.scales == nullptr) return result;
    result.scales = load_upto(arguments.scales + output, result.count);
    result.sums = bits_as<Ints>(load_upto(reinterpret_cast<const float*>(arguments.sums) + output, result.count));
    return result;
  }

  INLINE Floats finish(Floats sum, int64_t) const { return sum + bias; }
  INLINE Floats finish(Ints sum, int64_t row) const {
    return __builtin_convertvector(sum - sums, Floats) * (scales * arguments->x_scales[row]) + bias;
  }

  template <class T>
  INLINE void store_row(int64_t row, Floats values) const {
    T* out = static_cast<T*>(arguments->out) + row * arguments->num_outputs + output;
    if (count == kLanes) store(out, values);
    else store_part(out, values, count);
  }

 private:
  template <class T>
  static INLINE Floats load_upto(const T* from, int64_t count) {
    return count == kLanes ? load(from) : load_part(from, count);
  }
};

template <class T, class Weight>
void finish_tile(const LinearArguments& arguments, const typename WordProduct<Weight>::Sum* sums, int64_t row,
                 int64_t num_rows, int64_t panel) {
  for (int i = 0; i < kVectors; ++i) {
    const Epilogue epilogue = Epilogue::load_for<T>(arguments, panel * kPanel + i * kLanes);
    if (epilogue.count <= 0) return;
    for (int64_t r = 0; r < num_rows; ++r) {
      Floats values = epilogue.finish(sums[r * kVectors + i], row + r);
      if (arguments.has_relu) values = values < Floats{} ? Floats{} : values;  // a NaN stays one
      if (arguments.writes_float32) epilogue.store_row<float>(row + r, values);
      else epilogue.store_row<T>(row + r, values);
    }
  }
}

// Leaves the sums of kRows rows in `results`, row by row.
template <int kRows, class Weight>
void multiply_tile(const LinearArguments& arguments, typename WordProduct<Weight>::Sum* results, int64_t row,
                   int64_t panel) {
  typename WordProduct<Weight>::Sum sums[kRows][kVectors] = {};
  const int64_t stride = arguments.x_stride_bytes;
  const char* x = static_cast<const char*>(arguments.x) + row * stride;
  const char* weight = static_cast<const char*>(arguments.weight) + panel * arguments.num_groups * kPanel * 4;
  for (int64_t group = 0; group < arguments.num_groups; ++group, x += 4, weight += kPanel * 4) {
    Words weights[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) weights[i] = load_words(weight + i * kLanes * 4);
    __builtin_prefetch(weight + kPrefetchBytes);
    __builtin_prefetch(weight + kPrefetchBytes + 64);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Words word = splat_word(x + r * stride);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) sums[r][i] = WordProduct<Weight>::add(sums[r][i], word, weights[i]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) results[r * kVectors + i] = sums[r][i];
  }
}

template <int kRows, class Weight>
INLINE void multiply_rows(const LinearArguments& arguments, typename WordProduct<Weight>::Sum* results, int64_t row,
                          int64_t count, int64_t panel) {
  if (count == kRows) return multiply_tile<kRows, Weight>(arguments, results, row, panel);
  if constexpr (kRows > 1) multiply_rows<kRows - 1, Weight>(arguments, results, row, count, panel);
}

template <class T, class Weight>
void linear(const LinearArguments& arguments, int64_t begin, int64_t end) {
  typename WordProduct<Weight>::Sum results[kMaxRows * kVectors];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t panel = item % arguments.num_panels;
    const int64_t first = item / arguments.num_panels * arguments.block_rows;
    const int64_t last = min_of(first + arguments.block_rows, arguments.num_rows);
    // Tiles of nearly equal height: a short last one would leave the arithmetic idle.
    const int64_t tiles = (last - first + kMaxRows - 1) / kMaxRows;
    const int64_t height = (last - first + tiles - 1) / tiles;
    for (int64_t row = first; row < last; row += height) {
      const int64_t count = min_of(height, last - row);
      multiply_rows<kMaxRows, Weight>(arguments, results, row, count, panel);
      finish_tile<T, Weight>(arguments, results, row, count, panel);
    }
  }
}

INLINE Floats magnitude(Floats values) { return bits_as<Floats>(bits_as<Words>(values) & 0x7fffffffu); }

// Nearest whole numbers, ties to even, plus 128: adding 1.5 * 2^23 leaves them in the lowest bits.
INLINE void store_bytes(uint8_t* to, Floats values) {
  const Words rounded = bits_as<Words>(values + (12582912.0f + 128.0f));
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(bits_as<__m512i>(rounded)));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<uint8_t>(rounded[i]);
#endif
}

// Rows of bytes around 128, each with the scale that its largest element asks for. A row with a NaN or an infinity
// gets a scale that is NaN, and so do its products.
template <class T>
void quantise(const QuantiseArguments& arguments, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(arguments.x) + row * arguments.x_stride;
    uint8_t* values = arguments.values + row * arguments.stride;
    const int64_t size = arguments.size, whole = size / kLanes * kLanes;
    Floats tail{};
    if (whole < size) tail = load_part(x + whole, size - whole);
    Floats largest = magnitude(tail), invalid = tail * 0.0f;
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Floats part = load(x + i);
      largest = larger(largest, magnitude(part));
      invalid += part * 0.0f;
    }
    const float top = max_of_lanes(largest);
    arguments.scales[row] = top / 127.0f + sum_of(invalid);
    const Floats inverse = splat(top > 0.0f ? 127.0f / top : 0.0f);
    for (int64_t i = 0; i < whole; i += kLanes) store_bytes(values + i, load(x + i) * inverse);
    if (whole == arguments.stride) continue;
    uint8_t last[kLanes];
    store_bytes(last, tail * inverse);
    for (int64_t i = whole; i < arguments.stride; ++i) values[i] = i < size ? last[i - whole] : 128;
  }
}
