// The CPU's bodies of cuda_ops/cuda/kernels/ptx_quantised.cuh, whose place it takes in the emulator.
#pragma once

inline unsigned add_bf16x2(unsigned a, unsigned b) {
  return pack_bf16(__uint_as_float(a << 16) + __uint_as_float(b << 16),
                   __uint_as_float(a & 0xffff0000u) + __uint_as_float(b & 0xffff0000u));
}

inline unsigned add_fp16x2(unsigned a, unsigned b) {
  return pack_fp16(fp16_to_float(static_cast<unsigned short>(a)) + fp16_to_float(static_cast<unsigned short>(b)),
                   fp16_to_float(static_cast<unsigned short>(a >> 16)) + fp16_to_float(static_cast<unsigned short>(b >> 16)));
}
