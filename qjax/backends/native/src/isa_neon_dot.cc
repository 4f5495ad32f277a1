// NEON with dot products: four products of signed bytes a lane.
#define QJAX_HAS_BYTES
#include <arm_neon.h>
#include <string.h>

#include "kernels.h"

namespace qjax {
namespace {

struct V {
  using Reg = int32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kMostAccumulators = 24;

  static Reg load(const int32_t* from) { return vld1q_s32(from); }
  static void store(int32_t* to, Reg x) { vst1q_s32(to, x); }
  static Reg set(int32_t x) { return vdupq_n_s32(x); }
  static Reg add(Reg a, Reg b) { return vaddq_s32(a, b); }
  static Reg multiply(Reg a, Reg b) { return vmulq_s32(a, b); }
  static Reg minimum(Reg a, Reg b) { return vminq_s32(a, b); }
  static Reg maximum(Reg a, Reg b) { return vmaxq_s32(a, b); }
  static Reg both(Reg a, Reg b) { return vandq_s32(a, b); }
  static Reg right(Reg x, Reg count) { return vshlq_s32(x, vnegq_s32(count)); }
  static Reg sign(Reg x) { return vshrq_n_s32(x, 31); }
  static Reg positive(Reg x) {
    return vreinterpretq_s32_u32(vcgtq_s32(x, vdupq_n_s32(0)));
  }
  static Reg high_word(Reg acc, Reg m) {
    const int64x2_t low = vmull_s32(vget_low_s32(acc), vget_low_s32(m));
    const int64x2_t high = vmull_high_s32(acc, m);
    return vshrn_high_n_s64(vshrn_n_s64(low, 32), high, 32);
  }
  // Saturates at 2^31 alone, which accumulators of these forms do not reach.
  static Reg doubled_high(Reg acc, Reg m) { return vqrdmulhq_s32(acc, m); }


  template <class T>
  static void narrow(T* out, Reg x, int64_t n) {
    alignas(16) int32_t kept[kLanes];
    store(kept, x);
    if (n == kLanes) {
      for (int i = 0; i < kLanes; ++i) out[i] = static_cast<T>(kept[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(kept[i]);
    }
  }

  struct Pairs {
    int16x8_t low, high;
  };
  using Halves = int16x8_t;
  static Halves halves(const int16_t* from) { return vld1q_s16(from); }
  static Halves halves(const int8_t* from) { return vmovl_s8(vld1_s8(from)); }
  static Halves halves(const uint8_t* from) {
    return vreinterpretq_s16_u16(vmovl_u8(vld1_u8(from)));
  }
  static Pairs interleave(Halves a, Halves b) {
    return {vzip1q_s16(a, b), vzip2q_s16(a, b)};
  }
  static int channel_of(int place) { return place; }
  template <class T>
  static void narrow_pair(T* out, Reg low, Reg high) {
    narrow(out, low, kLanes);
    narrow(out + kLanes, high, kLanes);
  }
};

struct Bytes {
  using Code = int8_t;
  using Weight = int8_t;
  using Operand = int8x16_t;
  static constexpr int kTaps = 4;

  static Operand broadcast(const Code* codes) {
    int32_t four;
    memcpy(&four, codes, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
  static Operand weights(const Weight* from) { return vld1q_s8(from); }
  static V::Reg dot(V::Reg acc, Operand code, Operand weight) {
    return vdotq_s32(acc, code, weight);
  }
};

struct Shorts {
  using Code = int16_t;
  using Weight = int16_t;
  using Operand = int16x8_t;
  static constexpr int kTaps = 2;

  static Operand broadcast(const Code* codes) {
    int32_t pair;
    memcpy(&pair, codes, 4);
    return vreinterpretq_s16_s32(vdupq_n_s32(pair));
  }
  static Operand weights(const Weight* from) { return vld1q_s16(from); }
  static Operand widened(const int8_t* from) { return vmovl_s8(vld1_s8(from)); }
  static V::Reg dot(V::Reg acc, Operand code, Operand weight) {
    const int32x4_t low = vmull_s16(vget_low_s16(code), vget_low_s16(weight));
    const int32x4_t high = vmull_high_s16(code, weight);
    return vaddq_s32(acc, vpaddq_s32(low, high));
  }
};

}  // namespace
}  // namespace qjax

#include "tiles.h"
//
#include "wide.h"

namespace qjax {

const Kernels kNeonDot = {
    "neon_dot", V::kLanes, Bytes::kTaps, 0, Signs::kSigned, Shorts::kTaps, V::channel_of,
    run_bytes, nullptr, run_shorts, run_narrow, run_depthwise, no_byte_depthwise,
    run_rows, run_stage, run_pair_sum, QJAX_WIDE, run_peak};

}  // namespace qjax
