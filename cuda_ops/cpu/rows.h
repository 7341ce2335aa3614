// What is done to rows one by one: writing the cache, norms, rotary embedding, gated activation, softmax.
#pragma once

template <class T>
void write_kv(const WriteArguments& a, int64_t begin, int64_t end) {
  const Strided* sources[] = {&a.key, &a.value};
  void* caches[] = {a.key_cache, a.value_cache};
  for (int64_t token = begin; token < end; ++token) {
    const int64_t block = a.slots[token] / a.block_size, offset = a.slots[token] % a.block_size;
    for (int which = 0; which < 2; ++which) {
      const Strided& source = *sources[which];
      const T* from = static_cast<const T*>(source.data) + token * source.strides[0];
      T* to = static_cast<T*>(caches[which]) +
              (block * a.num_kv_heads * a.block_size + offset) * a.head_dim;
      for (int64_t head = 0; head < a.num_kv_heads; ++head) {
        if (source.strides[2] == 1) {
          __builtin_memcpy(to, from, a.head_dim * sizeof(T));
        } else {
          for (int64_t i = 0; i < a.head_dim; ++i) to[i] = from[i * source.strides[2]];
        }
        from += source.strides[1];
        to += a.block_size * a.head_dim;
      }
    }
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

// One pass for the largest, or for any NaN, which counts as larger; another, mostly short, for its place.
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
    bool has_nan = false;
    for (int lane = 0; lane < kLanes; ++lane) has_nan = has_nan || is_nan[lane] != 0;
    for (; i < a.size; ++i) {
      const float value = widen(row[i]);
      largest = value > largest ? value : largest;
      has_nan = has_nan || value != value;
    }
    int64_t place = 0;
    for (; place + 1 < a.size; ++place) {
      const float value = widen(row[place]);
      if (has_nan ? value != value : value == largest) break;
    }
    a.out[index] = place;
  }
}
