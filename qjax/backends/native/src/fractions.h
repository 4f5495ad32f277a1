// Fixed-point functions of gemmlowp and TFLite: qjax/graph/operations/fractions.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

namespace qjax {
namespace {

// Products of gemmlowp: a * b / 2^31, halves up, by a nudge, truncated; saturates.
inline int64_t high_product(int64_t a, int64_t b) {
  const int64_t product = a * b;
  const int64_t nudge = product >= 0 ? int64_t{1} << 30 : 1 - (int64_t{1} << 30);
  return std::min<int64_t>((product + nudge) / (int64_t{1} << 31), INT32_MAX);
}

// x / 2^n to nearest, halves away from zero.
inline int64_t divided_by_power(int64_t x, int n) {
  const int64_t rest = (int64_t{1} << n) - 1;
  return (x >> n) + ((x & rest) > (rest >> 1) + (x < 0) ? 1 : 0);
}

inline int64_t held(int64_t x) {
  return std::min<int64_t>(std::max<int64_t>(x, INT32_MIN), INT32_MAX);
}

// Bits of a positive integer.
inline int length_of(int64_t x) {
  return 64 - __builtin_clzll(static_cast<uint64_t>(x));
}

// gemmlowp's 1 / (1 + x) for x in [0, 1), with 31 bits of fraction.
inline int64_t newton(int64_t x) {
  const int64_t total = x + INT32_MAX;
  const int64_t half = (total + (total >= 0 ? 1 : -1)) / 2;
  int64_t y = 1515870810 + high_product(half, -1010580540);
  for (int step = 0; step < 3; ++step) {
    const int64_t rest = (int64_t{1} << 29) - high_product(half, y);
    y += held(high_product(y, rest) * 4);
  }
  return held(y * 2);
}

constexpr int64_t kLog2 = 1488522236, kHalfRoot = 1518500250;
constexpr int64_t kQuarterRoot = 1805811301;

// log(x) with 5 bits before the point, of x from 2 to 2^31 - 1 with 12.
inline int64_t logarithm(int64_t x) {
  const int own = 32 - length_of(x);
  const int64_t below = high_product(x, kHalfRoot);
  const int other = 31 - length_of(below);
  const int64_t a = held(high_product(x << (own - 1), kHalfRoot) * 2);
  const int64_t b = held(x << other);
  constexpr int64_t kQuarter = 1 << 23, kUnit = 1 << 25;
  const int64_t power = std::max((12 - own) * kUnit + kQuarter,
                                 (12 - other) * kUnit - kQuarter);
  const int64_t rest = std::min(a, b);
  const int64_t middle = (rest + kQuarterRoot + 1) >> 1, q = (rest - kQuarterRoot) * 2;
  const int64_t square = high_product(q, q);
  const int64_t above =
      high_product(q, rest) + high_product(high_product(q, square), 117049297);
  const int64_t under =
      high_product(middle, 1057819769 + q + high_product(127690142, square)) +
      high_product(638450708, q);
  const int64_t part = high_product(divided_by_power(above, 6), newton(under));
  return held((high_product(power, kLog2) + part) * 2);
}

// 1 / sqrt(x) of x >= 0 as multiplier and shift: multiplier * 2^-(31 + shift).
inline std::pair<int32_t, int32_t> inverse_root(int64_t x) {
  if (x <= 1) return {INT32_MAX, 0};
  const bool is_large = x >= 1 << 29;
  x = is_large ? x >> 2 : x;
  const int pairs = (31 - length_of(x)) / 2 - 1;
  const int shift = 11 + is_large - pairs;
  const int64_t half = divided_by_power((x << (2 * pairs)) >> 1, 1);
  int64_t y = 1 << 28;
  for (int step = 0; step < 5; ++step) {
    const int64_t cube = held(high_product(high_product(y, y), y) * 64);
    y = held((high_product(int64_t{3} << 27, y) - high_product(half, cube)) * 8);
  }
  y = high_product(y, kHalfRoot) * (int64_t{1} << std::max(-shift, 0));
  return {static_cast<int32_t>(y), std::max(shift, 0)};
}

}  // namespace
}  // namespace qjax
