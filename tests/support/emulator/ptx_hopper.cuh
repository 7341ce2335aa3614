// The CPU's bodies of cuda_ops/cuda/kernels/ptx_hopper.cuh, whose place it takes in the emulator.
//
// A product is computed when it is issued and again when it is waited for: where the two differ, somebody wrote to what
// it reads meanwhile. Until then its sums hold NaN, and what is written to them is lost.
#pragma once

namespace emulator {

struct Product {
  float (*sums)[4];
  bool is_first;
  bool in_registers;
  float rows[2][16];  // of the first factor: the lane's two, where it is in registers
  uint64_t a, b;
  float (*widen)(unsigned);
  float product[8][4];
};

struct Sums {
  float (*place)[4];
  float values[8][4];
};

struct Warpgroup {
  std::vector<Product> pending;
  std::vector<Sums> held;
  bool has_begun;
  int num_fenced;  // groups of copies that were there at the last fence
};

inline Warpgroup warpgroups[1024];

inline Warpgroup& mine() { return warpgroups[current->index.x]; }

// Groups of a thread's copies that have been waited for.
inline int num_landed(const Fibre& fibre) {
  return fibre.copies.empty() ? fibre.copy_groups : fibre.copies.front().group;
}

// Shared addresses begin at 16, as behind something static: what must be aligned has to be made so.
constexpr uint64_t kSharedStart = 16;

inline float element_at(uint64_t address, float (*widen)(unsigned)) {
  const uint64_t place = (address ^ (address >> 7 & 7) << 4) - kSharedStart;
  if (place + 2 > shared_bytes) fail("a descriptor leads outside shared memory", *current);
  unsigned short bits;
  memcpy(&bits, shared_memory + place, 2);
  return widen(bits);
}

inline void check_descriptor(uint64_t descriptor) {
  if (descriptor >> 62 != 1 || (descriptor >> 32 & 0x3fff) != 64)
    fail("only tiles with a swizzle of 128 bytes and rows side by side are emulated", *current);
}

inline void compute(const Product& product, float (&out)[8][4]) {
  const int first_row = current->warp % 4 * 16 + current->lane / 4;
  const uint64_t a = (product.a & 0x3fff) << 4, b = (product.b & 0x3fff) << 4;
  float rows[2][16];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k)
      rows[half][k] = product.in_registers ? product.rows[half][k]
                                           : element_at(a + (first_row + half * 8) * 128 + k * 2, product.widen);
  for (int n = 0; n < 8; ++n)
    for (int i = 0; i < 2; ++i) {
      const int column = n * 8 + current->lane % 4 * 2 + i;
      float upper = 0.0f, lower = 0.0f;
      for (int k = 0; k < 16; ++k) {
        const uint64_t place = product.in_registers ? b + k * 128 + column * 2 : b + column * 128 + k * 2;
        const float factor = element_at(place, product.widen);
        upper += rows[0][k] * factor;
        lower += rows[1][k] * factor;
      }
      out[n][i] = upper;
      out[n][2 + i] = lower;
    }
}

inline void issue(Product product) {
  Warpgroup& group = mine();
  if (!group.has_begun) fail("wgmma without wgmma.fence since the last wait", *current);
  check_descriptor(product.b);
  if (!product.in_registers) check_descriptor(product.a);
  for (unsigned i = 0; i < block.x; ++i)
    if (num_landed(fibres[i]) > warpgroups[i].num_fenced)
      fail("wgmma may read what a thread copied without fence.proxy.async since", *current);
  compute(product, product.product);
  bool is_held = false;
  for (const Sums& sums : group.held) is_held = is_held || sums.place == product.sums;
  if (!is_held) {
    Sums sums = {product.sums, {}};
    memcpy(sums.values, product.sums, sizeof(sums.values));
    group.held.push_back(sums);
    memset(product.sums, 0xff, sizeof(sums.values));
  }
  group.pending.push_back(product);
}

inline void finish_products() {
  Warpgroup& group = mine();
  for (const Product& product : group.pending) {
    float again[8][4];
    compute(product, again);
    if (memcmp(again, product.product, sizeof(again)) != 0)
      fail("what a wgmma reads was written before it was waited for", *current);
    for (Sums& sums : group.held) {
      if (sums.place != product.sums) continue;
      for (int n = 0; n < 8; ++n)
        for (int i = 0; i < 4; ++i)
          sums.values[n][i] = (product.is_first ? 0.0f : sums.values[n][i]) + again[n][i];
    }
  }
  for (const Sums& sums : group.held) memcpy(sums.place, sums.values, sizeof(sums.values));
  group.pending.clear();
  group.held.clear();
  group.has_begun = false;
}

inline float widen_bf16(unsigned bits) { return __uint_as_float(bits << 16); }
inline float widen_fp16(unsigned bits) { return fp16_to_float(static_cast<unsigned short>(bits)); }

// Gathers the lane's two rows of the first factor from the four lanes that hold them.
inline Product product_of_rows(float (*sums)[4], const unsigned (&a)[4], uint64_t b, float (*widen)(unsigned)) {
  static unsigned shown[32][32][4];
  auto& parts = shown[current->warp];
  memcpy(parts[current->lane], a, sizeof(a));
  __syncwarp();
  Product product = {sums, false, true, {}, 0, b, widen, {}};
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k) {
      const unsigned pair = parts[current->lane / 4 * 4 + k % 8 / 2][half + k / 8 * 2];
      product.rows[half][k] = widen(pair >> 16 * (k % 2) & 0xffff);
    }
  __syncwarp();
  return product;
}

}  // namespace emulator

inline unsigned char* aligned_dynamic_shared() {
  return dynamic_shared() + (-emulator::kSharedStart & 1023u);
}

inline unsigned long long tile_descriptor(const void* shared) {
  const uint64_t address =
      static_cast<const unsigned char*>(shared) - dynamic_shared() + emulator::kSharedStart;
  if (address % 16) emulator::fail("a descriptor of an address that is not a multiple of 16", *emulator::current);
  return (address & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

inline void fence_for_wgmma() { emulator::mine().num_fenced = emulator::num_landed(*emulator::current); }

inline void wgmma_begin() {
  emulator::mine().has_begun = true;
  __syncwarp();
}

template <int kCount>
void wgmma_finish(float (&)[kCount][4]) {
  __syncwarp();
  emulator::finish_products();
}

inline void wgmma_bf16(float (&d)[8][4], unsigned long long a, unsigned long long b, bool is_first) {
  emulator::issue({d, is_first, false, {}, a, b, emulator::widen_bf16, {}});
}
inline void wgmma_fp16(float (&d)[8][4], unsigned long long a, unsigned long long b, bool is_first) {
  emulator::issue({d, is_first, false, {}, a, b, emulator::widen_fp16, {}});
}
inline void wgmma_bf16_rows(float (&d)[8][4], const unsigned (&a)[4], unsigned long long b) {
  emulator::issue(emulator::product_of_rows(d, a, b, emulator::widen_bf16));
}
inline void wgmma_fp16_rows(float (&d)[8][4], const unsigned (&a)[4], unsigned long long b) {
  emulator::issue(emulator::product_of_rows(d, a, b, emulator::widen_fp16));
}
