// The race among what min_p, then top_k, then top_p leave of a row, without a sort.
//
// Tokens stand in the order of (logit, lower token first), as whole numbers of 55 bits. The last one kept is found from
// the top, 11 bits a round: a histogram of the tokens that share what is known of it, in counts for top_k, in
// probability for top_p, then the bin in which the sum reaches what is to be kept. It ends early, mostly after two
// rounds, when a bin holds one token or is kept whole. Probabilities are whole multiples of 2^-40 of the largest one's:
// such sums are the same in any order.
//
// Work: a block takes a row; of rows that nothing cuts it returns at once.
// Moves: 4 bytes a token (2 of bfloat16 logits that nothing changes) for every round and one for the race, which for up
// to some 64 rows come from L2.
// Shared memory: 24 KB of histogram. Registers: cuda_ops/cuda/resources.json.
// Limits: a row has one block, so few rows do not fill the device; logits of one power of two fall into four bins of
// the first round, whose atomics queue.
#include <element.cuh>
#include <place.cuh>
#include <race.cuh>

using Stored = ELEMENT::Stored;
using Elements = Run<ELEMENT, COUNT>;

constexpr int kBits = 11;
constexpr int kBins = 1 << kBits;

static_assert(THREADS * 2 == kBins, "a thread sums two bins");

struct Row {
  const Stored* logits;
  int vocab_size;
  float top, inverse;

  __device__ __forceinline__ unsigned long long mass(float logit) const {
    if (logit == top) return 1ull << 40;
    const float weight = expf((logit - top) * inverse);
    return weight > 0.0f ? static_cast<unsigned long long>(weight * 0x1p40f) : 0;
  }

  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    for (int column = threadIdx.x * COUNT; column < vocab_size; column += THREADS * COUNT) {
      const Elements elements = *reinterpret_cast<const Elements*>(logits + column);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) visit(ELEMENT::widen(elements.elements[i]), column + i, i);
    }
  }
};

struct Histogram {
  unsigned counts[kBins];
  unsigned long long masses[kBins];
  unsigned long long warp_sums[THREADS / 32];
  unsigned long long before;  // the picked bin
  int picked;
};

template <bool kByMass>
__device__ __forceinline__ unsigned long long in_bin(const Histogram& histogram, int bin) {
  if constexpr (kByMass) return histogram.masses[bin];
  else return histogram.counts[bin];
}

// Finds the highest bin at which the sum of it and all above reaches the target; returns the sum of all. A target of 0
// stands for `share` of that sum.
template <bool kByMass>
__device__ unsigned long long pick(Histogram& histogram, unsigned long long& target, float share) {
  const int upper = kBins - 1 - 2 * threadIdx.x;
  const unsigned long long first = in_bin<kByMass>(histogram, upper);
  const unsigned long long own = first + in_bin<kByMass>(histogram, upper - 1);
  const int lane = threadIdx.x % 32, own_warp = threadIdx.x / 32;
  unsigned long long sum = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned long long below = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += below;
  }
  if (lane == 31) histogram.warp_sums[own_warp] = sum;
  if (threadIdx.x == 0) {
    histogram.picked = 0;
    histogram.before = 0;
  }
  __syncthreads();
  unsigned long long before = sum - own, total = 0;
  for (int warp = 0; warp < THREADS / 32; ++warp) {
    if (warp < own_warp) before += histogram.warp_sums[warp];
    total += histogram.warp_sums[warp];
  }
  if (target == 0) {
    target = static_cast<unsigned long long>(ceil(static_cast<double>(share) * static_cast<double>(total)));
    if (target == 0) target = 1;
  }
  if (before < target && target <= before + own) {
    const bool in_first = target <= before + first;
    histogram.picked = in_first ? upper : upper - 1;
    histogram.before = in_first ? before : before + first;
  }
  __syncthreads();
  return total;
}

// The place of the last token kept, of those from `bound` up: of the first `count`, or of the fewest that have `share`.
template <bool kByMass>
__device__ Place last_kept(const Row& row, Histogram& histogram, Place bound, unsigned long long count, float share) {
  unsigned long long target = count;
  Place prefix = 0;
  for (int shift = 4 * kBits;; shift -= kBits) {
    for (int bin = threadIdx.x; bin < kBins; bin += THREADS) {
      histogram.counts[bin] = 0;
      histogram.masses[bin] = 0;
    }
    __syncthreads();
    row.each([&](float logit, int token, int) {
      const Place place = place_of(logit, token);
      if (place < bound || place >> (shift + kBits) != prefix) return;
      const unsigned long long mass = kByMass ? row.mass(logit) : 0;
      const int bin = static_cast<int>(place >> shift) & (kBins - 1);
      atomicAdd(&histogram.counts[bin], 1u);
      if (mass > 0) atomicAdd(&histogram.masses[bin], mass);
    });
    __syncthreads();
    const unsigned long long total = pick<kByMass>(histogram, target, share);
    if (!kByMass && shift == 4 * kBits && total <= target) return bound;
    target -= histogram.before;
    prefix = prefix << kBits | static_cast<unsigned>(histogram.picked);
    const unsigned num_left = histogram.counts[histogram.picked];
    __syncthreads();
    if (shift == 0 || num_left == 1 || (!kByMass && num_left == target)) {
      const Place lowest = prefix << shift;
      return lowest > bound ? lowest : bound;
    }
  }
}

// token_ids, logprobs, tops, totals, numbers, controls: as sampling.cu has them.  logits: the changed ones, or the
// model's own where nothing changes them, rows row_stride apart; own_logits: the model's, touched with SCORES.
// COUNT divides vocab_size and row_stride; 4 divides COUNT, unless it is 1.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    draw_truncated(long long* token_ids, float* logprobs, const float* tops, const float* totals, const Stored* logits,
                   const OWN_ELEMENT::Stored* own_logits, const long long* numbers, const float* controls,
                   long long row_stride, long long own_stride, int vocab_size) {
  __shared__ Histogram histogram;
  __shared__ Standing scratch[THREADS / 32];
  const long long index = blockIdx.x;
  numbers += index * 4;
  controls += index * 6;
  if (!is_truncated(numbers, controls, vocab_size)) return;
  const Race race(numbers, controls);
  const Row row{logits + index * row_stride, vocab_size, tops[index], race.inverse};
  Place bound = 0;
  if (controls[2] > 0.0f) bound = place_of(row.top + race.temperature * logf(controls[2]), static_cast<int>(kLastId));
  if (numbers[3] > 0 && numbers[3] < vocab_size)
    bound = last_kept<false>(row, histogram, bound, static_cast<unsigned long long>(numbers[3]), 0.0f);
  if (controls[1] < 1.0f) bound = last_kept<true>(row, histogram, bound, 0, controls[1]);
  Standing standing = nobody();
  Words words{};
  row.each([&](float logit, int token, int i) {
    if (i % 4 == 0) words = race.words_of(token);
    if (place_of(logit, token) >= bound) race.run(standing, logit, words.word[COUNT == 1 ? token % 4 : i % 4], token);
  });
  standing = block_merge<THREADS>(standing, scratch);
  if (threadIdx.x > 0) return;
  token_ids[index] = standing.token;
  if constexpr (SCORES)
    logprobs[index] = OWN_ELEMENT::widen(own_logits[index * own_stride + standing.token]) - totals[index];
}
