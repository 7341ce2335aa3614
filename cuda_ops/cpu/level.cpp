// All kernels for one instruction level: compiled once for each, with THROUGHLINE_LEVEL naming it and the
// compiler told of its instructions. Everything is in an unnamed namespace, so that no level's code can stand
// in for another's.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace throughline {
namespace {

#include "vector.h"
#include "decode.h"
#include "prefill.h"
#include "rows.h"
#include "linear.h"
#include "lookup.h"

}  // namespace

namespace THROUGHLINE_LEVEL {

extern const Kernels kernels = {
    {decode<float>, decode<BFloat16>},
    {prefill<float>, prefill<BFloat16>},
    {write_kv<float>, write_kv<BFloat16>},
    {rms_norm<float>, rms_norm<BFloat16>},
    {layer_norm<float>, layer_norm<BFloat16>},
    {rotary<float>, rotary<BFloat16>},
    {rotary_write_kv<float>, rotary_write_kv<BFloat16>},
    {gate_and_mul<float, silu>, gate_and_mul<BFloat16, silu>},
    {gate_and_mul<float, gelu>, gate_and_mul<BFloat16, gelu>},
    {softmax_at<float>, softmax_at<BFloat16>},
    {argmax<float>, argmax<BFloat16>},
    {quantise<float>, quantise<BFloat16>},
    {linear<float, float>, linear<BFloat16, BFloat16>},
    {linear<float, Int8>, linear<BFloat16, Int8>},
    {panel_rows<float, float>, panel_rows<BFloat16, BFloat16>},
    {panel_rows<float, Int8>, panel_rows<BFloat16, Int8>},
    {add_rows<float>, add_rows<BFloat16>},
};

}  // namespace THROUGHLINE_LEVEL
}  // namespace throughline
