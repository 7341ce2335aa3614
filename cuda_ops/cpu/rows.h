// What is done to rows one by one: writing the cache, norms, rotary embedding, gated activation, softmax.
#pragma once

// One token's heads into its slot of a cache.
template <class T>
INLINE void write_heads(void* cache, const Strided& source, int64_t token, int64_t slot, int64_t num_kv_heads,
                        int64_t block_size, int64_t head_dim) {
  const int64_t block = slot / block_size, offset = slot % block_size;
  const T* from = static_cast<const T*>(source.data) + token * source.strides[0];
  T* to = static_cast<T*>(cache) + (block * num_kv_heads * block_size + offset) * head_dim;
  for (int64_t head = 0; head < num_kv_heads; ++head) {
    if (source.strides[2] == 1) {
      __builtin_memcpy(to, from, head_dim * sizeof(T));
    } else {
      for (int64_t i = 0; i < head_dim; ++i) to[i] = from[i * source.strides[2]];
    }
    from += source.strides[1];
    to += block_size * head_dim;
  }
}

template <class T>
void write_kv(const WriteArguments& a, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    write_heads<T>(a.key_cache, a.key, token, a.slots[token], a.num_kv_heads, a.block_size, a.head_dim);
    write_heads<T>(a.value_cache, a.value, token, a.slots[token], a.num_kv_heads, a.block_size, a.head_dim);
  }
}

template <class T>
struct Norm {
  const NormArguments& arguments;
  const int64_t size, whole, padded;  // elements; in whole vectors; with the last vector filled up
  Scratch scratch;
  float* const row;

  explicit Norm(const NormArguments& a)
      : arguments(a),
        size(a.size),
        whole(a.size / kLanes * kLanes),
        padded(round_up(a.size)),
        scratch(padded),
        row(scratch.take(padded)) {}

  void read(int64_t index) const {
    const Strided& x = arguments.x;
    const T* from = static_cast<const T*>(x.data) + index / arguments.inner * x.strides[0] +
                    index % arguments.inner * x.strides[1];
    read_row(row, from, x.strides[2], size);
    if (arguments.residual == nullptr) return;
    // The sum is rounded to the residual's type first: what is normalised is what the next layer adds to.
    T* residual = static_cast<T*>(arguments.residual) + index * arguments.residual_stride;
    for (int64_t i = 0; i < whole; i += kLanes) {
      store(residual + i, load(row + i) + load(residual + i));
      store(row + i, load(residual + i));
    }
    if (whole == size) return;
    store_part(residual + whole, load(row + whole) + load_part(residual + whole, size - whole), size - whole);
    store(row + whole, load_part(residual + whole, size - whole));
  }

  // Lanes past the end hold 0 and add nothing.
  float sum() const {
    Floats sum{};
    for (int64_t i = 0; i < padded; i += kLanes) sum += load(row + i);
    return sum_of(sum);
  }

  float sum_of_squares() const {
    Floats sum{};
    for (int64_t i = 0; i < padded; i += kLanes) sum += load(row + i) * load(row + i);
    return sum_of(sum);
  }

  void subtract(float mean) const {
    for (int64_t i = 0; i < padded; i += kLanes) store(row + i, load(row + i) - splat(mean));
    for (int64_t i = size; i < padded; ++i) row[i] = 0.0f;
  }

  void write(int64_t index, float factor) const {
    const T* weight = static_cast<const T*>(arguments.weight);
    const T* bias = static_cast<const T*>(arguments.bias);
    T* out = static_cast<T*>(arguments.out) + index * size;
    const Floats one = splat(1.0f), scale = splat(factor);
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Floats gain = weight ? load(weight + i) : one, shift = bias ? load(bias + i) : Floats{};
      store(out + i, load(row + i) * scale * gain + shift);
    }
    const int64_t rest = size - whole;
    if (rest == 0) return;
    const Floats gain = weight ? load_part(weight + whole, rest) : one;
    const Floats shift = bias ? load_part(bias + whole, rest) : Floats{};
    store_part(out + whole, load(row + whole) * scale * gain + shift, rest);
  }
};

INLINE float inverse_root(float mean_square, float eps) { return 1.0f / __builtin_sqrtf(mean_square + eps); }

template <class T>
void rms_norm(const NormArguments& arguments, int64_t begin, int64_t end) {
  const Norm<T> norm(arguments);
  for (int64_t index = begin; index < end; ++index) {
    norm.read(index);
    norm.write(index, inverse_root(norm.sum_of_squares() / norm.size, arguments.eps));
  }
}

template <class T>
void layer_norm(const NormArguments& arguments, int64_t begin, int64_t end) {
  const Norm<T> norm(arguments);
  for (int64_t index = begin; index < end; ++index) {
    norm.read(index);
    norm.subtract(norm.sum() / norm.size);
    norm.write(index, inverse_root(norm.sum_of_squares() / norm.size, arguments.eps));
  }
}

template <class T>
INLINE void rotate_head(T* head, int64_t stride, const float* cos, const float* sin, int64_t half) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= half; i += kLanes) {
      const Floats c = load(cos + i), s = load(sin + i);
      const Floats first = load(head + i), second = load(head + half + i);
      store(head + i, first * c - second * s);
      store(head + half + i, second * c + first * s);
    }
  }
  for (; i < half; ++i) {
    const float first = widen(head[i * stride]), second = widen(head[(half + i) * stride]);
    head[i * stride] = narrow<T>(first * cos[i] - second * sin[i]);
    head[(half + i) * stride] = narrow<T>(second * cos[i] + first * sin[i]);
  }
}

template <class T>
INLINE void rotate_heads(const Strided& heads, int64_t token, int64_t count, const float* cos, int64_t half) {
  T* head = static_cast<T*>(heads.data) + token * heads.strides[0];
  for (int64_t h = 0; h < count; ++h, head += heads.strides[1])
    rotate_head(head, heads.strides[2], cos, cos + half, half);
}

template <class T>
void rotary(const RotaryArguments& a, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const float* cos = a.cos_sin + token * a.cos_sin_stride;
    rotate_heads<T>(a.query, token, a.num_heads, cos, a.half);
    rotate_heads<T>(a.key, token, a.num_kv_heads, cos, a.half);
  }
}

// A head on its way through the norm and the rotation, in float32; `to` may be `from`.
template <class T>
struct TurnedHead {
  const RotaryWriteArguments& arguments;
  const int64_t size, half, padded;
  Scratch scratch;
  float* const row;
  float* const query_gain;  // null without a norm
  float* const key_gain;

  explicit TurnedHead(const RotaryWriteArguments& a)
      : arguments(a),
        size(a.head_dim),
        half(a.half),
        padded(round_up(a.head_dim)),
        scratch(3 * padded),
        row(scratch.take(padded)),
        query_gain(widened(a.query_weight)),
        key_gain(widened(a.key_weight)) {}

  float* widened(const void* weight) {
    if (weight == nullptr) return nullptr;
    float* gain = scratch.take(padded);
    read_row(gain, static_cast<const T*>(weight), 1, size);
    return gain;
  }

  // Elements side by side, half of what turns in whole vectors: a head goes from load to store once.
  template <bool kHasNorm>
  INLINE void turn_vectors(T* to, const T* from, const float* gain, const float* cos) const {
    Floats scale{};
    if constexpr (kHasNorm) {
      Floats sum{};
      int64_t i = 0;
      for (; i + kLanes <= size; i += kLanes) sum += load(from + i) * load(from + i);
      const Floats rest = i < size ? load_part(from + i, size - i) : Floats{};
      scale = splat(inverse_root(sum_of(sum + rest * rest) / size, arguments.eps));
    }
    const auto normed = [&](Floats values, int64_t i) {
      if constexpr (kHasNorm) return values * scale * load(gain + i);
      else return values;
    };
    for (int64_t i = 0; i < half; i += kLanes) {
      const Floats c = load(cos + i), s = load(cos + half + i);
      const Floats first = normed(load(from + i), i), second = normed(load(from + half + i), half + i);
      store(to + i, first * c - second * s);
      store(to + half + i, second * c + first * s);
    }
    int64_t i = 2 * half;
    for (; i + kLanes <= size; i += kLanes) store(to + i, normed(load(from + i), i));
    if (i < size) store_part(to + i, normed(load_part(from + i, size - i), i), size - i);
  }

  void turn_anyhow(T* to, int64_t to_stride, const T* from, int64_t from_stride, const float* gain,
                   const float* cos) const {
    read_row(row, from, from_stride, size);
    if (gain != nullptr) {
      Floats sum{};
      for (int64_t i = 0; i < padded; i += kLanes) sum += load(row + i) * load(row + i);
      const Floats scale = splat(inverse_root(sum_of(sum) / size, arguments.eps));
      for (int64_t i = 0; i < padded; i += kLanes) store(row + i, load(row + i) * scale * load(gain + i));
    }
    rotate_head(row, 1, cos, cos + half, half);
    write_row(to, to_stride, row, size);
  }

  void turn(T* to, int64_t to_stride, const T* from, int64_t from_stride, const float* gain, const float* cos) const {
    if (to_stride != 1 || from_stride != 1 || half % kLanes != 0) {
      turn_anyhow(to, to_stride, from, from_stride, gain, cos);
    } else if (gain != nullptr) {
      turn_vectors<true>(to, from, gain, cos);
    } else {
      turn_vectors<false>(to, from, gain, cos);
    }
  }
};

template <class T>
void rotary_write_kv(const RotaryWriteArguments& a, int64_t begin, int64_t end) {
  const TurnedHead<T> head(a);
  for (int64_t token = begin; token < end; ++token) {
    const float* cos = a.cos_sin + token * a.cos_sin_stride;
    T* query = static_cast<T*>(a.query.data) + token * a.query.strides[0];
    for (int64_t h = 0; h < a.num_heads; ++h, query += a.query.strides[1])
      head.turn(query, a.query.strides[2], query, a.query.strides[2], head.query_gain, cos);
    const T* key = static_cast<const T*>(a.key.data) + token * a.key.strides[0];
    const int64_t block = a.slots[token] / a.block_size, offset = a.slots[token] % a.block_size;
    T* to = static_cast<T*>(a.key_cache) + (block * a.num_kv_heads * a.block_size + offset) * a.head_dim;
    for (int64_t h = 0; h < a.num_kv_heads; ++h, key += a.key.strides[1], to += a.block_size * a.head_dim)
      head.turn(to, 1, key, a.key.strides[2], head.key_gain, cos);
    write_heads<T>(a.value_cache, a.value, token, a.slots[token], a.num_kv_heads, a.block_size, a.head_dim);
  }
}

INLINE Floats silu(Floats x) { return x / (splat(1.0f) + exponential(-x)); }

// By tanh, written as a sigmoid: 0.5 (1 + tanh(u)) is 1 / (1 + exp(-2 u)), which loses nothing where u is negative.
INLINE Floats gelu(Floats x) {
  const Floats doubled = (x + x * x * x * splat(0.044715f)) * splat(1.5957691216f);
  return x / (splat(1.0f) + exponential(-doubled));
}

template <class T, Floats (*activate)(Floats)>
void gate_and_mul(const GateArguments& a, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const T* gate = static_cast<const T*>(a.x) + index * a.row_stride;
    const T* up = gate + a.size;
    T* out = static_cast<T*>(a.out) + index * a.size;
    int64_t i = 0;
    for (; i + kLanes <= a.size; i += kLanes) store(out + i, activate(load(gate + i)) * load(up + i));
    const int64_t rest = a.size - i;
    if (rest) store_part(out + i, activate(load_part(gate + i, rest)) * load_part(up + i, rest), rest);
  }
}

template <class T>
INLINE float largest_of(const T* row, int64_t size) {
  Floats top = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) top = larger(load(row + i), top);
  float largest = max_of_lanes(top);
  for (; i < size; ++i) largest = widen(row[i]) > largest ? widen(row[i]) : largest;
  return largest;
}

template <class T>
void softmax_at(const SoftmaxArguments& a, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const T* row = static_cast<const T*>(a.logits) + index * a.row_stride;
    float* out = a.out + index * a.size;
    const float largest = largest_of(row, a.size);
    // Divided, not multiplied by an inverse: that of a tiny temperature is infinite.
    const Floats top = splat(largest), temperature = splat(a.temperatures[index]);
    Floats sums{};
    int64_t i = 0;
    for (; i + kLanes <= a.size; i += kLanes) {
      const Floats weights = exponential((load(row + i) - top) / temperature);
      store(out + i, weights);
      sums += weights;
    }
    float sum = sum_of(sums);
    for (; i < a.size; ++i) {
      out[i] = exponential((widen(row[i]) - largest) / a.temperatures[index]);
      sum += out[i];
    }
    const Floats total = splat(sum);
    for (i = 0; i + kLanes <= a.size; i += kLanes) store(out + i, load(out + i) / total);
    for (; i < a.size; ++i) out[i] /= sum;
  }
}

constexpr int64_t kSearched = 32 * kLanes;  // elements looked through before it is asked whether one was it

INLINE bool is_any(Ints lanes) {
  int any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= lanes[lane];
  return any != 0;
}

// The first run of `kSearched` elements that holds what is looked for, or where whole runs end.
template <class T>
INLINE int64_t find_run(const T* row, int64_t size, float value, bool wants_nan) {
  int64_t begin = 0;
  for (; begin + kSearched <= size; begin += kSearched) {
    Ints found{};
    for (int64_t i = begin; i < begin + kSearched; i += kLanes) {
      const Floats part = load(row + i);
      found |= wants_nan ? (part != part) : (part == splat(value));
    }
    if (is_any(found)) break;
  }
  return begin;
}

// One pass for the largest, or for any NaN, which counts as larger; another, mostly shorter, for its place.
template <class T>
void argmax(const ArgmaxArguments& a, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const T* row = static_cast<const T*>(a.logits) + index * a.row_stride;
    Floats top = splat(-__builtin_inff());
    Ints is_nan{};
    int64_t i = 0;
    for (; i + kLanes <= a.size; i += kLanes) {
      const Floats part = load(row + i);
      top = larger(part, top);
      is_nan |= part != part;
    }
    float largest = max_of_lanes(top);
    bool has_nan = is_any(is_nan);
    for (; i < a.size; ++i) {
      const float value = widen(row[i]);
      largest = value > largest ? value : largest;
      has_nan = has_nan || value != value;
    }
    int64_t place = find_run(row, a.size, largest, has_nan);
    for (; place + 1 < a.size; ++place) {
      const float value = widen(row[place]);
      if (has_nan ? value != value : value == largest) break;
    }
    a.out[index] = place;
  }
}
