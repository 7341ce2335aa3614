// What the library asks of one instruction level: plain pointers and numbers, nothing of torch.
//
// A kernel computes the items [begin, end) of its arguments, on the calling thread; the library shares items
// out among threads. Items are independent, so which thread takes which changes no result. Strides and sizes
// count elements. Everything was checked before.
#pragma once

#include <cstdint>

namespace throughline {

struct Strided {  // a tensor of up to three axes
  void* data;
  int64_t strides[3];
};

struct PagedCache {  // [num_blocks, num_kv_heads, block_size, head_dim], contiguous
  const void* keys;
  const void* values;
  int64_t num_kv_heads;
  int64_t block_size;
  int64_t head_dim;
};

struct BlockTables {
  const int32_t* blocks;  // [num_sequences, width]
  int64_t row_stride;
};

struct DecodeArguments {  // an item is one key head of one sequence, with the query heads that read it
  Strided out;            // [num_sequences, num_heads, head_dim]
  Strided query;          // the same
  PagedCache cache;
  BlockTables tables;
  const int32_t* context_lens;
  int64_t num_heads;
  int64_t window;  // tokens that a token sees, itself included; INT64_MAX is all of them
  float scale;
  float soft_cap;  // infinity bends nothing
};

struct QueryTile {  // consecutive tokens of one sequence that attend together
  int64_t sequence;
  int64_t first_row;       // in `query` and `out`
  int64_t num_tokens;
  int64_t first_position;  // of the first token, in the sequence's context
};

struct PrefillArguments {  // an item is one key head of one tile
  Strided out;             // [num_tokens, num_heads, head_dim]
  Strided query;           // the same
  PagedCache cache;
  BlockTables tables;
  const QueryTile* tiles;
  int64_t num_heads;
  int64_t window;
  float scale;
  float soft_cap;
};

struct WriteArguments {  // an item is a token
  Strided key;           // [num_tokens, num_kv_heads, head_dim]
  Strided value;
  void* key_cache;
  void* value_cache;
  const int64_t* slots;
  int64_t num_kv_heads;
  int64_t block_size;
  int64_t head_dim;
};

struct NormArguments {  // an item is a row
  Strided x;            // [outer, inner, size]
  void* residual;       // [rows, size], receives x first; null: x is normalised as it is
  int64_t residual_stride;
  const void* weight;  // [size]; null is 1
  const void* bias;    // [size]; null is 0
  void* out;           // [rows, size], contiguous
  int64_t inner;       // rows in the middle axis of x
  int64_t size;
  float eps;
};

struct RotaryArguments {  // an item is a token
  Strided query;          // [num_tokens, num_heads, head_dim]
  Strided key;
  const float* cos_sin;  // [num_tokens, 2 * half]
  int64_t cos_sin_stride;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t half;
};

struct RotaryWriteArguments {  // an item is a token
  Strided query;               // [num_tokens, num_heads, head_dim]
  Strided key;                 // [num_tokens, num_kv_heads, head_dim]
  Strided value;
  const float* cos_sin;  // [num_tokens, 2 * half]
  int64_t cos_sin_stride;
  const void* query_weight;  // [head_dim]; null is no norm
  const void* key_weight;
  void* key_cache;
  void* value_cache;
  const int64_t* slots;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t block_size;
  int64_t head_dim;
  int64_t half;
  float eps;
};

struct GateArguments {  // an item is a row
  const void* x;        // [rows, 2 * size]
  int64_t row_stride;
  void* out;  // [rows, size], contiguous
  int64_t size;
};

struct SoftmaxArguments {  // an item is a row
  const void* logits;      // [rows, size]
  int64_t row_stride;
  const float* temperatures;  // [rows]
  float* out;                 // [rows, size], contiguous
  int64_t size;
};

struct ArgmaxArguments {  // an item is a row
  const void* logits;     // [rows, size], size at least 1
  int64_t row_stride;
  int64_t* out;  // [rows]
  int64_t size;
};

struct QuantiseArguments {  // an item is a row
  const void* x;            // [num_rows, size]
  int64_t x_stride;
  uint8_t* values;          // [num_rows, stride], contiguous: value / scale + 128, and 128 after the last
  float* scales;            // [num_rows]
  int64_t size;
  int64_t stride;
};

struct LinearArguments {  // an item is a panel of outputs for a block of rows; see linear.h
  const void* x;          // [num_rows, 4 bytes * num_groups], zeros after the inputs
  int64_t x_stride_bytes;
  const void* weight;     // [num_panels, num_groups, 32 words]
  const void* bias;       // [num_outputs]; null is 0
  const float* x_scales;  // [num_rows], of int8 rows
  const float* scales;    // [num_outputs], of an int8 weight
  const int32_t* sums;    // [num_outputs], 128 times the sum of an int8 weight's row
  void* out;              // [num_rows, num_outputs], contiguous
  bool writes_float32;    // out is float32 whatever x is
  bool has_relu;          // what is below 0 becomes 0
  int64_t num_rows;
  int64_t num_outputs;
  int64_t num_groups;
  int64_t num_panels;
  int64_t block_rows;
};

struct PanelRowsArguments {  // an item is a row
  const void* panels;     // [num_panels, num_groups, 32 words]
  const float* scales;    // [num_outputs], of an int8 weight; null is 1
  const int64_t* indices; // [num_rows], of the weight's rows
  void* out;              // [num_rows, num_inputs], contiguous
  int64_t num_groups;
  int64_t num_inputs;
};

struct AddRowsArguments {  // an item is a row
  void* x;                 // [num_rows, size]
  int64_t x_stride;
  const void* table;       // [any, size]
  int64_t table_stride;
  const int64_t* indices;  // [num_rows]; null is each row's own
  int64_t offset;
  int64_t size;
};

template <class Arguments>
using Kernel = void (*)(const Arguments&, int64_t begin, int64_t end);

template <class Arguments>
struct ByType {
  Kernel<Arguments> float32;
  Kernel<Arguments> bfloat16;
};

struct Kernels {
  ByType<DecodeArguments> decode;
  ByType<PrefillArguments> prefill;
  ByType<WriteArguments> write_kv;
  ByType<NormArguments> rms_norm;
  ByType<NormArguments> layer_norm;
  ByType<RotaryArguments> rotary;
  ByType<RotaryWriteArguments> rotary_write_kv;
  ByType<GateArguments> silu_and_mul;
  ByType<GateArguments> gelu_and_mul;
  ByType<SoftmaxArguments> softmax_at;
  ByType<ArgmaxArguments> argmax;
  ByType<QuantiseArguments> quantise;
  ByType<LinearArguments> linear;       // with a weight of the same type
  ByType<LinearArguments> linear_int8;  // with a weight of int8 and rows that are quantised
  ByType<PanelRowsArguments> panel_rows;
  ByType<PanelRowsArguments> panel_rows_int8;
  ByType<AddRowsArguments> add_rows;
};

// One translation unit each, compiled for its instructions.
namespace baseline { extern const Kernels kernels; }
namespace x86_64_v3 { extern const Kernels kernels; }
namespace x86_64_v4 { extern const Kernels kernels; }
namespace x86_64_v4_bf16_vnni { extern const Kernels kernels; }

}  // namespace throughline
