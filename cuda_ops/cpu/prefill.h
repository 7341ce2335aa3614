// Prefill: a tile of consecutive tokens of one sequence over its pages, one (tile, key head) at a time.
//
// Compute-bound: the tile's queries, all heads that share a key head, are the rows of two small matrix products
// a chunk of keys, with softmax running along between them as in decode.h. Keys (transposed) and values of a
// chunk are widened to float32 once for the whole tile and stay in a core's second cache.
#pragma once

constexpr int64_t kKeys = 64;  // of a chunk; whole vectors at every level
constexpr int kRows = kLanes == 16 ? 6 : 4;     // of a product in registers: 6 x 4 vectors of 32 registers,
constexpr int kColumns = kLanes == 16 ? 4 : 2;  // or 4 x 2 of 16

// c[kM][kN vectors] += a[kM][depth] * b[depth][kN vectors], all row-major float32.
template <int kM, int kN>
INLINE void multiply_block(
    float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth) {
  Floats sums[kM][kN];
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) sums[m][n] = load(c + m * c_stride + n * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    Floats column[kN];
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) column[n] = load(b + k * b_stride + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) sums[m][n] += column[n] * splat(a[m * a_stride + k]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) store(c + m * c_stride + n * kLanes, sums[m][n]);
}

struct Product {  // c[rows][columns] += a[rows][depth] * b[depth][columns]; columns are whole vectors
  float* c;
  int64_t c_stride;
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  int64_t rows, columns, depth;

  template <int kM, int kN>
  INLINE void block(int64_t row, int64_t column) const {
    multiply_block<kM, kN>(
        c + row * c_stride + column, c_stride, a + row * a_stride, a_stride, b + column, b_stride, depth);
  }

  template <int kN>
  INLINE void strip(int64_t column) const {
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) block<kRows, kN>(row, column);
    for (; row < rows; ++row) block<1, kN>(row, column);
  }

  void run() const {
    int64_t column = 0;
    for (; column + kColumns * kLanes <= columns; column += kColumns * kLanes) strip<kColumns>(column);
    for (; column < columns; column += kLanes) strip<1>(column);
  }
};

template <class T>
struct Prefill {
  const PrefillArguments& arguments;
  const int64_t group, head_dim, padded, max_rows;
  Scratch scratch;
  float* const queries;  // [rows, padded]; row r is token r / group of the tile, head r % group
  float* const totals;   // the same
  float* const weights;  // [rows, kKeys]
  float* const keys;     // [padded, kKeys]: transposed
  float* const values;   // [kKeys, padded]
  Softmax* const states;
  float* const factors;

  Prefill(const PrefillArguments& a, int64_t max_tokens)
      : arguments(a),
        group(a.num_heads / a.cache.num_kv_heads),
        head_dim(a.cache.head_dim),
        padded(round_up(head_dim)),
        max_rows(max_tokens * group),
        scratch(2 * max_rows * padded + max_rows * kKeys + 2 * padded * kKeys + 4 * (max_rows + kLanes)),
        queries(scratch.take(max_rows * padded)),
        totals(scratch.take(max_rows * padded)),
        weights(scratch.take(max_rows * kKeys)),
        keys(scratch.take(padded * kKeys)),
        values(scratch.take(padded * kKeys)),
        states(reinterpret_cast<Softmax*>(scratch.take(2 * max_rows))),
        factors(scratch.take(max_rows)) {}

  template <class Element>
  Element* element_of(const Strided& tensor, const QueryTile& tile, int64_t row, int64_t kv_head) const {
    return static_cast<Element*>(tensor.data) + (tile.first_row + row / group) * tensor.strides[0] +
           (kv_head * group + row % group) * tensor.strides[1];
  }

  void start(const QueryTile& tile, int64_t rows, int64_t kv_head) const {
    for (int64_t row = 0; row < rows; ++row) {
      float* query = queries + row * padded;
      read_row(query, element_of<const T>(arguments.query, tile, row, kv_head), arguments.query.strides[2],
               head_dim);
      for (int64_t i = 0; i < padded; i += kLanes) {
        store(query + i, load(query + i) * splat(arguments.scale));
        store(totals + row * padded + i, Floats{});
      }
      states[row] = {-__builtin_inff(), 0.0f};
    }
  }

  void finish(const QueryTile& tile, int64_t rows, int64_t kv_head) const {
    for (int64_t row = 0; row < rows; ++row) {
      float* total = totals + row * padded;
      const Floats share = splat(1.0f / states[row].sum);
      for (int64_t i = 0; i < padded; i += kLanes) store(total + i, load(total + i) * share);
      write_row(element_of<T>(arguments.out, tile, row, kv_head), arguments.out.strides[2], total, head_dim);
    }
  }

  void widen_keys(const Chunk<T>& chunk) const {
    for (int64_t t = 0; t < chunk.num_tokens; t += kLanes) {
      for (int64_t first = 0; first < padded; first += kLanes) {
        Floats square[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const T* row = chunk.rows[t + i] + first;
          square[i] = first + kLanes <= head_dim ? load(row) : load_part(row, head_dim - first);
        }
        transpose(square);
        for (int i = 0; i < kLanes; ++i) store(keys + (first + i) * kKeys + t, square[i]);
      }
    }
  }

  void widen_values(const Chunk<T>& chunk) const {
    for (int64_t t = 0; t < chunk.num_tokens; ++t) read_row(values + t * padded, chunk.rows[t], 1, head_dim);
  }

  // Turns a row's scores into weights, 0 where the token may not look.
  void weigh_row(int64_t row, int64_t position, int64_t begin, int64_t num_keys) const {
    float* scores = weights + row * kKeys;
    const int64_t first = max_of(0, position - arguments.window + 1 - begin);
    const int64_t last = min_of(num_keys, position + 1 - begin);  // behind the last visible key
    if (first >= last) {
      for (int64_t t = 0; t < num_keys; ++t) scores[t] = 0.0f;
      factors[row] = 1.0f;
      return;
    }
    bend(scores, num_keys, arguments.soft_cap);
    for (int64_t t = 0; t < first; ++t) scores[t] = -__builtin_inff();
    for (int64_t t = last; t < num_keys; ++t) scores[t] = -__builtin_inff();
    factors[row] = weigh(scores, num_keys, &states[row]);
  }

  void attend(const QueryTile& tile, int64_t rows, int64_t begin, int64_t num_keys) const {
    const int64_t columns = round_up(num_keys);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t t = 0; t < columns; t += kLanes) store(weights + row * kKeys + t, Floats{});
    Product{weights, kKeys, queries, padded, keys, kKeys, rows, columns, head_dim}.run();
    for (int64_t row = 0; row < rows; ++row) {
      weigh_row(row, tile.first_position + row / group, begin, num_keys);
      float* total = totals + row * padded;
      for (int64_t i = 0; i < padded; i += kLanes) store(total + i, load(total + i) * splat(factors[row]));
    }
    Product{totals, padded, weights, kKeys, values, padded, rows, padded, num_keys}.run();
  }

  void run(int64_t item) const {
    const PagedCache& cache = arguments.cache;
    const QueryTile& tile = arguments.tiles[item / cache.num_kv_heads];
    const int64_t kv_head = item % cache.num_kv_heads, rows = tile.num_tokens * group;
    const Pages pages(cache, arguments.tables, tile.sequence, kv_head);
    start(tile, rows, kv_head);
    Chunk<T> chunk;
    const int64_t context = tile.first_position + tile.num_tokens;
    for (int64_t begin = max_of(0, tile.first_position - arguments.window + 1); begin < context; begin += kKeys) {
      const int64_t end = min_of(context, begin + kKeys);
      pages.find(cache.keys, begin, end, &chunk);
      widen_keys(chunk);
      pages.find(cache.values, begin, end, &chunk);
      widen_values(chunk);
      attend(tile, rows, begin, end - begin);
    }
    finish(tile, rows, kv_head);
  }
};

template <class T>
void prefill(const PrefillArguments& arguments, int64_t begin, int64_t end) {
  int64_t max_tokens = 0;
  for (int64_t item = begin; item < end; ++item)
    max_tokens = max_of(max_tokens, arguments.tiles[item / arguments.cache.num_kv_heads].num_tokens);
  const Prefill<T> work(arguments, max_tokens);
  for (int64_t item = begin; item < end; ++item) work.run(item);
}
