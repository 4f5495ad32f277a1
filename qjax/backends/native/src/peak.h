// The fastest that products can be: sums in registers, as many as
// hide how long one takes.
// After tiles.h.
#include "kernels.h"

namespace qjax {
namespace {

#ifdef QJAX_HAS_BYTES
using PeakMode = Bytes;
#else
using PeakMode = Shorts;
#endif

constexpr int kSums = V::kMostAccumulators < 16 ? V::kMostAccumulators : 16;

// Adds up products `rounds` times and returns how many there were.
int64_t run_peak(int64_t rounds) {
  typename PeakMode::Code codes[16] = {3, 5, 7, 9};
  typename PeakMode::Weight weights[64] = {1, 2, 3};
  V::Reg acc[kSums];
  QJAX_UNROLL for (int i = 0; i < kSums; ++i) acc[i] = V::set(i);
  for (int64_t k = 0; k < rounds; ++k) {
    // What both hold is not known to the compiler, which would multiply once for all.
    __asm__ volatile("" : : "r"(codes), "r"(weights) : "memory");
    const auto code = PeakMode::broadcast(codes);
    const auto weight = PeakMode::weights(weights);
    QJAX_UNROLL for (int i = 0; i < kSums; ++i) {
      acc[i] = PeakMode::dot(acc[i], code, weight);
    }
  }
  QJAX_UNROLL for (int i = 1; i < kSums; ++i) acc[0] = V::add(acc[0], acc[i]);
  alignas(64) int32_t kept[V::kLanes];
  V::store(kept, acc[0]);
  volatile int32_t used = kept[0];
  (void)used;
  return rounds * kSums * V::kLanes * PeakMode::kTaps;
}

}  // namespace
}  // namespace qjax
