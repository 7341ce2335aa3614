// A token for each row of logits by one race over the vocabulary, greedy where the temperature is 0.
//
// Work: block (part, row) takes `part_size` tokens, a thread COUNT of them (16 bytes) at a time; a row's last block to
// end merges the parts. With TRUNCATES, rows that top_k, top_p or min_p cut are not raced here: truncation.cu does it.
// CHANGES: penalties, biases and masks on the way. A bit a token in shared memory says where the row's list has to be
// asked, and for a row that truncation.cu will race what came of it is written down in float32.
// Moves: the logits once; with CHANGES a bit a token of a mask, and 4 bytes a token of truncated rows.
// Shared memory: 20 bytes a warp, with CHANGES a bit a token of a part. Registers: cuda_ops/cuda/resources.json.
// Limits: not the memory but the noise is what is paid for (some 25 instructions a token; rows at temperature 0 have
// none), and COUNT = 1 uses one of four words.
#include <element.cuh>
#include <race.cuh>

using Stored = ELEMENT::Stored;
using Elements = Run<ELEMENT, COUNT>;

struct Change {
  int token, is_seen, occurrences;
};

// A row's list is ascending and has the token: its bit was set from it.
__device__ __forceinline__ float changed_by(const Change* list, const float* biases, int length, int token,
                                            const float* controls, float logit) {
  int low = 0, high = length - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (list[middle].token < token) low = middle + 1;
    else high = middle;
  }
  logit += biases[low];
  if (list[low].is_seen) logit = logit > 0.0f ? logit / controls[3] : logit * controls[3];
  if (list[low].occurrences > 0) logit -= controls[4] + controls[5] * static_cast<float>(list[low].occurrences);
  return logit;
}

// token_ids, are_sound, tops, totals: [num_rows].  logprobs: [num_rows], touched with SCORES.  changed: [num_rows,
// vocab_size].  standings: [num_rows, gridDim.x].  arrivals: [num_rows], zero before and after.  logits: rows
// row_stride apart.  numbers: [num_rows, 4] and controls: [num_rows, 6], see race.cuh.  list, biases: of row r those
// from starts[r] to starts[r + 1].  masks: rows of mask_words, a bit a token; mask_rows: [num_rows], negative for none.
// COUNT divides vocab_size, part_size and row_stride; 4 divides COUNT, unless it is 1.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    draw(long long* token_ids, float* logprobs, unsigned char* are_sound, float* tops, float* totals, float* changed,
         Standing* standings, int* arrivals, const Stored* logits, const long long* numbers, const float* controls,
         const int* starts, const Change* list, const float* biases, const unsigned* masks, const int* mask_rows,
         long long row_stride, int vocab_size, int part_size, int mask_words) {
  __shared__ Standing scratch[THREADS / 32];
  __shared__ int is_last;
  const long long row = blockIdx.y;
  logits += row * row_stride;
  numbers += row * 4;
  controls += row * 6;
  const int first = blockIdx.x * part_size, past = min(first + part_size, vocab_size);
  unsigned* listed = reinterpret_cast<unsigned*>(dynamic_shared());
  const unsigned* mask = nullptr;
  int num_listed = 0;
  if constexpr (CHANGES) {
    for (int i = threadIdx.x; i < (part_size + 31) / 32; i += THREADS) listed[i] = 0;
    __syncthreads();
    list += starts[row];
    biases += starts[row];
    num_listed = starts[row + 1] - starts[row];
    for (int i = threadIdx.x; i < num_listed; i += THREADS) {
      const int place = list[i].token - first;
      if (place >= 0 && place < part_size) atomicAdd(&listed[place / 32], 1u << place % 32);
    }
    if (mask_rows[row] >= 0) mask = masks + static_cast<long long>(mask_rows[row]) * mask_words;
    __syncthreads();
  }
  const bool races = !TRUNCATES || !is_truncated(numbers, controls, vocab_size);
  const Race race(numbers, controls);
  Standing standing = nobody();
  for (int column = first + threadIdx.x * COUNT; column < past; column += THREADS * COUNT) {
    const Elements elements = *reinterpret_cast<const Elements*>(logits + column);
    Words words{};
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int token = column + i;
      float logit = ELEMENT::widen(elements.elements[i]);
      see(standing, logit, SCORES);
      if constexpr (CHANGES) {
        const int place = token - first;
        if (listed[place / 32] >> place % 32 & 1u)
          logit = changed_by(list, biases, num_listed, token, controls, logit);
        if (mask != nullptr && !(mask[token / 32] >> token % 32 & 1u)) logit = nobody().score;
        if (!races) changed[row * vocab_size + token] = logit;
      }
      standing.top = fmaxf(standing.top, logit);
      if (races) {
        if (i % 4 == 0 && race.temperature > 0.0f) words = race.words_of(token);
        race.run(standing, logit, words.word[COUNT == 1 ? token % 4 : i % 4], token);
      }
    }
  }
  standing = block_merge<THREADS>(standing, scratch);
  if (threadIdx.x == 0) {
    standings[row * gridDim.x + blockIdx.x] = standing;
    __threadfence();
    is_last = atomicAdd(&arrivals[row], 1) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  standing = nobody();
  for (int part = threadIdx.x; part < static_cast<int>(gridDim.x); part += THREADS)
    standing = merge(standing, standings[row * gridDim.x + part]);
  standing = block_merge<THREADS>(standing, scratch);
  if (threadIdx.x > 0) return;
  arrivals[row] = 0;
  const float size = fabsf(standing.maximum);
  are_sound[row] = size < __int_as_float(0x7f800000);
  tops[row] = standing.top;
  token_ids[row] = standing.token;
  if constexpr (SCORES) {
    const float total = standing.maximum + logf(standing.sum);
    totals[row] = total;
    logprobs[row] = ELEMENT::widen(logits[standing.token]) - total;
  }
}
