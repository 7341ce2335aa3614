// Both ways from and to float8 e4m3, for tests: by whole numbers, as before sm_89, and by the instruction or its stand-in.
#include <float8.cuh>

// narrowed: [num_values, 2] codes, widened: [256] numbers.
extern "C" __global__ void convert(unsigned char* narrowed, float* widened, const float* values, int num_values) {
  for (int i = threadIdx.x; i < num_values; i += 32) {
    narrowed[2 * i] = static_cast<unsigned char>(float_to_e4m3_by_integers(values[i]));
    narrowed[2 * i + 1] = static_cast<unsigned char>(pack_e4m3(0.0f, values[i]) >> 8);
  }
  for (int code = threadIdx.x; code < 256; code += 32)
    widened[code] = e4m3_to_float_by_integers(static_cast<unsigned>(code));
}
