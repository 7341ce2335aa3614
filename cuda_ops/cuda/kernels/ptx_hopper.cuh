// Instructions of sm_90a for products of a warpgroup, 128 threads, that run beside them; see ptx.cuh.
// On the CPU the tests put another file of this name in its place.
//
// A tile is 64 rows of 64 16-bit elements, 128 bytes a row, at a multiple of 1024 bytes; the 16-byte runs of row r stand
// in the order run ^ (r % 8), so that neither rows nor columns of runs meet in a bank (128-byte swizzle; PTX ISA, section
// "Asynchronous Warpgroup Level Matrix Shared Memory Layout").
#pragma once

// The first multiple of 1024 bytes in the block's dynamic shared memory.
__device__ __forceinline__ unsigned char* aligned_dynamic_shared() {
  unsigned char* shared = dynamic_shared();
  return shared + (-shared_address(shared) & 1023u);
}

// Names rows of a tile from one address in it on: swizzle of 128 bytes, 1024 bytes from eight rows to the next eight.
__device__ __forceinline__ unsigned long long tile_descriptor(const void* shared) {
  return static_cast<unsigned long long>((shared_address(shared) & 0x3ffffu) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// What this thread has written to shared memory, copies that it waited for too, becomes visible to wgmma.
__device__ __forceinline__ void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Orders registers before the products that follow; after every wait, before the first of the next products.
__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the warpgroup's products so far and waits for them; until then `d` is theirs.
template <int kCount>
__device__ __forceinline__ void wgmma_finish(float (&d)[kCount][4]) {
  asm volatile("wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int n = 0; n < kCount; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");  // not read any sooner
}

#define EIGHT(d, n) \
  "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3]), "+f"(d[n + 1][0]), "+f"(d[n + 1][1]), "+f"(d[n + 1][2]), "+f"(d[n + 1][3])
#define SUMS(d) EIGHT(d, 0), EIGHT(d, 2), EIGHT(d, 4), EIGHT(d, 6)
#define SUM_NAMES                                                                                      \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26," \
  "%27,%28,%29,%30,%31}"

// d[64x64] = a[64x16] * b[64x16]^T, added to what it was unless `is_first`: both factors are rows of tiles, 16 columns
// from the descriptor's address on. A warp holds rows 16 * (warp % 4) and on of d, as mma_bf16 has them, eight columns
// for each d[n].
#define WGMMA(NAME, TYPE)                                                                                            \
  __device__ __forceinline__ void NAME(float (&d)[8][4], unsigned long long a, unsigned long long b, bool is_first) { \
    asm volatile("{\n\t.reg .pred adds;\n\tsetp.eq.b32 adds, %34, 0;\n\t"                                             \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " " SUM_NAMES                            \
                 ", %32, %33, adds, 1, 1, 0, 0;\n\t}"                                                                 \
                 : SUMS(d)                                                                                            \
                 : "l"(a), "l"(b), "r"(static_cast<int>(is_first))                                                    \
                 : "memory");                                                                                         \
  }
WGMMA(wgmma_bf16, "bf16")
WGMMA(wgmma_fp16, "f16")

// d[64x64] += a[64x16] * b[16x64]: a in registers, each warp's 16 rows as mma_bf16 has them; b is 16 rows of a tile.
#define WGMMA_ROWS(NAME, TYPE)                                                                                \
  __device__ __forceinline__ void NAME(float (&d)[8][4], const unsigned (&a)[4], unsigned long long b) {      \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " " SUM_NAMES                    \
                 ", {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"                                                      \
                 : SUMS(d)                                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                         \
                 : "memory");                                                                                 \
  }
WGMMA_ROWS(wgmma_bf16_rows, "bf16")
WGMMA_ROWS(wgmma_fp16_rows, "f16")

#undef EIGHT
#undef SUMS
#undef SUM_NAMES
#undef WGMMA
#undef WGMMA_ROWS
