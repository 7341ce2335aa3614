// What an op's tensors have to be before a kernel follows their pointers; included by library.cpp only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>

#include "kernels.h"
#include "recording.h"

namespace throughline {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

const int64_t* check_slots(const char* op, const Tensor& slot_mapping, int64_t num_slots) {
  if (recording != nullptr)
    recording->add_check({slot_mapping.data_ptr(), nullptr}, [=] { check_slots(op, slot_mapping, num_slots); });
  const auto* slots = static_cast<const int64_t*>(slot_mapping.data_ptr());
  for (int64_t token = 0; token < slot_mapping.size(0); ++token)
    STD_TORCH_CHECK(slots[token] >= 0 && slots[token] < num_slots, op, ": slot_mapping names a slot that is not there");
  return slots;
}

// Checks keys and values against the cache, and their slots, which kernels follow blindly.
const int64_t* check_slots(const char* op, const Tensor& key, const Tensor& value, const Tensor& slot_mapping,
                           const PagedCache& cache, int64_t num_blocks) {
  const int64_t num_tokens = key.size(0), num_slots = num_blocks * cache.block_size;
  check_shape(op, "key", key, {num_tokens, cache.num_kv_heads, cache.head_dim});
  check_shape(op, "value", value, {num_tokens, cache.num_kv_heads, cache.head_dim});
  check_type(op, "value", value, key.scalar_type());
  check_type(op, "slot_mapping", slot_mapping, ScalarType::Long);
  check_shape(op, "slot_mapping", slot_mapping, {num_tokens});
  check_contiguous(op, "slot_mapping", slot_mapping);
  return check_slots(op, slot_mapping, num_slots);
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

void check_rotation(const char* op, const Tensor& query, const Tensor& key, const Tensor& cos_sin) {
  STD_TORCH_CHECK(query.dim() == 3 && cos_sin.dim() == 2, op, ": query needs three axes, cos_sin two");
  check_shape(op, "key", key, {query.size(0), key.size(1), query.size(2)});
  check_type(op, "key", key, query.scalar_type());
  check_type(op, "cos_sin", cos_sin, ScalarType::Float);
  STD_TORCH_CHECK(cos_sin.size(0) == query.size(0) && cos_sin.size(1) <= query.size(2) && cos_sin.size(1) % 2 == 0, op,
                  ": cos_sin does not fit query");
  STD_TORCH_CHECK(cos_sin.stride(1) == 1 || cos_sin.size(1) <= 1, op, ": rows of cos_sin must be contiguous");
}

const void* affine(const char* op, const char* name, const std::optional<Tensor>& tensor, const Tensor& x) {
  if (!tensor) return nullptr;
  check_type(op, name, *tensor, x.scalar_type());
  check_shape(op, name, *tensor, {x.size(x.dim() - 1)});
  check_contiguous(op, name, *tensor);
  return tensor->data_ptr();
}

}  // namespace
}  // namespace throughline
