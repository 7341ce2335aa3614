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

#include "checks.h"
#include "recording.h"
#include "kernels.h"
#include "sharing.h"

namespace throughline {
namespace {

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

void write_kv(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slot_mapping) {
  const char* op = "write_kv";
  const ScalarType type = type_of(op, key);
  const PagedCache cache = cache_of(op, key_cache, value_cache, type);
  const int64_t* slots = check_slots(op, key, value, slot_mapping, cache, key_cache.size(0));
  const WriteArguments arguments{strided(key), strided(value), key_cache.data_ptr(), value_cache.data_ptr(), slots,
                                 cache.num_kv_heads, cache.block_size, cache.head_dim};
  run(level_in_use->kernels->write_kv, type, arguments, key.size(0), 2 * key.numel());
}

// Rows in at most two outer axes; tensors of other shapes are copied first.
Tensor as_rows(const Tensor& x) { return x.dim() <= 3 ? x : copy_contiguous(x); }

Strided rows_of(const Tensor& x, int64_t* inner) {
  const int64_t dim = x.dim(), size = x.size(dim - 1);
  *inner = dim == 3 ? x.size(1) : std::max<int64_t>(1, dim < 2 ? 1 : x.numel() / std::max<int64_t>(1, size));
  if (dim == 3) return strided(x);
  return {x.data_ptr(), {0, dim == 1 ? 0 : x.stride(dim - 2), x.stride(dim - 1)}};
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
  check_rotation(op, query, key, cos_sin);
  const RotaryArguments arguments{strided(query), strided(key), static_cast<const float*>(cos_sin.data_ptr()),
                                  cos_sin.stride(0), query.size(1), key.size(1), cos_sin.size(1) / 2};
  run(level_in_use->kernels->rotary, type, arguments, query.size(0), query.numel() + key.numel());
}

void rotary_write_kv(Tensor query, Tensor key, Tensor value, Tensor cos_sin, std::optional<Tensor> query_weight,
                     std::optional<Tensor> key_weight, double eps, Tensor key_cache, Tensor value_cache,
                     Tensor slot_mapping) {
  const char* op = "rotary_write_kv";
  const ScalarType type = type_of(op, query);
  check_rotation(op, query, key, cos_sin);
  const PagedCache cache = cache_of(op, key_cache, value_cache, type);
  RotaryWriteArguments arguments{};
  arguments.slots = check_slots(op, key, value, slot_mapping, cache, key_cache.size(0));
  arguments.query = strided(query);
  arguments.key = strided(key);
  arguments.value = strided(value);
  arguments.cos_sin = static_cast<const float*>(cos_sin.data_ptr());
  arguments.cos_sin_stride = cos_sin.stride(0);
  arguments.query_weight = affine(op, "query_weight", query_weight, query);
  arguments.key_weight = affine(op, "key_weight", key_weight, key);
  arguments.key_cache = key_cache.data_ptr();
  arguments.value_cache = value_cache.data_ptr();
  arguments.num_heads = query.size(1);
  arguments.num_kv_heads = cache.num_kv_heads;
  arguments.block_size = cache.block_size;
  arguments.head_dim = cache.head_dim;
  arguments.half = cos_sin.size(1) / 2;
  arguments.eps = static_cast<float>(eps);
  run(level_in_use->kernels->rotary_write_kv, type, arguments, query.size(0), query.numel() + 2 * key.numel());
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
  registration->impl("rotary_write_kv", TORCH_BOX(&rotary_write_kv));
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
