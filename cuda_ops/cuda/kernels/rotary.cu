// Rotary position embedding of queries and keys in place: element i turns with element i + half, in float32.
//
// Work: a block takes a token; a thread turns COUNT pairs (16 bytes of each half) of a head at a time.
// Moves: reads and writes each rotated element once; the token's angles (float32, [cosines | sines]) come from L1.
// Limits: a short launch for decode, where it costs what a launch costs.
#include <element.cuh>

using Stored = ELEMENT::Stored;
using Elements = Run<ELEMENT, COUNT>;

__device__ __forceinline__ void turn(Stored* head, const float* angles, int half, int i) {
  Elements* first_place = reinterpret_cast<Elements*>(head + i);
  Elements* second_place = reinterpret_cast<Elements*>(head + half + i);
  Elements first = *first_place, second = *second_place;
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    const float cosine = angles[i + k], sine = angles[half + i + k];
    const float x = ELEMENT::widen(first.elements[k]), y = ELEMENT::widen(second.elements[k]);
    first.elements[k] = ELEMENT::round(x * cosine - y * sine);
    second.elements[k] = ELEMENT::round(y * cosine + x * sine);
  }
  *first_place = first;
  *second_place = second;
}

// query, key: [num_tokens, heads, head_dim] by their strides.  cos_sin: [num_tokens, 2 * half], rows angle_stride apart.
// COUNT divides half and the strides of query and key.
extern "C" __global__ void __launch_bounds__(THREADS)
    rotary_embedding(Stored* query, Stored* key, const float* __restrict__ cos_sin, long long query_token_stride,
                     long long query_head_stride, long long key_token_stride, long long key_head_stride,
                     long long angle_stride, int num_heads, int num_kv_heads, int half) {
  const long long token = blockIdx.x;
  const float* angles = cos_sin + token * angle_stride;
  const int runs = half / COUNT;
  for (int i = threadIdx.x; i < (num_heads + num_kv_heads) * runs; i += THREADS) {
    const int head = i / runs;
    Stored* place = head < num_heads ? query + token * query_token_stride + head * query_head_stride
                                     : key + token * key_token_stride + (head - num_heads) * key_head_stride;
    turn(place, angles, half, i % runs * COUNT);
  }
}
