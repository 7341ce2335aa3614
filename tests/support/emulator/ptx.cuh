// The CPU's bodies of cuda_ops/cuda/kernels/ptx.cuh, whose place it takes in the emulator.
#pragma once

inline unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(emulator::shared_memory); }

inline unsigned bfloat16_bits(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline unsigned float16_bits(float x) {
  const _Float16 narrow = static_cast<_Float16>(x);
  unsigned short bits;
  memcpy(&bits, &narrow, 2);
  return bits;
}

inline unsigned pack_bf16(float low, float high) { return bfloat16_bits(low) | bfloat16_bits(high) << 16; }
inline unsigned pack_fp16(float low, float high) { return float16_bits(low) | float16_bits(high) << 16; }

inline float fp16_to_float(unsigned short bits) {
  _Float16 narrow;
  memcpy(&narrow, &bits, 2);
  return static_cast<float>(narrow);
}

// By search among the 127 numbers that there are, where kernels shift bits.
inline float float8_value(unsigned code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const float magnitude = exponent == 0 ? std::ldexp(mantissa / 8.0f, -6) : std::ldexp(1.0f + mantissa / 8.0f, exponent - 7);
  return (code & 0x7f) == 0x7f ? std::nanf("") : code & 0x80 ? -magnitude : magnitude;
}

inline unsigned float8_bits(float x) {
  const unsigned sign = std::signbit(x) ? 0x80 : 0;
  const float magnitude = std::fabs(x);
  if (x != x) return sign | 0x7f;
  unsigned code = 0;
  while (code < 0x7e && float8_value(code + 1) <= magnitude) ++code;
  if (code == 0x7e) return sign | code;
  const float below = magnitude - float8_value(code), above = float8_value(code + 1) - magnitude;
  return sign | (above < below || (above == below && code % 2 == 1) ? code + 1 : code);
}

constexpr bool kHasFloat8 = true;
inline unsigned pack_float8(float low, float high) { return float8_bits(low) | float8_bits(high) << 8; }
inline unsigned unpack_float8(unsigned packed) {
  return float16_bits(float8_value(packed & 0xff)) | float16_bits(float8_value(packed >> 8 & 0xff)) << 16;
}

inline float fast_exp2(float x) { return std::exp2(x); }

// Nothing is copied before it is waited for, as late as the hardware may; until then the target holds NaN.
inline void cp_async_16(void* shared, const void* global, bool is_wanted) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16)
    emulator::fail("cp.async of an address that is not a multiple of 16", *emulator::current);
  memset(shared, 0xff, 16);
  emulator::current->copies.push_back({shared, is_wanted ? global : nullptr, emulator::current->copy_groups});
}

inline void cp_async_commit() { ++emulator::current->copy_groups; }

template <int kPending>
void cp_async_wait() {
  auto& fibre = *emulator::current;
  size_t kept = 0;
  for (const auto& copy : fibre.copies) {
    if (copy.group >= fibre.copy_groups - kPending) {
      fibre.copies[kept++] = copy;
    } else if (copy.source == nullptr) {
      memset(copy.target, 0, 16);
    } else {
      memcpy(copy.target, copy.source, 16);
    }
  }
  fibre.copies.resize(kept);
}

template <bool kIsTransposed>
void load_matrices(unsigned (&parts)[4], const void* shared_row) {
  if (reinterpret_cast<uintptr_t>(shared_row) % 16)
    emulator::fail("ldmatrix of an address that is not a multiple of 16", *emulator::current);
  struct Row {
    unsigned short elements[8];
  } row;
  memcpy(&row, shared_row, 16);
  static Row rows[32][32];
  auto& shown = rows[emulator::current->warp];
  const int lane = emulator::current->lane;
  shown[lane] = row;
  __syncwarp();
  const int outer = lane / 4, inner = lane % 4 * 2;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const Row* first = shown + matrix * 8;
    const unsigned low = kIsTransposed ? first[inner].elements[outer] : first[outer].elements[inner];
    const unsigned high = kIsTransposed ? first[inner + 1].elements[outer] : first[outer].elements[inner + 1];
    parts[matrix] = low | high << 16;
  }
  __syncwarp();
}

inline void ldmatrix(unsigned (&parts)[4], const void* shared_row) { load_matrices<false>(parts, shared_row); }
inline void ldmatrix_transposed(unsigned (&parts)[4], const void* shared_row) {
  load_matrices<true>(parts, shared_row);
}

template <class Widen>
void multiply_matrices(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Widen widen) {
  static float a_tiles[32][16][16], b_tiles[32][16][8];
  auto& a_tile = a_tiles[emulator::current->warp];
  auto& b_tile = b_tiles[emulator::current->warp];
  const int g = emulator::current->lane / 4, t = emulator::current->lane % 4 * 2;
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) a_tile[g + i % 2 * 8][t + i / 2 * 8 + j] = widen(a[i] >> 16 * j & 0xffff);
  for (int j = 0; j < 2; ++j) {
    b_tile[t + j][g] = widen(b0 >> 16 * j & 0xffff);
    b_tile[t + 8 + j][g] = widen(b1 >> 16 * j & 0xffff);
  }
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) sum += a_tile[g + i / 2 * 8][k] * b_tile[k][t + i % 2];
    d[i] += sum;
  }
  __syncwarp();
}

inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  multiply_matrices(d, a, b0, b1, [](unsigned bits) { return __uint_as_float(bits << 16); });
}
inline void mma_fp16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  multiply_matrices(d, a, b0, b1, [](unsigned bits) { return fp16_to_float(static_cast<unsigned short>(bits)); });
}
