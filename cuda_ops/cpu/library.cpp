// The library's face: checks tensors, shares a call's items out among torch's threads, and registers with
// torch's dispatcher. Built on the stable ABI of torch 2.11, so one file serves every later torch.
//
// Nothing is registered when the library is loaded; `throughline_cpu_use` does that, and says at which level.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "recording.h"
#include "sharing.h"

namespace throughline {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Level {
  const char* name;
  const Kernels* kernels;
  bool (*is_supported)();
};

bool always() { return true; }
#if defined(__x86_64__)
bool has_v3() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"); }
bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
bool has_v4_bf16_vnni() {
  return has_v4() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
#endif

const Level kLevels[] = {  // best first
#if defined(__x86_64__)
    {"x86-64-v4-bf16-vnni", &x86_64_v4_bf16_vnni::kernels, has_v4_bf16_vnni},
    {"x86-64-v4", &x86_64_v4::kernels, has_v4},
    {"x86-64-v3", &x86_64_v3::kernels, has_v3},
#endif
    {"baseline", &baseline::kernels, always},
};

const Level* level_in_use = nullptr;

template <class Arguments>
void run(const ByType<Arguments>& kernels, ScalarType type, const Arguments& arguments, int64_t num_items,
         int64_t elements) {
  if (num_items == 0) return;
  const auto kernel = type == ScalarType::Float ? kernels.float32 : kernels.bfloat16;
  const Call<Arguments> call{kernel, arguments, num_items, elements};
  call(torch::stable::get_num_threads());
  if (recording != nullptr) recording->add(call);
}

int64_t size_of(ScalarType type) {
  return type == ScalarType::Long ? 8 : type == ScalarType::Float ? 4 : type == ScalarType::BFloat16 ? 2 : 1;
}

// Memory for what an op makes.
Tensor new_output(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  if (recording != nullptr) return recording->make(like, sizes, type, size_of(type));
  return torch::stable::new_empty(like, sizes, type);
}

std::vector<int64_t> shape_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

Tensor copy_contiguous(const Tensor& x) {
  if (recording != nullptr) recording->refuse();
  return torch::stable::contiguous(x);
}

ScalarType type_of(const char* op, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, op, ": float32 or bfloat16 is needed");
  return type;
}

void check_type(const char* op, const char* name, const Tensor& tensor, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, op, ": ", name, " has another dtype than the op needs");
}

void check_shape(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool is_right = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (const int64_t size : shape) is_right = is_right && tensor.size(axis++) == size;
  STD_TORCH_CHECK(is_right, op, ": ", name, " has another shape than the other arguments ask for");
}

void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
}

Strided strided(const Tensor& tensor) {
  return {tensor.data_ptr(), {tensor.stride(0), tensor.stride(1), tensor.stride(2)}};
}

PagedCache cache_of(const char* op, const Tensor& keys, const Tensor& values, ScalarType type) {
  STD_TORCH_CHECK(keys.dim() == 4, op, ": key_cache must have four axes");
  check_shape(op, "value_cache", values, {keys.size(0), keys.size(1), keys.size(2), keys.size(3)});
  check_type(op, "key_cache", keys, type);
  check_type(op, "value_cache", values, type);
  check_contiguous(op, "key_cache", keys);
  check_contiguous(op, "value_cache", values);
  return {keys.data_ptr(), values.data_ptr(), keys.size(1), keys.size(2), keys.size(3)};
}

void check_heads(const char* op, const Tensor& out, const Tensor& query, const PagedCache& cache) {
  STD_TORCH_CHECK(query.dim() == 3 && query.size(2) == cache.head_dim, op, ": query does not fit key_cache");
  STD_TORCH_CHECK(query.size(1) % cache.num_kv_heads == 0, op, ": query heads must be a multiple of key heads");
  check_shape(op, "out", out, {query.size(0), query.size(1), query.size(2)});
  check_type(op, "out", out, query.scalar_type());
}

int64_t window_of(const char* op, const std::optional<int64_t>& sliding_window) {
  STD_TORCH_CHECK(!sliding_window || *sliding_window >= 1, op, ": sliding_window must be at least 1");
  return sliding_window.value_or(std::numeric_limits<int64_t>::max());
}

float cap_of(const char* op, const std::optional<double>& soft_cap) {
  STD_TORCH_CHECK(!soft_cap || *soft_cap > 0, op, ": soft_cap must be above 0");
  return static_cast<float>(soft_cap.value_or(std::numeric_limits<double>::infinity()));
}

// Kernels follow tables blindly, so each context's entries are looked at here; 64 sequences cost a microsecond.
BlockTables check_tables(const char* op, const Tensor& tables, const Tensor& lengths, const Tensor& key_cache) {
  if (recording != nullptr)
    recording->add_check({tables.data_ptr(), lengths.data_ptr()}, [=] { check_tables(op, tables, lengths, key_cache); });
  check_type(op, "block_tables", tables, ScalarType::Int);
  check_type(op, "context_lens", lengths, ScalarType::Int);
  check_contiguous(op, "context_lens", lengths);
  STD_TORCH_CHECK(tables.dim() == 2 && tables.size(0) == lengths.size(0), op, ": block_tables needs a row a sequence");
  STD_TORCH_CHECK(tables.stride(1) == 1 || tables.size(1) <= 1, op, ": rows of block_tables must be contiguous");
  const BlockTables result{static_cast<const int32_t*>(tables.data_ptr()), tables.stride(0)};
  const auto* lens = static_cast<const int32_t*>(lengths.data_ptr());
  const int64_t block_size = key_cache.size(2), num_blocks = key_cache.size(0);
  for (int64_t sequence = 0; sequence < lengths.size(0); ++sequence) {
    const int64_t used = (lens[sequence] + block_size - 1) / block_size;
    STD_TORCH_CHECK(lens[sequence] >= 1 && used <= tables.size(1), op, ": a context length does not fit block_tables");
    const int32_t* row = result.blocks + sequence * result.row_stride;
    for (int64_t i = 0; i < used; ++i)
      STD_TORCH_CHECK(row[i] >= 0 && row[i] < num_blocks, op, ": block_tables names a block that is not there");
  }
  return result;
}

void paged_attention_decode(Tensor out, Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables,
                            Tensor context_lens, int64_t max_context_len, double scale,
                            std::optional<int64_t> sliding_window, std::optional<double> soft_cap,
                            std::optional<int64_t> /*split_len: its parts are of one length always*/) {
  const char* op = "paged_attention_decode";
  const ScalarType type = type_of(op, query);
  const PagedCache cache = cache_of(op, key_cache, value_cache, type);
  check_heads(op, out, query, cache);
  STD_TORCH_CHECK(query.size(0) == context_lens.size(0), op, ": query needs a row a sequence");
  const BlockTables tables = check_tables(op, block_tables, context_lens, key_cache);
  const DecodeArguments arguments{strided(out), strided(query), cache, tables,
                                  static_cast<const int32_t*>(context_lens.data_ptr()), query.size(1),
                                  window_of(op, sliding_window), static_cast<float>(scale), cap_of(op, soft_cap)};
  const int64_t items = query.size(0) * cache.num_kv_heads;
  run(level_in_use->kernels->decode, type, arguments, items, items * cache.head_dim * max_context_len);
}

// A tile's rows are tokens times heads that share a key head. Many rows spread the cost of widening keys and values;
// in a short context they would waste more on what causality hides.
int64_t tile_tokens(int64_t context, int64_t group) { return std::max<int64_t>(1, (context > 1024 ? 64 : 32) / group); }

std::vector<QueryTile> tiles_of(const Tensor& query_start, const Tensor& context_lens, int64_t num_rows, int64_t group) {
  const char* op = "paged_attention_prefill";
  check_type(op, "query_start", query_start, ScalarType::Int);
  check_contiguous(op, "query_start", query_start);
  check_shape(op, "query_start", query_start, {context_lens.size(0) + 1});
  const auto* starts = static_cast<const int32_t*>(query_start.data_ptr());
  const auto* lens = static_cast<const int32_t*>(context_lens.data_ptr());
  std::vector<QueryTile> tiles;
  for (int64_t sequence = 0; sequence < context_lens.size(0); ++sequence) {
    const int64_t begin = starts[sequence], end = starts[sequence + 1];
    STD_TORCH_CHECK(0 <= begin && begin <= end && end <= num_rows, op, ": query_start does not fit query");
    STD_TORCH_CHECK(end - begin <= lens[sequence], op, ": a sequence has more queries than context");
    const int64_t tokens = tile_tokens(lens[sequence], group);
    for (int64_t row = begin; row < end; row += tokens)
      tiles.push_back({sequence, row, std::min(tokens, end - row), lens[sequence] - (end - row)});
  }
  return tiles;
}

void paged_attention_prefill(Tensor out, Tensor query, Tensor key_cache, Tensor value_cache, Tensor query_start,
                             Tensor context_lens, Tensor block_tables, double scale,
                             std::optional<int64_t> sliding_window, std::optional<double> soft_cap) {
  const char* op = "paged_attention_prefill";
  const ScalarType type = type_of(op, query);
  const PagedCache cache = cache_of(op, key_cache, value_cache, type);
  check_heads(op, out, query, cache);
  const BlockTables tables = check_tables(op, block_tables, context_lens, key_cache);
  if (recording != nullptr) recording->refuse();
  const auto tiles = tiles_of(query_start, context_lens, query.size(0), query.size(1) / cache.num_kv_heads);
  const PrefillArguments arguments{strided(out), strided(query), cache, tables, tiles.data(), query.size(1),
                                   window_of(op, sliding_window), static_cast<float>(scale), cap_of(op, soft_cap)};
  const int64_t items = static_cast<int64_t>(tiles.size()) * cache.num_kv_heads;
  run(level_in_use->kernels->prefill, type, arguments, items, items * 32 * 32 * cache.head_dim);
}

const int64_t* check_slots(const char* op, const Tensor& slot_mapping, int64_t num_slots) {
  if (recording != nullptr)
    recording->add_check({slot_mapping.data_ptr(), nullptr}, [=] { check_slots(op, slot_mapping, num_slots); });
  const auto* slots = static_cast<const int64_t*>(slot_mapping.data_ptr());
  for (int64_t token = 0; token < slot_mapping.size(0); ++token)
    STD_TORCH_CHECK(slots[token] >= 0 && slots[token] < num_slots, op, ": slot_mapping names a slot that is not there");
  return slots;
}

void write_kv(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slot_mapping) {
  const char* op = "write_kv";
  const ScalarType type = type_of(op, key);
  const PagedCache cache = cache_of(op, key_cache, value_cache, type);
  const int64_t num_tokens = key.size(0), num_slots = key_cache.size(0) * cache.block_size;
  check_shape(op, "key", key, {num_tokens, cache.num_kv_heads, cache.head_dim});
  check_shape(op, "value", value, {num_tokens, cache.num_kv_heads, cache.head_dim});
  check_type(op, "value", value, type);
  check_type(op, "slot_mapping", slot_mapping, ScalarType::Long);
  check_shape(op, "slot_mapping", slot_mapping, {num_tokens});
  check_contiguous(op, "slot_mapping", slot_mapping);
  const int64_t* slots = check_slots(op, slot_mapping, num_slots);
  const WriteArguments arguments{strided(key), strided(value), key_cache.data_ptr(), value_cache.data_ptr(), slots,
                                 cache.num_kv_heads, cache.block_size, cache.head_dim};
  run(level_in_use->kernels->write_kv, type, arguments, num_tokens, 2 * key.numel());
}

// Rows in at most two outer axes; tensors of other shapes are copied first.
Tensor as_rows(const Tensor& x) { return x.dim() <= 3 ? x : copy_contiguous(x); }

Strided rows_of(const Tensor& x, int64_t* inner) {
  const int64_t dim = x.dim(), size = x.size(dim - 1);
  *inner = dim == 3 ? x.size(1) : std::max<int64_t>(1, dim < 2 ? 1 : x.numel() / std::max<int64_t>(1, size));
  if (dim == 3) return strided(x);
  return {x.data_ptr(), {0, dim == 1 ? 0 : x.stride(dim - 2), x.stride(dim - 1)}};
}

const void* affine(const char* op, const char* name, const std::optional<Tensor>& tensor, const Tensor& x) {
  if (!tensor) return nullptr;
  check_type(op, name, *tensor, x.scalar_type());
  check_shape(op, name, *tensor, {x.size(x.dim() - 1)});
  check_contiguous(op, name, *tensor);
  return tensor->data_ptr();
}

Tensor normalise(const char* op, const ByType<NormArguments>& kernels, const Tensor& given, const Tensor* residual,
                 const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps) {
  const ScalarType type = type_of(op, given);
  STD_TORCH_CHECK(given.dim() >= 1, op, ": x needs an axis");
  const Tensor x = as_rows(given);
  const Tensor out = new_output(given, shape_of(given), type);
  NormArguments arguments{};
  arguments.x = rows_of(x, &arguments.inner);
  if (residual != nullptr) {
    check_type(op, "residual", *residual, type);
    STD_TORCH_CHECK(given.dim() == 2, op, ": x must have two axes");
    check_shape(op, "residual", *residual, {given.size(0), given.size(1)});
    STD_TORCH_CHECK(residual->stride(1) == 1 || given.size(1) <= 1, op, ": rows of residual must be contiguous");
    arguments.residual = residual->data_ptr();
    arguments.residual_stride = residual->stride(0);
  }
  arguments.weight = affine(op, "weight", weight, given);
  arguments.bias = affine(op, "bias", bias, given);
  arguments.out = out.data_ptr();
  arguments.size = given.size(given.dim() - 1);
  arguments.eps = static_cast<float>(eps);
  const int64_t rows = arguments.size == 0 ? 0 : given.numel() / arguments.size;
  run(kernels, type, arguments, rows, given.numel());
  return out;
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  return normalise("rms_norm", level_in_use->kernels->rms_norm, x, nullptr, weight, std::nullopt, eps);
}

Tensor add_rms_norm(Tensor x, Tensor residual, Tensor weight, double eps) {
  return normalise("add_rms_norm", level_in_use->kernels->rms_norm, x, &residual, weight, std::nullopt, eps);
}

Tensor layer_norm(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps) {
  return normalise("layer_norm", level_in_use->kernels->layer_norm, x, nullptr, weight, bias, eps);
}

Tensor add_layer_norm(Tensor x, Tensor residual, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps) {
  return normalise("add_layer_norm", level_in_use->kernels->layer_norm, x, &residual, weight, bias, eps);
}

void rotary_embedding(Tensor query, Tensor key, Tensor cos_sin) {
  const char* op = "rotary_embedding";
  const ScalarType type = type_of(op, query);
  STD_TORCH_CHECK(query.dim() == 3 && cos_sin.dim() == 2, op, ": query needs three axes, cos_sin two");
  check_shape(op, "key", key, {query.size(0), key.size(1), query.size(2)});
  check_type(op, "key", key, type);
  check_type(op, "cos_sin", cos_sin, ScalarType::Float);
  STD_TORCH_CHECK(cos_sin.size(0) == query.size(0) && cos_sin.size(1) <= query.size(2) && cos_sin.size(1) % 2 == 0, op,
                  ": cos_sin does not fit query");
  STD_TORCH_CHECK(cos_sin.stride(1) == 1 || cos_sin.size(1) <= 1, op, ": rows of cos_sin must be contiguous");
  const RotaryArguments arguments{strided(query), strided(key), static_cast<const float*>(cos_sin.data_ptr()),
                                  cos_sin.stride(0), query.size(1), key.size(1), cos_sin.size(1) / 2};
  run(level_in_use->kernels->rotary, type, arguments, query.size(0), query.numel() + key.numel());
}

Tensor gate_and_mul(const char* op, ByType<GateArguments> Kernels::*kernel, Tensor given) {
  const ScalarType type = type_of(op, given);
  STD_TORCH_CHECK(given.dim() >= 1 && given.size(given.dim() - 1) % 2 == 0, op, ": the last axis must be even");
  const bool is_plain = given.dim() == 2 && given.stride(1) == 1;
  const Tensor x = is_plain ? given : copy_contiguous(given);
  const int64_t width = x.size(x.dim() - 1);
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = width / 2;
  const Tensor out = new_output(x, shape, type);
  const GateArguments arguments{x.data_ptr(), is_plain ? x.stride(0) : width, out.data_ptr(), width / 2};
  run(level_in_use->kernels->*kernel, type, arguments, width == 0 ? 0 : x.numel() / width, x.numel());
  return out;
}

Tensor silu_and_mul(Tensor x) { return gate_and_mul("silu_and_mul", &Kernels::silu_and_mul, x); }

Tensor gelu_and_mul(Tensor x) { return gate_and_mul("gelu_and_mul", &Kernels::gelu_and_mul, x); }

Tensor softmax_at(Tensor logits, Tensor temperatures) {
  const char* op = "softmax_at";
  const ScalarType type = type_of(op, logits);
  STD_TORCH_CHECK(logits.dim() == 2, op, ": logits needs two axes");
  STD_TORCH_CHECK(logits.stride(1) == 1 || logits.size(1) <= 1, op, ": rows of logits must be contiguous");
  check_type(op, "temperatures", temperatures, ScalarType::Float);
  check_shape(op, "temperatures", temperatures, {logits.size(0)});
  check_contiguous(op, "temperatures", temperatures);
  const Tensor out = new_output(logits, shape_of(logits), ScalarType::Float);
  const SoftmaxArguments arguments{logits.data_ptr(), logits.stride(0),
                                   static_cast<const float*>(temperatures.data_ptr()),
                                   static_cast<float*>(out.data_ptr()), logits.size(1)};
  run(level_in_use->kernels->softmax_at, type, arguments, logits.size(0), logits.numel());
  return out;
}

Tensor argmax(Tensor given) {
  const char* op = "argmax";
  const ScalarType type = type_of(op, given);
  STD_TORCH_CHECK(given.dim() == 2 && given.size(1) >= 1, op, ": logits needs two axes and a column");
  const Tensor logits = given.stride(1) == 1 || given.size(1) == 1 ? given : copy_contiguous(given);
  const Tensor out = new_output(logits, {logits.size(0)}, ScalarType::Long);
  const ArgmaxArguments arguments{logits.data_ptr(), logits.stride(0), static_cast<int64_t*>(out.data_ptr()),
                                  logits.size(1)};
  run(level_in_use->kernels->argmax, type, arguments, logits.size(0), logits.numel());
  return out;
}

// Rows as a kernel reads them: contiguous, and of whole words.
struct WordRows {
  Tensor memory;
  const void* data;
  int64_t stride_bytes;
};

WordRows as_words(const Tensor& x, int64_t num_groups) {
  const int64_t size = size_of(x.scalar_type()), row_bytes = x.size(1) * size;
  if (row_bytes == 4 * num_groups) return {x, x.data_ptr(), x.stride(0) * size};
  if (recording != nullptr) recording->refuse();
  const Tensor padded = torch::stable::new_empty(x, {x.size(0), 4 * num_groups / size});
  for (int64_t row = 0; row < x.size(0); ++row) {
    char* to = static_cast<char*>(padded.data_ptr()) + row * 4 * num_groups;
    std::memcpy(to, static_cast<const char*>(x.data_ptr()) + row * x.stride(0) * size, row_bytes);
    std::memset(to + row_bytes, 0, 4 * num_groups - row_bytes);
  }
  return {padded, padded.data_ptr(), 4 * num_groups};
}

// The rows of a block stay in a core's cache while panel after panel passes.
constexpr int64_t kBlockBytes = 512 * 1024;

void check_panels(const char* op, const Tensor& panels, int64_t num_inputs, int64_t num_outputs) {
  const int64_t inputs_a_group = 4 / size_of(panels.scalar_type());
  check_contiguous(op, "panels", panels);
  check_shape(op, "panels", panels,
              {(num_outputs + 31) / 32, (num_inputs + inputs_a_group - 1) / inputs_a_group, 32, inputs_a_group});
}

// Quantised rows, which `arguments` then points to.
WordRows quantise_rows(const Tensor& x, LinearArguments& arguments, Tensor& scales) {
  const int64_t stride = 4 * arguments.num_groups;
  const Tensor values = new_output(x, {x.size(0), stride}, ScalarType::Byte);
  const QuantiseArguments quantise{x.data_ptr(), x.stride(0), static_cast<uint8_t*>(values.data_ptr()),
                                   static_cast<float*>(scales.data_ptr()), x.size(1), stride};
  run(level_in_use->kernels->quantise, x.scalar_type(), quantise, x.size(0), x.numel());
  arguments.x_scales = quantise.scales;
  return {values, values.data_ptr(), stride};
}

Tensor linear(Tensor given, Tensor panels, std::optional<Tensor> scales, std::optional<Tensor> sums,
              std::optional<Tensor> bias, int64_t num_outputs, bool has_relu, bool gives_float32) {
  const char* op = "linear";
  const ScalarType type = type_of(op, given);
  STD_TORCH_CHECK(given.dim() == 2 && num_outputs >= 0, op, ": x must have two axes");
  const bool is_int8 = scales.has_value();
  check_type(op, "panels", panels, is_int8 ? ScalarType::Char : type);
  check_panels(op, panels, given.size(1), num_outputs);
  const Tensor x = given.stride(1) == 1 || given.size(1) <= 1 ? given : copy_contiguous(given);
  const ScalarType out_type = gives_float32 ? ScalarType::Float : type;
  const Tensor out = new_output(x, {x.size(0), num_outputs}, out_type);
  LinearArguments arguments{};
  arguments.weight = panels.data_ptr();
  arguments.out = out.data_ptr();
  arguments.writes_float32 = gives_float32;
  arguments.has_relu = has_relu;
  arguments.num_rows = x.size(0);
  arguments.num_outputs = num_outputs;
  arguments.num_groups = panels.size(1);
  arguments.num_panels = panels.size(0);
  arguments.block_rows = std::max<int64_t>(16, kBlockBytes / std::max<int64_t>(1, 4 * arguments.num_groups));
  if (bias) {
    check_type(op, "bias", *bias, type);
    check_shape(op, "bias", *bias, {num_outputs});
    check_contiguous(op, "bias", *bias);
    arguments.bias = bias->data_ptr();
  }
  Tensor row_scales = out;
  if (is_int8) {
    STD_TORCH_CHECK(sums.has_value(), op, ": an int8 weight needs scales and sums");
    check_type(op, "scales", *scales, ScalarType::Float);
    check_type(op, "sums", *sums, ScalarType::Int);
    check_shape(op, "scales", *scales, {num_outputs});
    check_shape(op, "sums", *sums, {num_outputs});
    check_contiguous(op, "scales", *scales);
    check_contiguous(op, "sums", *sums);
    arguments.scales = static_cast<const float*>(scales->data_ptr());
    arguments.sums = static_cast<const int32_t*>(sums->data_ptr());
    row_scales = new_output(x, {x.size(0)}, ScalarType::Float);
  }
  const WordRows rows = is_int8 ? quantise_rows(x, arguments, row_scales) : as_words(x, arguments.num_groups);
  arguments.x = rows.data;
  arguments.x_stride_bytes = rows.stride_bytes;
  const int64_t blocks = (arguments.num_rows + arguments.block_rows - 1) / arguments.block_rows;
  const auto& kernels = is_int8 ? level_in_use->kernels->linear_int8 : level_in_use->kernels->linear;
  run(kernels, type, arguments, blocks * arguments.num_panels, panels.numel() * arguments.num_rows);
  return out;
}

const int64_t* check_indices(const char* op, const Tensor& indices, int64_t offset, int64_t num_rows) {
  if (recording != nullptr)
    recording->add_check({indices.data_ptr(), op}, [=] { check_indices(op, indices, offset, num_rows); });
  check_type(op, "indices", indices, ScalarType::Long);
  STD_TORCH_CHECK(indices.dim() == 1, op, ": indices must have one axis");
  check_contiguous(op, "indices", indices);
  const auto* values = static_cast<const int64_t*>(indices.data_ptr());
  for (int64_t i = 0; i < indices.size(0); ++i)
    STD_TORCH_CHECK(values[i] + offset >= 0 && values[i] + offset < num_rows, op, ": indices name a row that is not there");
  return values;
}

Tensor panel_rows(Tensor panels, std::optional<Tensor> scales, Tensor indices, int64_t num_outputs, int64_t num_inputs,
                  bool gives_float32) {
  const char* op = "panel_rows";
  check_panels(op, panels, num_inputs, num_outputs);
  const bool is_int8 = scales.has_value();
  const ScalarType type = gives_float32 ? ScalarType::Float : ScalarType::BFloat16;
  check_type(op, "panels", panels, is_int8 ? ScalarType::Char : type);
  if (is_int8) {
    check_type(op, "scales", *scales, ScalarType::Float);
    check_shape(op, "scales", *scales, {num_outputs});
    check_contiguous(op, "scales", *scales);
  }
  const int64_t* rows = check_indices(op, indices, 0, num_outputs);
  const Tensor out = new_output(panels, {indices.size(0), num_inputs}, type);
  const PanelRowsArguments arguments{panels.data_ptr(),
                                     is_int8 ? static_cast<const float*>(scales->data_ptr()) : nullptr,
                                     rows, out.data_ptr(), panels.size(1), num_inputs};
  const auto& kernels = is_int8 ? level_in_use->kernels->panel_rows_int8 : level_in_use->kernels->panel_rows;
  run(kernels, type, arguments, indices.size(0), out.numel() * 4);
  return out;
}

void add_to_rows(const char* op, const Tensor& x, const Tensor& table, const int64_t* indices, int64_t offset) {
  const ScalarType type = type_of(op, x);
  STD_TORCH_CHECK(x.dim() == 2 && table.dim() == 2 && x.size(1) == table.size(1), op, ": rows must be of one size");
  check_type(op, "table", table, type);
  for (const Tensor* rows : {&x, &table})
    STD_TORCH_CHECK(rows->stride(1) == 1 || rows->size(1) <= 1, op, ": rows must be contiguous");
  const AddRowsArguments arguments{x.data_ptr(), x.stride(0), table.data_ptr(), table.stride(0),
                                   indices, offset, x.size(1)};
  run(level_in_use->kernels->add_rows, type, arguments, x.size(0), 2 * x.numel());
}

void add_rows(Tensor x, Tensor table, Tensor indices, int64_t offset) {
  const char* op = "add_rows";
  STD_TORCH_CHECK(x.dim() == 2 && table.dim() == 2, op, ": x and table must have two axes");
  const int64_t* rows = check_indices(op, indices, offset, table.size(0));
  check_shape(op, "indices", indices, {x.size(0)});
  add_to_rows(op, x, table, rows, offset);
}

void add(Tensor x, Tensor delta) {
  STD_TORCH_CHECK(x.dim() == 2, "add: x must have two axes");
  check_shape("add", "delta", delta, {x.size(0), x.size(1)});
  add_to_rows("add", x, delta, nullptr, 0);
}

std::unique_ptr<torch::stable::detail::StableLibrary> registration;

void register_ops() {
  using torch::stable::detail::StableLibrary;
  registration = std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "throughline", "CPU", __FILE__, __LINE__);
  registration->impl("paged_attention_decode", TORCH_BOX(&paged_attention_decode));
  registration->impl("paged_attention_prefill", TORCH_BOX(&paged_attention_prefill));
  registration->impl("write_kv", TORCH_BOX(&write_kv));
  registration->impl("rms_norm", TORCH_BOX(&rms_norm));
  registration->impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  registration->impl("layer_norm", TORCH_BOX(&layer_norm));
  registration->impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  registration->impl("rotary_embedding", TORCH_BOX(&rotary_embedding));
  registration->impl("silu_and_mul", TORCH_BOX(&silu_and_mul));
  registration->impl("gelu_and_mul", TORCH_BOX(&gelu_and_mul));
  registration->impl("softmax_at", TORCH_BOX(&softmax_at));
  registration->impl("argmax", TORCH_BOX(&argmax));
  registration->impl("linear", TORCH_BOX(&linear));
  registration->impl("panel_rows", TORCH_BOX(&panel_rows));
  registration->impl("add_rows", TORCH_BOX(&add_rows));
  registration->impl("add", TORCH_BOX(&add));
}

}  // namespace
}  // namespace throughline

#define EXPORT extern "C" __attribute__((visibility("default")))

// Names the levels that this machine can run, best first, separated by spaces.
EXPORT const char* throughline_cpu_levels() {
  static const std::string names = [] {
    std::string joined;
    for (const auto& level : throughline::kLevels)
      if (level.is_supported()) joined += (joined.empty() ? "" : " ") + std::string(level.name);
    return joined;
  }();
  return names.c_str();
}

// Lets torch's dispatcher call this library for tensors on the CPU, at the named level. Returns 0, or 1 where
// this machine has no such level, or 2 where torch refused the registration. Not while an op runs.
EXPORT int throughline_cpu_use(const char* name) {
  for (const auto& level : throughline::kLevels) {
    if (std::string(name) != level.name || !level.is_supported()) continue;
    throughline::level_in_use = &level;
    try {
      if (!throughline::registration) throughline::register_ops();
    } catch (...) {
      throughline::registration.reset();
      return 2;
    }
    return 0;
  }
  return 1;
}

// Gives the ops back to their reference. Not while an op runs.
EXPORT void throughline_cpu_release() { throughline::registration.reset(); }

// Arenas and recordings, as handles; none is for two threads at once. See recording.h.
using ArenaHandle = std::shared_ptr<throughline::Arena>;

EXPORT void* throughline_cpu_arena_new() { return new ArenaHandle(std::make_shared<throughline::Arena>()); }
EXPORT void throughline_cpu_arena_free(void* arena) { delete static_cast<ArenaHandle*>(arena); }

// Null where there is no memory.
EXPORT void* throughline_cpu_arena_take(void* arena, int64_t num_bytes) {
  try {
    return (*static_cast<ArenaHandle*>(arena))->take(num_bytes);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
EXPORT void throughline_cpu_arena_give(void* arena, void* piece) { (*static_cast<ArenaHandle*>(arena))->give(piece); }

EXPORT void* throughline_cpu_recording_new(void* arena) {
  return new throughline::Recording(*static_cast<ArenaHandle*>(arena));
}
EXPORT void throughline_cpu_recording_free(void* recording) { delete static_cast<throughline::Recording*>(recording); }

// From here on this thread's calls are taken down; null ends that.
EXPORT void throughline_cpu_record(void* recording) {
  throughline::recording = static_cast<throughline::Recording*>(recording);
}
EXPORT int64_t throughline_cpu_recording_size(void* recording) {
  return static_cast<throughline::Recording*>(recording)->size();
}

// Whether all that was done since `size` is in the recording; where not, those calls are dropped from it.
EXPORT bool throughline_cpu_recording_keeps(void* recording, int64_t size) {
  auto* calls = static_cast<throughline::Recording*>(recording);
  if (!calls->take_refusal() && calls->size() > size) return true;
  calls->truncate(size);
  return false;
}

// Makes the calls of [begin, end) again. Null, or what was wrong with what they read; lives until the next failure.
EXPORT const char* throughline_cpu_replay(void* recording, int64_t begin, int64_t end, int64_t num_threads) {
  static thread_local std::string problem;
  try {
    static_cast<const throughline::Recording*>(recording)->replay(begin, end, num_threads);
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}
