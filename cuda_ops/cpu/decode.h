// Decode: one query token a sequence over its pages, one (sequence, key head) at a time.
//
// Memory-bound: each key and value is read once from memory for all query heads that share it, so a chunk of
// keys and values has to fit a core's first cache. Softmax runs along, chunk by chunk (Milakov and Gimelshein
// 2018, "Online normalizer calculation for softmax"), so scratch does not grow with the context. Chunks lie at
// fixed distances from the first visible token: a sequence's result does not depend on its neighbours.
#pragma once

constexpr int kChunk = 128;
constexpr int kMaxVectors = 8;  // accumulators in registers: twice the products a core has under way

struct Softmax {  // of one query: what was seen so far
  float largest;
  float sum;
};

template <class T>
struct Chunk {  // rows of the cache that hold consecutive tokens of one head
  const T* rows[kChunk + kLanes];
  int64_t num_tokens;
};

// Walks a sequence's pages; `cache` is the keys or the values.
struct Pages {
  const int32_t* blocks;
  int64_t block_size, block_stride, head_offset, head_dim;

  Pages(const PagedCache& cache, const BlockTables& tables, int64_t sequence, int64_t head)
      : blocks(tables.blocks + sequence * tables.row_stride),
        block_size(cache.block_size),
        block_stride(cache.num_kv_heads * cache.block_size * cache.head_dim),
        head_offset(head * cache.block_size * cache.head_dim),
        head_dim(cache.head_dim) {}

  // The last row stands for the missing ones up to a whole vector of rows; what it gives there is dropped.
  template <class T>
  INLINE void find(const void* cache, int64_t begin, int64_t end, Chunk<T>* chunk) const {
    const T* data = static_cast<const T*>(cache) + head_offset;
    int64_t block = begin / block_size, offset = begin % block_size;
    const T* row = nullptr;
    int64_t i = 0;
    for (int64_t position = begin; position < end; ++block, offset = 0) {
      row = data + blocks[block] * block_stride + offset * head_dim;
      const int64_t stop = min_of(end, position + block_size - offset);
      for (; position < stop; ++position, row += head_dim) chunk->rows[i++] = row;
    }
    chunk->num_tokens = i;
    for (const T* last = chunk->rows[i - 1]; i < round_up(chunk->num_tokens); ++i) chunk->rows[i] = last;
  }
};

// Adds to sums[t] the products of query and rows[t] in `kVectors` vectors from element `first`.
template <int kVectors, class T>
INLINE void add_products(Floats* sums, const T* const* rows, const float* query, int64_t first) {
  Floats q[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) q[v] = load(query + first + v * kLanes);
#pragma GCC unroll 16
  for (int t = 0; t < kLanes; ++t) {
    const T* row = rows[t] + first;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[t] += load(row + v * kLanes) * q[v];
  }
}

template <class T>
INLINE void prefetch(const T* row, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(bytes + i);
}

// scores[t] = query . rows[t] for the tokens of a chunk. Pages lie anywhere, which no prefetcher of the hardware
// foresees, so the next keys and the values that follow are asked for here.
template <class T>
INLINE void score(
    float* scores, const Chunk<T>& chunk, const Chunk<T>& values, const float* query, int64_t head_dim) {
  for (int64_t t = 0; t < chunk.num_tokens; t += kLanes) {
    const T* const* rows = chunk.rows + t;
    for (int i = 0; i < kLanes; ++i) {
      if (t + kLanes < chunk.num_tokens) prefetch(rows[kLanes + i], head_dim);
      prefetch(values.rows[t + i], head_dim);
    }
    Floats sums[kLanes] = {};
    int64_t first = 0;
    for (; first + 4 * kLanes <= head_dim; first += 4 * kLanes) add_products<4>(sums, rows, query, first);
    for (; first + kLanes <= head_dim; first += kLanes) add_products<1>(sums, rows, query, first);
    if (first < head_dim) {
      const Floats q = load(query + first);
      for (int i = 0; i < kLanes; ++i) sums[i] += load_part(rows[i] + first, head_dim - first) * q;
    }
    store(scores + t, sums_of(sums));
  }
}

// Bends scores towards the cap: cap * tanh(score / cap), with tanh(y) = 1 - 2 / (1 + e^2y).
INLINE void bend(float* scores, int64_t num_tokens, float cap) {
  if (cap == __builtin_inff()) return;
  for (int64_t t = 0; t < num_tokens; t += kLanes) {
    const Floats grown = exponential(load(scores + t) * splat(2.0f / cap));
    store(scores + t, splat(cap) - splat(2.0f * cap) / (splat(1.0f) + grown));
  }
}

// Turns a chunk's scores into weights and returns by what all that was summed before has to be multiplied.
INLINE float weigh(float* scores, int64_t num_tokens, Softmax* state) {
  const int64_t padded = round_up(num_tokens);
  for (int64_t t = num_tokens; t < padded; ++t) scores[t] = -__builtin_inff();
  Floats top = splat(state->largest);
  for (int64_t t = 0; t < padded; t += kLanes) top = larger(load(scores + t), top);
  const float largest = max_of_lanes(top);
  Floats sum{};
  for (int64_t t = 0; t < padded; t += kLanes) {
    const Floats weights = exponential(load(scores + t) - splat(largest));
    store(scores + t, weights);
    sum += weights;
  }
  const float factor = exponential(state->largest - largest);
  state->sum = state->sum * factor + sum_of(sum);
  state->largest = largest;
  return factor;
}

// total = total * factor + the weighted rows, in `kVectors` vectors from element `first`.
template <int kVectors, class T>
INLINE void add_weighted_part(
    float* total, float factor, const float* weights, const Chunk<T>& chunk, int64_t first) {
  Floats sums[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sums[v] = load(total + first + v * kLanes) * splat(factor);
  for (int64_t t = 0; t < chunk.num_tokens; ++t) {
    const T* row = chunk.rows[t] + first;
    const Floats weight = splat(weights[t]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[v] += load(row + v * kLanes) * weight;
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) store(total + first + v * kLanes, sums[v]);
}

template <class T>
INLINE void add_weighted(
    float* total, float factor, const float* weights, const Chunk<T>& chunk, int64_t head_dim) {
  int64_t first = 0;
  for (; first + kMaxVectors * kLanes <= head_dim; first += kMaxVectors * kLanes)
    add_weighted_part<kMaxVectors>(total, factor, weights, chunk, first);
  for (; first + 4 * kLanes <= head_dim; first += 4 * kLanes)
    add_weighted_part<4>(total, factor, weights, chunk, first);
  for (; first + kLanes <= head_dim; first += kLanes)
    add_weighted_part<1>(total, factor, weights, chunk, first);
  if (first == head_dim) return;
  Floats sum = load(total + first) * splat(factor);
  for (int64_t t = 0; t < chunk.num_tokens; ++t)
    sum += load_part(chunk.rows[t] + first, head_dim - first) * splat(weights[t]);
  store(total + first, sum);
}

template <class T>
struct Decode {
  const DecodeArguments& arguments;
  const int64_t group, padded;
  Scratch scratch;
  float* const queries;  // [group, padded]
  float* const totals;   // the same
  float* const scores;
  Softmax* const states;  // [group]

  explicit Decode(const DecodeArguments& a)
      : arguments(a),
        group(a.num_heads / a.cache.num_kv_heads),
        padded(round_up(a.cache.head_dim)),
        scratch(2 * group * padded + kChunk + round_up(2 * group)),
        queries(scratch.take(group * padded)),
        totals(scratch.take(group * padded)),
        scores(scratch.take(kChunk)),
        states(reinterpret_cast<Softmax*>(scratch.take(2 * group))) {}

  const T* query_of(int64_t sequence, int64_t head) const {
    const Strided& query = arguments.query;
    return static_cast<const T*>(query.data) + sequence * query.strides[0] + head * query.strides[1];
  }

  void start(int64_t sequence, int64_t kv_head) {
    for (int64_t g = 0; g < group; ++g) {
      float* query = queries + g * padded;
      read_row(query, query_of(sequence, kv_head * group + g), arguments.query.strides[2],
               arguments.cache.head_dim);
      for (int64_t i = 0; i < padded; i += kLanes) {
        store(query + i, load(query + i) * splat(arguments.scale));
        store(totals + g * padded + i, Floats{});
      }
      states[g] = {-__builtin_inff(), 0.0f};
    }
  }

  void finish(int64_t sequence, int64_t kv_head) const {
    const Strided& out = arguments.out;
    for (int64_t g = 0; g < group; ++g) {
      float* total = totals + g * padded;
      const Floats share = splat(1.0f / states[g].sum);
      for (int64_t i = 0; i < padded; i += kLanes) store(total + i, load(total + i) * share);
      T* to = static_cast<T*>(out.data) + sequence * out.strides[0] + (kv_head * group + g) * out.strides[1];
      write_row(to, out.strides[2], total, arguments.cache.head_dim);
    }
  }

  void run(int64_t item) {
    const PagedCache& cache = arguments.cache;
    const int64_t sequence = item / cache.num_kv_heads, kv_head = item % cache.num_kv_heads;
    const int64_t context = arguments.context_lens[sequence];
    const Pages pages(cache, arguments.tables, sequence, kv_head);
    start(sequence, kv_head);
    Chunk<T> keys, values;
    for (int64_t begin = max_of(0, context - arguments.window); begin < context; begin += kChunk) {
      const int64_t end = min_of(context, begin + kChunk);
      pages.find(cache.keys, begin, end, &keys);
      pages.find(cache.values, begin, end, &values);
      for (int64_t g = 0; g < group; ++g) {
        score(scores, keys, values, queries + g * padded, cache.head_dim);
        bend(scores, keys.num_tokens, arguments.soft_cap);
        const float factor = weigh(scores, keys.num_tokens, &states[g]);
        add_weighted(totals + g * padded, factor, scores, values, cache.head_dim);
      }
    }
    finish(sequence, kv_head);
  }
};

template <class T>
void decode(const DecodeArguments& arguments, int64_t begin, int64_t end) {
  Decode<T> work(arguments);
  for (int64_t item = begin; item < end; ++item) work.run(item);
}
