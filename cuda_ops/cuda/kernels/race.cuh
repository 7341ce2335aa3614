// A draw as a race (Gumbel-max): each token runs with noise of its own, the best of logit + temperature * noise wins.
//
// The noise of a token is a function of (seed, sequence, position, token) alone: Philox4x32 with ten rounds (Salmon et
// al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), key the seed, counter (token / 4, position, sequence, 0),
// word token % 4. The words are the same bits everywhere; their logarithms are as good as a device's are.
#pragma once

struct Words {
  unsigned word[4];
};

__device__ __forceinline__ Words philox(unsigned group, unsigned position, unsigned sequence, unsigned long long seed) {
  unsigned low_key = static_cast<unsigned>(seed), high_key = static_cast<unsigned>(seed >> 32);
  unsigned a = group, b = position, c = sequence, d = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned low_a = 0xD2511F53u * a, high_a = __umulhi(0xD2511F53u, a);
    const unsigned low_c = 0xCD9E8D57u * c, high_c = __umulhi(0xCD9E8D57u, c);
    a = high_c ^ b ^ low_key;
    b = low_c;
    c = high_a ^ d ^ high_key;
    d = low_a;
    low_key += 0x9E3779B9u;
    high_key += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}

// Who leads, and the model's own distribution so far: its maximum (NaN once a NaN was seen) and the sum of
// exp(logit - maximum). `top` is the largest of the changed logits.
struct Standing {
  float score, top, maximum, sum;
  int token;
};

__device__ __forceinline__ Standing nobody() {
  const float lowest = -__int_as_float(0x7f800000);
  return {lowest, lowest, lowest, 0.0f, 0};
}

__device__ __forceinline__ void see(Standing& standing, float logit, bool sums) {
  if (logit <= standing.maximum) {
    // Of two that are -inf the difference is no number.
    if (sums && logit < standing.maximum) standing.sum += __expf(logit - standing.maximum);
    if (sums && logit == standing.maximum) standing.sum += 1.0f;
  } else {
    if (sums) standing.sum = standing.sum * __expf(standing.maximum - logit) + 1.0f;
    // NaN is neither below nor above, and nothing is above it afterwards but NaN.
    standing.maximum = standing.maximum != standing.maximum ? standing.maximum : logit;
  }
}

__device__ __forceinline__ Standing merge(const Standing& one, const Standing& other) {
  const bool other_leads = other.score > one.score || (other.score == one.score && other.token < one.token);
  const float maximum = one.maximum >= other.maximum ? one.maximum : other.maximum;
  const float largest = one.maximum != one.maximum ? one.maximum : maximum;
  const float one_sum = one.maximum == largest ? one.sum : one.sum * __expf(one.maximum - largest);
  const float other_sum = other.maximum == largest ? other.sum : other.sum * __expf(other.maximum - largest);
  return {other_leads ? other.score : one.score, fmaxf(one.top, other.top), largest, one_sum + other_sum,
          other_leads ? other.token : one.token};
}

// The block's standing in its first thread. Every thread calls it; `scratch` has one place a warp.
template <int kThreads>
__device__ __forceinline__ Standing block_merge(Standing standing, Standing* scratch) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    Standing other;
    other.score = __shfl_xor_sync(0xffffffffu, standing.score, distance);
    other.top = __shfl_xor_sync(0xffffffffu, standing.top, distance);
    other.maximum = __shfl_xor_sync(0xffffffffu, standing.maximum, distance);
    other.sum = __shfl_xor_sync(0xffffffffu, standing.sum, distance);
    other.token = __shfl_xor_sync(0xffffffffu, standing.token, distance);
    standing = merge(standing, other);
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = standing;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kThreads / 32; ++warp) standing = merge(standing, scratch[warp]);
  __syncthreads();
  return standing;
}

// One row's race. `numbers` of a row: seed, sequence, position, top_k; `controls`: temperature, top_p, min_p and the
// repetition, presence and frequency penalties.
struct Race {
  float temperature, inverse;
  unsigned position, sequence;
  unsigned long long seed;

  __device__ __forceinline__ Race(const long long* numbers, const float* controls)
      : temperature(controls[0]),
        inverse(1.0f / controls[0]),
        position(static_cast<unsigned>(numbers[2])),
        sequence(static_cast<unsigned>(numbers[1])),
        seed(static_cast<unsigned long long>(numbers[0])) {}

  __device__ __forceinline__ Words words_of(int token) const {
    return philox(static_cast<unsigned>(token) / 4, position, sequence, seed);
  }

  __device__ __forceinline__ void run(Standing& standing, float logit, unsigned word, int token) const {
    const float uniform = fminf(static_cast<float>(word) * 0x1p-32f + 0x1p-33f, 1.0f - 0x1p-24f);
    // -log(1 - u) is at least u: who cannot win even with u in its place is spared two logarithms.
    if (!(uniform <= __expf((logit - standing.score) * inverse) * 1.001f)) return;
    const float score = logit - temperature * logf(-log1pf(-uniform));
    if (score > standing.score) {
      standing.score = score;
      standing.token = token;
    }
  }
};

__device__ __forceinline__ bool is_truncated(const long long* numbers, const float* controls, int vocab_size) {
  if (controls[0] == 0.0f) return false;
  return (numbers[3] > 0 && numbers[3] < vocab_size) || controls[1] < 1.0f || controls[2] > 0.0f;
}
