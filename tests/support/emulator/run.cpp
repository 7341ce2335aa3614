// One kernel as a library: -DKERNEL_FILE='"norm.cu"' -DKERNEL_ENTRY=norm.
#include "emulator.h"

#include KERNEL_FILE

extern "C" const char* emulator_signature() { return emulator::signature(KERNEL_ENTRY); }

// Runs all blocks one after the other; `arguments` is what cuLaunchKernel takes.
extern "C" void emulator_run(const unsigned* blocks, unsigned threads, unsigned shared_bytes, bool is_reversed,
                             const char* name, void** arguments) {
  static void** packed;
  packed = arguments;
  emulator::kernel_name = name;
  emulator::is_reversed = is_reversed;
  emulator::grid = {blocks[0], blocks[1], blocks[2]};
  emulator::block = {threads, 1, 1};
  // Exactly as long as was asked for, so that the address sanitizer sees a step past it.
  emulator::shared_bytes = shared_bytes;
  emulator::shared_memory = static_cast<char*>(aligned_alloc(16, shared_bytes));
  emulator::run_kernel = [] { emulator::call(KERNEL_ENTRY, packed); };
  const unsigned long long count = 1ull * blocks[0] * blocks[1] * blocks[2];
  for (unsigned long long i = 0; i < count; ++i) {
    const unsigned long long place = is_reversed ? count - 1 - i : i;
    emulator::block_index = {static_cast<unsigned>(place % blocks[0]),
                             static_cast<unsigned>(place / blocks[0] % blocks[1]),
                             static_cast<unsigned>(place / blocks[0] / blocks[1])};
    emulator::run_block();
  }
  free(emulator::shared_memory);
}
