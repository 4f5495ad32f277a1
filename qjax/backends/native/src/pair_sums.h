// Sums of two bytes in two parts of 16 bits, found and shown for all pairs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "kernels.h"

namespace qjax {

// Fits clip(floor((A a + B b + C) / 2^s)) to `code(a, b)`, which grows or falls with
// `ratio_a` a + `ratio_b` b from one of `low` to `high` to the next. A and B are the
// ratios in 2^-s; each pair leaves an interval for C, and any C in all of them will do.
// Returns whether there is one. `pair` has the types of a and b.
template <class Code>
bool fit_pair_sum(long double ratio_a, long double ratio_b, int32_t low, int32_t high,
                  const Code& code, PairSum* pair) {
  const long double largest = std::max(std::fabs(ratio_a), std::fabs(ratio_b));
  int exponent = 0;  // largest < 2^exponent
  std::frexp(largest, &exponent);
  const int shift = std::min(largest > 0 ? 30 - exponent : 30, 36);
  if (shift < 17 || low < -(1 << 8) || high > 1 << 8) return false;
  const int64_t m[2] = {std::llrint(std::ldexp(ratio_a, shift)),
                        std::llrint(std::ldexp(ratio_b, shift))};
  const int first_a = pair->is_a_signed ? -128 : 0;
  const int first_b = pair->is_b_signed ? -128 : 0;
  std::vector<int32_t> codes;
  codes.reserve(1 << 16);
  constexpr int64_t kFar = int64_t{1} << 62;
  int64_t least = -kFar, most = kFar;  // least <= C < most
  for (int a = first_a; a < first_a + 256; ++a) {
    for (int b = first_b; b < first_b + 256; ++b) {
      const int64_t c = code(a, b), sum = m[0] * a + m[1] * b, step = int64_t{1} << shift;
      codes.push_back(static_cast<int32_t>(c));
      if (c > low) least = std::max(least, c * step - sum);
      if (c < high) most = std::min(most, (c + 1) * step - sum);
    }
  }
  if (least >= most) return false;
  const int64_t added = least == -kFar  ? (most == kFar ? 0 : most - 1)
                        : most == kFar ? least
                                       : least + (most - least) / 2;
  const int64_t added_high = added >> 16;
  int64_t lo[2], hi[2];
  for (int i = 0; i < 2; ++i) {
    lo[i] = ((m[i] + 32768) & 0xffff) - 32768;
    hi[i] = (m[i] - lo[i]) / 65536;
    if (std::llabs(hi[i]) > INT16_MAX) return false;
  }
  const int64_t far = 255 * (std::llabs(hi[0]) + std::llabs(hi[1])) + 65536;
  if (std::llabs(added_high) + far > INT32_MAX) return false;
  pair->lo_a = static_cast<int16_t>(lo[0]);
  pair->lo_b = static_cast<int16_t>(lo[1]);
  pair->lo_0 = static_cast<int32_t>(added - added_high * 65536);
  pair->hi_a = static_cast<int16_t>(hi[0]);
  pair->hi_b = static_cast<int16_t>(hi[1]);
  pair->hi_0 = static_cast<int32_t>(added_high);
  pair->shift = shift - 16;
  pair->low = low;
  pair->high = high;
  // By the numbers as the kernels take them.
  auto wanted = codes.begin();
  for (int a = first_a; a < first_a + 256; ++a) {
    for (int b = first_b; b < first_b + 256; ++b, ++wanted) {
      const int32_t low_part = a * pair->lo_a + b * pair->lo_b + pair->lo_0;
      const int32_t high_part = a * pair->hi_a + b * pair->hi_b + pair->hi_0;
      const int32_t steps = (high_part + (low_part >> 16)) >> pair->shift;
      if (std::min(std::max(steps, low), high) != *wanted) return false;
    }
  }
  return true;
}

}  // namespace qjax
