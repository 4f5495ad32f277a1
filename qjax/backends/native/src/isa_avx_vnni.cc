// AVX-VNNI: four products of bytes a lane, in 256 bits.
#define QJAX_VNNI_256
#define QJAX_HAS_BYTES
#include "avx2.h"

namespace qjax {
namespace {

struct Bytes {
  using Code = uint8_t;
  using Weight = int8_t;
  using Operand = __m256i;
  static constexpr int kTaps = 4;

  static Operand broadcast(const Code* codes) {
    int32_t four;
    memcpy(&four, codes, 4);
    return _mm256_set1_epi32(four);
  }
  static Operand weights(const Weight* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static V::Reg dot(V::Reg acc, Operand code, Operand weight) {
    return _mm256_dpbusd_avx_epi32(acc, code, weight);
  }
};

}  // namespace
}  // namespace qjax

#include "tiles.h"
//
#include "wide.h"

namespace qjax {

const Kernels kAvxVnni = {
    "avx_vnni", V::kLanes, Bytes::kTaps, 0, Signs::kUnsigned, Shorts::kTaps, V::channel_of,
    run_bytes, nullptr, run_shorts, run_narrow, run_depthwise, no_byte_depthwise,
    run_rows, run_stage, run_pair_sum, QJAX_WIDE, run_peak};

}  // namespace qjax
