// The most probable tokens of each row with their log-probabilities, best first, equal ones by their ids; without a sort.
//
// Work: block (part, row). Each thread finds the best of the tokens it reads; the num_top-th best of those is a bound
// that num_top tokens of the part reach, and that few others do: what passes it are at most num_top threads' tokens, and
// mostly hardly more than num_top. A second reading collects these, and each one's rank among them is counted. A row's
// last block to end does the same with what the parts have left.
// Moves: the logits twice, the second time from L2 or nearer; num_top numbers of 8 bytes a part.
// Shared memory: 18 KB. Registers: cuda_ops/cuda/resources.json.
// Limits: num_top times the tokens of a thread, and num_top times the parts, must not exceed CAPACITY. A part whose
// best tokens are all one thread's costs CAPACITY comparisons for each of them.
#include <element.cuh>
#include <place.cuh>

using Stored = ELEMENT::Stored;
using Elements = Run<ELEMENT, COUNT>;

// The place of `mine` among others, which it may be one of: how many are better.
__device__ __forceinline__ int rank_of(Place mine, const Place* others, int count) {
  int rank = 0;
  for (int i = 0; i < count; ++i) rank += others[i] > mine;
  return rank;
}

template <class Visit>
__device__ __forceinline__ void each_place(const Stored* logits, int first, int past, Visit visit) {
  for (int column = first + threadIdx.x * COUNT; column < past; column += THREADS * COUNT) {
    const Elements elements = *reinterpret_cast<const Elements*>(logits + column);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) visit(place_of(ELEMENT::widen(elements.elements[i]), column + i));
  }
}

// top_ids, top_logprobs: [num_rows, num_top].  candidates: [num_rows, gridDim.x, num_top].  arrivals: [num_rows], zero
// before and after.  logits: rows row_stride apart.  totals: [num_rows], the logarithm of the sum of exponentials.
// COUNT divides vocab_size, part_size and row_stride; num_top is at most THREADS and vocab_size.
extern "C" __global__ void __launch_bounds__(THREADS)
    top_logprobs(long long* top_ids, float* top_logprobs, Place* candidates, int* arrivals, const Stored* logits,
                 const float* totals, long long row_stride, int vocab_size, int part_size, int num_top) {
  __shared__ Place best[THREADS];
  __shared__ Place found[CAPACITY];
  __shared__ Place bound;
  __shared__ int num_found;
  __shared__ int is_last;
  const long long row = blockIdx.y;
  logits += row * row_stride;
  const int first = blockIdx.x * part_size, past = min(first + part_size, vocab_size);
  Place mine = 0;  // of a thread without tokens
  each_place(logits, first, past, [&](Place place) { mine = place > mine ? place : mine; });
  best[threadIdx.x] = mine;
  if (threadIdx.x == 0) {
    bound = 0;
    num_found = 0;
  }
  __syncthreads();
  if (mine > 0 && rank_of(mine, best, THREADS) == num_top - 1) bound = mine;
  __syncthreads();
  each_place(logits, first, past, [&](Place place) {
    if (place >= bound) found[atomicAdd(&num_found, 1)] = place;
  });
  __syncthreads();
  Place* left = candidates + (row * gridDim.x + blockIdx.x) * num_top;
  for (int i = threadIdx.x; i < num_found; i += THREADS) {
    const int rank = rank_of(found[i], found, num_found);
    if (rank < num_top) left[rank] = found[i];
  }
  for (int i = num_found + threadIdx.x; i < num_top; i += THREADS) left[i] = 0;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(&arrivals[row], 1) == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  const int num_candidates = gridDim.x * num_top;
  for (int i = threadIdx.x; i < num_candidates; i += THREADS) found[i] = candidates[row * num_candidates + i];
  __syncthreads();
  for (int i = threadIdx.x; i < num_candidates; i += THREADS) {
    const int rank = found[i] > 0 ? rank_of(found[i], found, num_candidates) : num_top;
    if (rank >= num_top) continue;
    const int token = token_at(found[i]);
    top_ids[row * num_top + rank] = token;
    top_logprobs[row * num_top + rank] = ELEMENT::widen(logits[token]) - totals[row];
  }
  if (threadIdx.x == 0) arrivals[row] = 0;
}
