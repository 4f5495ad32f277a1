// Roundings of integers by shifts: the formulas of qjax/graph/operations/shifts.py.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace qjax {
namespace {

// value / 2^shift, halves to even.
inline int64_t half_even(__int128 value, int shift) {
  if (shift == 0) return static_cast<int64_t>(value);
  const __int128 whole = value >> shift, rest = value - whole * (static_cast<__int128>(1) << shift);
  const __int128 half = static_cast<__int128>(1) << (shift - 1);
  const bool is_up = rest > half || (rest == half && (whole & 1));
  return static_cast<int64_t>(whole + (is_up ? 1 : 0));
}

inline int64_t to_float32(int64_t x) {
  return static_cast<int64_t>(static_cast<float>(x));
}

// acc * multiplier * 2^-shift, rounded by a rule. `acc` fits int32, but for
// `kHalfEven`, which takes 33 bits.
inline int64_t rescaled(int64_t acc, int32_t multiplier, int32_t shift, Rule rule) {
  if (rule == Rule::kFloat32) {
    const int64_t product = to_float32(to_float32(acc) * multiplier);
    return half_even(product, shift);
  }
  if (rule == Rule::kTfliteSingle) {
    const uint64_t half = (uint64_t{1} << shift) >> 1;
    const uint64_t factor = static_cast<uint64_t>(static_cast<int64_t>(multiplier));
    return static_cast<int64_t>(static_cast<uint64_t>(acc) * factor + half) >> shift;
  }
  if (rule == Rule::kTfliteDouble) {
    const int left = shift < 31 ? 31 - shift : 0, right = shift > 31 ? shift - 31 : 0;
    const int32_t wrapped =
        static_cast<int32_t>(static_cast<uint64_t>(acc) << left);
    const int64_t product = static_cast<int64_t>(wrapped) * multiplier;
    int64_t high = (product + (int64_t{1} << 30)) >> 31;
    high = high > INT32_MAX ? INT32_MAX : high;
    const int64_t rest = (int64_t{1} << right) - 1;
    return (high >> right) + ((high & rest) > (rest >> 1) + (high < 0) ? 1 : 0);
  }
  return half_even(static_cast<__int128>(acc) * multiplier, shift);
}

inline int32_t coded(int64_t steps, int32_t zero_point, int32_t low, int32_t high) {
  const int64_t code = steps + zero_point;
  return static_cast<int32_t>(code < low ? low : code > high ? high : code);
}

}  // namespace
}  // namespace qjax
