// Runs CUDA C++ kernels on the CPU for tests: a fibre a thread, a block at a time (x86-64 Linux, g++).
//
// A fibre runs until it waits at a barrier or ends. Warps take turns, first to last or, reversed, last to first,
// and so do the lanes of a warp between two waits: code that needs an order nobody promised fails in one of the two.
// Ends the process with a message where lanes wait at different barriers, or for a lane that has ended.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static
#define __restrict__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {

struct Copy {
  void* target;
  const void* source;
  int group;
};

struct Fibre {
  void* stack_pointer;
  char* stack;
  dim3 index;
  int warp, lane;
  bool has_ended;
  const void* barrier;  // where it waits: null, the block's, or its warp's
  int line;             // of the barrier in the source
  uint64_t slot[4];     // what it shows to its warp
  std::vector<Copy> copies;
  int copy_groups;
};

inline dim3 grid, block, block_index;
inline Fibre* current;
inline std::vector<Fibre> fibres;
inline char* shared_memory;
inline unsigned shared_bytes;
inline void* scheduler;
inline const void* barriers[33];  // the block's, then the warps'; only their addresses matter
inline bool is_reversed;
inline const char* kernel_name = "";
inline void (*run_kernel)();

extern "C" void emulator_switch(void** save, void* to);
asm(R"(.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch,@function
emulator_switch:
 pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp,(%rdi); movq %rsi,%rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
 ret
)");

[[noreturn]] inline void fail(const char* what, const Fibre& fibre) {
  fprintf(stderr, "emulator: %s: %s (block %u %u %u, warp %d, lane %d, line %d)\n", kernel_name, what, block_index.x,
          block_index.y, block_index.z, fibre.warp, fibre.lane, fibre.line);
  abort();
}

inline void wait_at(const void* barrier, int line) {
  current->barrier = barrier;
  current->line = line;
  emulator_switch(&current->stack_pointer, scheduler);
}

inline void enter() {
  run_kernel();
  current->has_ended = true;
  emulator_switch(&current->stack_pointer, scheduler);
  abort();
}

inline void prepare(Fibre& fibre, int thread) {
  constexpr size_t kStack = 64 * 1024;
  if (fibre.stack == nullptr) fibre.stack = static_cast<char*>(aligned_alloc(64, kStack));
  fibre.index = {thread % block.x, thread / block.x % block.y, thread / (block.x * block.y)};
  fibre.warp = thread / 32;
  fibre.lane = thread % 32;
  fibre.has_ended = false;
  fibre.barrier = nullptr;
  fibre.copies.clear();
  fibre.copy_groups = 0;
  void** top = reinterpret_cast<void**>(fibre.stack + kStack) - 3;
  top[0] = nullptr;
  *--top = reinterpret_cast<void*>(enter);
  fibre.stack_pointer = top - 6;
}

// Lets a warp's lanes run until all that live wait for the block, or have ended.
inline int run_warp(int first, int past) {
  for (;;) {
    int living = 0, at_warp = 0, line = 0;
    for (int i = first; i < past; ++i) {
      Fibre& fibre = fibres[is_reversed ? first + past - 1 - i : i];
      if (!fibre.has_ended && fibre.barrier == nullptr) {
        current = &fibre;
        emulator_switch(&scheduler, fibre.stack_pointer);
      }
      if (fibre.has_ended) continue;
      ++living;
      if (fibre.barrier == &barriers[0]) continue;
      if (at_warp++ > 0 && fibre.line != line) fail("lanes of a warp wait at different barriers", fibre);
      line = fibre.line;
    }
    if (at_warp == 0) return living;
    if (at_warp != past - first) fail("a warp's barrier that not all its lanes come to", fibres[first]);
    for (int i = first; i < past; ++i) fibres[i].barrier = nullptr;
  }
}

inline void run_block() {
  const int threads = block.x * block.y * block.z;
  if (static_cast<int>(fibres.size()) < threads) fibres.resize(threads);
  for (int i = 0; i < threads; ++i) prepare(fibres[i], i);
  memset(shared_memory, 0xff, shared_bytes);  // NaN, or a large index: nothing may be read before it is written
  const int warps = (threads + 31) / 32;
  for (;;) {
    int living = 0;
    for (int i = 0; i < warps; ++i) {
      const int warp = is_reversed ? warps - 1 - i : i;
      living += run_warp(warp * 32, warp * 32 + 32 < threads ? warp * 32 + 32 : threads);
    }
    if (living == 0) return;
    if (living != threads) fail("__syncthreads that not all threads come to", fibres[0]);
    for (int i = 0; i < threads; ++i) {
      if (fibres[i].line != fibres[0].line) fail("threads wait at different __syncthreads", fibres[i]);
    }
    for (int i = 0; i < threads; ++i) fibres[i].barrier = nullptr;
  }
}

// What another lane of the warp shows; every lane of the warp calls it.
template <class T>
T exchange(T value, int source, int line) {
  static_assert(sizeof(T) <= sizeof(current->slot));
  memcpy(current->slot, &value, sizeof(T));
  wait_at(&barriers[1 + current->warp], line);
  T shown;
  memcpy(&shown, fibres[current->warp * 32 + (source & 31)].slot, sizeof(T));
  wait_at(&barriers[1 + current->warp], line);
  return shown;
}

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) fail("only whole warps are emulated: the mask must be full", *current);
}

template <class... Parameters>
void call(void (*kernel)(Parameters...), void** arguments) {
  [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    kernel(*static_cast<Parameters*>(arguments[kIndex])...);
  }(std::index_sequence_for<Parameters...>{});
}

// A letter a parameter: p(ointer), i(nt), l(ong long), f(loat).
template <class T>
constexpr char letter() {
  if constexpr (std::is_pointer_v<T>) return 'p';
  else if constexpr (std::is_same_v<T, int>) return 'i';
  else if constexpr (std::is_same_v<T, long long>) return 'l';
  else if constexpr (std::is_same_v<T, float>) return 'f';
  else return '?';
}

template <class... Parameters>
const char* signature(void (*)(Parameters...)) {
  static const char letters[] = {letter<Parameters>()..., '\0'};
  return letters;
}

}  // namespace emulator

#define threadIdx emulator::current->index
#define blockIdx emulator::block_index
#define blockDim emulator::block
#define gridDim emulator::grid

inline void __syncthreads(int line = __builtin_LINE()) { emulator::wait_at(&emulator::barriers[0], line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  emulator::check_mask(mask);
  emulator::wait_at(&emulator::barriers[1 + emulator::current->warp], line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  emulator::check_mask(mask);
  return emulator::exchange(value, source, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flipped, int line = __builtin_LINE()) {
  emulator::check_mask(mask);
  return emulator::exchange(value, emulator::current->lane ^ flipped, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance, int line = __builtin_LINE()) {
  emulator::check_mask(mask);
  const int source = emulator::current->lane - distance;
  return emulator::exchange(value, source < 0 ? emulator::current->lane : source, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance, int line = __builtin_LINE()) {
  emulator::check_mask(mask);
  const int source = emulator::current->lane + distance;
  return emulator::exchange(value, source > 31 ? emulator::current->lane : source, line);
}
inline unsigned __ballot_sync(unsigned mask, bool is_set, int line = __builtin_LINE()) {
  emulator::check_mask(mask);
  emulator::current->slot[0] = is_set;
  emulator::wait_at(&emulator::barriers[1 + emulator::current->warp], line);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i)
    votes |= static_cast<unsigned>(emulator::fibres[emulator::current->warp * 32 + i].slot[0] & 1) << i;
  emulator::wait_at(&emulator::barriers[1 + emulator::current->warp], line);
  return votes;
}
inline bool __any_sync(unsigned mask, bool is_set, int line = __builtin_LINE()) {
  return __ballot_sync(mask, is_set, line) != 0;
}
inline bool __all_sync(unsigned mask, bool is_set, int line = __builtin_LINE()) {
  return __ballot_sync(mask, is_set, line) == 0xffffffffu;
}

template <class T>
T atomicAdd(T* place, T value) {
  const T old = *place;
  *place = old + value;
  return old;
}
template <class T>
T atomicMax(T* place, T value) {
  const T old = *place;
  if (value > old) *place = value;
  return old;
}
template <class T>
T atomicMin(T* place, T value) {
  const T old = *place;
  if (value < old) *place = value;
  return old;
}
inline void __threadfence() {}

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
