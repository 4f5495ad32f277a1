// Kernels of rows in 64 bits: plain loops, which the compiler makes vectors of for the
// set whose file includes this one, after tiles.h. All is in an unnamed namespace.
#include "kernels.h"
#include "pairs.h"
#ifndef QJAX_OWN_PEAK
#include "peak.h"
#endif
#include "rules.h"

namespace qjax {
namespace {

// x / 2^shift, down, of |x| < 2^62. Few sets shift signed integers of 64 bits.
QJAX_INLINE int64_t down(int64_t x, int64_t shift) {
#if defined(__AVX512F__) || defined(__aarch64__)
  return x >> shift;
#else
  constexpr uint64_t far = uint64_t{1} << 62;
  return static_cast<int64_t>(((static_cast<uint64_t>(x) + far) >> shift) - (far >> shift));
#endif
}

// x / 2^shift, halves to even, of |x| < 2^61.
QJAX_INLINE int64_t even(int64_t x, int64_t shift) {
  const int64_t half = (int64_t{1} << shift) >> 1, is_shifted = shift > 0;
  return down(x + half - is_shifted + (down(x, shift) & is_shifted), shift);
}

QJAX_INLINE int64_t within(int64_t x, int64_t low, int64_t high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// Whether an integer of so many bits over 2^shift fits 32 bits, its zero point too.
QJAX_INLINE bool fits_32(int64_t bits, int64_t shift, int64_t zero_point) {
  constexpr int64_t most = int64_t{1} << 30;
  return bits - shift <= 30 && -most < zero_point && zero_point < most;
}

// Calls `use` with a null pointer to the C type of a dtype: `with_type` of plan.h.
template <class Use>
QJAX_INLINE void with_dtype(int64_t dtype, Use&& use) {
  switch (dtype) {
    case 0:
      return use(static_cast<int8_t*>(nullptr));
    case 1:
      return use(static_cast<uint8_t*>(nullptr));
    case 2:
      return use(static_cast<int16_t*>(nullptr));
    case 3:
      return use(static_cast<uint16_t*>(nullptr));
    default:
      return use(static_cast<int32_t*>(nullptr));
  }
}

template <class T>
QJAX_INLINE const T* typed(const void* from, T*) {
  return static_cast<const T*>(from);
}

template <class T>
QJAX_INLINE T* typed(void* from, T*) {
  return static_cast<T*>(from);
}

template <class T>
void widen_row(const T* __restrict from, int64_t n, int32_t zero_point,
               int32_t* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<int32_t>(from[i]) - zero_point;
}

template <class T>
void narrow_row(const int32_t* __restrict from, int64_t n, T* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);
}

template <class T>
void exact_row(const int32_t* __restrict in, int64_t n, const PackedRequantizer& q,
               T* __restrict out) {
  const int32_t* __restrict multiplier = q.multiplier();
  const int32_t* __restrict shift = q.shift();
  const int64_t zero_point = q.input_zero_point, own = q.zero_point;
  const int64_t low = q.low, high = q.high;
  if (q.is_single) {
    const int64_t m = multiplier[0], s = shift[0];
    for (int64_t i = 0; i < n; ++i) {
      const int32_t x = static_cast<int32_t>(in[i] - zero_point);
      out[i] = static_cast<T>(within(even(x * m, s) + own, low, high));
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const int32_t x = static_cast<int32_t>(in[i] - zero_point);
    const int64_t product = static_cast<int64_t>(x) * multiplier[i];
    out[i] = static_cast<T>(within(even(product, shift[i]) + own, low, high));
  }
}

void run_exact_rows(const Rows& r) {
  with_dtype(r.out_dtype, [&](auto* type) {
    auto* out = typed(r.out, type);
    for (int64_t row = 0; row < r.rows; ++row) {
      exact_row(r.in + row * r.channels, r.channels, *r.requantizer,
                out + row * r.channels);
    }
  });
}

// Sums are in the order of their places, or where `QJAX_PAIRS` of the even places of
// each register, then of the odd ones; the last register may be beyond n.
void run_weigh(const Weighted& w) {
#ifdef QJAX_PAIRS
  const auto less = V::set(static_cast<int32_t>(0u - static_cast<uint32_t>(w.zero_point)));
  const auto by = W::set(w.multiplier);
  for (int64_t i = 0; i < w.n; i += V::kLanes) {
    const Pair x = pair_of(V::add(V::load(w.x + i), less));
    auto even = W::product(x.even, by), odd = W::product(x.odd, by);
    if (!w.is_first) {
      even = W::add(even, W::load(w.sums + i));
      odd = W::add(odd, W::load(w.sums + i + V::kLanes / 2));
    }
    W::store(w.sums + i, even);
    W::store(w.sums + i + V::kLanes / 2, odd);
  }
#else
  for (int64_t i = 0; i < w.n; ++i) {
    const int64_t term = static_cast<int64_t>(w.x[i] - w.zero_point) * w.multiplier;
    w.sums[i] = (w.is_first ? 0 : w.sums[i]) + term;
  }
#endif
}

void run_round(const Rounded& r) {
#ifdef QJAX_PAIRS
  const auto low = V::set(r.low), high = V::set(r.high);
  const auto zero_point = V::set(r.zero_point), one = W::set(r.shift > 0);
  const int64_t half = (int64_t{1} << r.shift) >> 1;
  const auto less = W::set(half - (r.shift > 0));
  alignas(64) int64_t kept[V::kLanes];
  for (int64_t i = 0; i < r.n; i += V::kLanes) {
    const auto steps = [&](const int64_t* from) {
      const auto x = W::load(from);
      const auto odd = V::both(W::logical(x, r.shift), one);
      return W::right(W::add(W::add(x, less), odd), r.shift);
    };
    const auto even = steps(r.sums + i), odd = steps(r.sums + i + V::kLanes / 2);
    if (fits_32(61, r.shift, r.zero_point)) {
      const auto code = V::add(W::joined(even, odd), zero_point);
      V::store(r.out + i, V::minimum(V::maximum(code, low), high));
      continue;
    }
    W::store(kept, even);
    W::store(kept + V::kLanes / 2, odd);
    for (int k = 0; k < V::kLanes; ++k) {
      const int64_t own = kept[k / 2 + k % 2 * (V::kLanes / 2)] + r.zero_point;
      r.out[i + k] = static_cast<int32_t>(within(own, r.low, r.high));
    }
  }
#else
  for (int64_t i = 0; i < r.n; ++i) {
    const int64_t code = even(r.sums[i], r.shift) + r.zero_point;
    r.out[i] = static_cast<int32_t>(within(code, r.low, r.high));
  }
#endif
}

// One over a root, an integer of 30 bits and a shift, by Newton's steps.
inline int32_t reciprocal_root(int64_t x, int64_t* shift) {
  const int length = 64 - __builtin_clzll(static_cast<uint64_t>(x));
  const int up = (62 - length) / 2 * 2;
  const uint64_t a = (static_cast<uint64_t>(x) << up) >> 30;
  uint64_t root = 2362232013u - ((1395864371u * a) >> 32);
  for (int step = 0; step < 5; ++step) {
    const uint64_t square = (root * root) >> 30;
    root = (root * ((uint64_t{3} << 30) - ((square * a) >> 32))) >> 31;
  }
  *shift = 60 - up / 2;
  return static_cast<int32_t>(root >> 1);
}

struct Moments {
  int64_t total, squares;
};

inline Moments moments(const int32_t* __restrict x, int64_t n, bool is_small) {
  constexpr int64_t kFew = 1024;  // Squares below 2^20 add up in 32 bits.
  Moments found{0, 0};
  for (int64_t at = 0; at < n; at += kFew) {
    const int64_t end = least(n, at + kFew);
    uint32_t total = 0;  // Of values about zero it is not read.
    for (int64_t i = at; i < end; ++i) total += static_cast<uint32_t>(x[i]);
    found.total += static_cast<int32_t>(total);
    if (is_small) {
      int32_t squares = 0;
      for (int64_t i = at; i < end; ++i) squares += x[i] * x[i];
      found.squares += squares;
    } else {
      int64_t squares = 0;
      for (int64_t i = at; i < end; ++i) squares += static_cast<int64_t>(x[i]) * x[i];
      found.squares += squares;
    }
  }
  return found;
}

// What the values of a row have in common.
struct NormRow {
  int32_t factor, less, root;
  int64_t shift;
  const int32_t* multiplier;
  const int64_t* bias;
};

// Values about their mean or zero become codes. Integers of the formula fit 62 bits: the
// graph's validation has seen to it.
inline void normalise(const NormRows& r, const NormRow& row, int32_t* __restrict x) {
  const int64_t half = (int64_t{1} << row.shift) >> 1;
#ifdef QJAX_PAIRS
  if (fits_32(63, r.shift, r.zero_point)) {
    const auto factor = V::set(row.factor);
    const auto less = V::set(static_cast<int32_t>(0u - static_cast<uint32_t>(row.less)));
    const auto root = W::set(row.root), halves = W::set(half);
    const auto low = V::set(r.low), high = V::set(r.high);
    const auto zero_point = V::set(r.zero_point);
    for (int64_t i = 0; i < r.n; i += V::kLanes) {
      const Pair q = pair_of(V::add(V::multiply(V::load(x + i), factor), less));
      const Pair m = pair_of(V::load(row.multiplier + i));
      const auto steps = [&](V::Reg own, V::Reg by, const int64_t* bias) {
        const auto t = W::right(W::add(W::product(own, root), halves), row.shift);
        return W::right(W::add(W::product(t, by), W::load(bias)), r.shift);
      };
      const auto code = W::joined(steps(q.even, m.even, row.bias + i),
                                  steps(q.odd, m.odd, row.bias + i + V::kLanes / 2));
      V::store(x + i, V::minimum(V::maximum(V::add(code, zero_point), low), high));
    }
    return;
  }
#endif
  const int64_t least = static_cast<int64_t>(r.low) - r.zero_point;
  const int64_t most = static_cast<int64_t>(r.high) - r.zero_point;
  for (int64_t i = 0; i < r.n; ++i) {
    const int32_t q = static_cast<int32_t>(
        static_cast<uint32_t>(x[i]) * static_cast<uint32_t>(row.factor) -
        static_cast<uint32_t>(row.less));
    const int64_t t = down(static_cast<int64_t>(q) * row.root + half, row.shift);
    const int64_t lane = i % V::kLanes;
    const int64_t at = i - lane + lane / 2 + lane % 2 * (V::kLanes / 2);
    const int64_t acc = t * row.multiplier[i] + row.bias[at];
    x[i] = static_cast<int32_t>(within(down(acc, r.shift), least, most)) + r.zero_point;
  }
}

void run_norm(const NormRows& r) {
  int32_t* x = r.scratch;
  for (int64_t row = 0; row < r.rows; ++row) {
    with_dtype(r.in_dtype, [&](auto* type) {
      widen_row(typed(r.in, type) + row * r.n, r.n, r.input_zero_point, x);
    });
    const Moments m = moments(x, r.n, r.is_small);
    const int64_t squares = r.is_centred ? r.n * m.squares - m.total * m.total : m.squares;
    const int64_t whole = r.point >= 0 ? squares << r.point : squares >> -r.point;
    int64_t value = whole + r.epsilon;
    value = value < r.floor ? r.floor : value;
    int64_t shift;
    const int32_t root = reciprocal_root(value < 1 ? 1 : value, &shift);
    // The point is even.
    shift = within(shift - r.point / 2 - r.fraction, 0, 62);
    const int64_t at = row % r.period;
    const int32_t factor = r.is_centred ? static_cast<int32_t>(r.n) : 1;
    const int32_t less = r.is_centred ? static_cast<int32_t>(m.total) : 0;
    const NormRow own{factor, less, root, shift, r.multiplier + at * r.n,
                      r.bias + at * r.width};
    normalise(r, own, x);
    with_dtype(r.out_dtype, [&](auto* type) {
      narrow_row(x, r.n, typed(r.out, type) + row * r.n);
    });
  }
}

// One over the root of a variance, and the bits behind the point of values by it.
inline int32_t masked_root(const NormRows& r, int64_t squares, int64_t count,
                           int64_t* bits) {
  const auto room = [](int64_t x) -> int64_t {
    return x ? __builtin_clzll(static_cast<uint64_t>(x)) : 64;
  };
  const auto shifted = [](int64_t x, int64_t up) {
    return up >= 0 ? x << least(up, 63) : x >> least(-up, 63);
  };
  const int64_t ones = count * count;
  const int64_t epsilon = r.epsilon * ones, floor = r.floor * ones;
  const int64_t added = epsilon > floor ? epsilon : floor;
  const int64_t up = (least(room(squares), room(added) + r.point) - 3) & ~int64_t{1};
  const int64_t least_value = shifted(floor, up - r.point);
  int64_t value = shifted(squares, up) + shifted(epsilon, up - r.point);
  value = value < least_value ? least_value : value;
  const int32_t root = reciprocal_root(value < 1 ? 1 : value, bits);
  *bits -= up / 2 + r.fraction;
  return root;
}

// Values that have an exponent, of which a mask leaves some out.
inline void normalise_far(const NormRows& r, const NormRow& row, int32_t* x) {
  constexpr int64_t bits = 30, most = (int64_t{1} << bits) - 1;
  const int64_t half = (int64_t{1} << r.shift) >> 1;
  for (int64_t i = 0; i < r.n; ++i) {
    const int64_t u = static_cast<int64_t>(x[i]) * row.factor - row.less;
    const int64_t product = u * row.root;
    const uint64_t size = static_cast<uint64_t>(product < 0 ? -product : product);
    const int64_t length = size ? 64 - __builtin_clzll(size) : 0;
    const int64_t exponent = within(length - bits - row.shift, 0, 62);
    const int64_t by = least(row.shift + exponent, 62);
    const int64_t t = by > 0 ? down(product + (int64_t{1} << by >> 1), by)
                             : product * (int64_t{1} << -by);
    const int64_t lane = i % V::kLanes;
    const int64_t at = i - lane + lane / 2 + lane % 2 * (V::kLanes / 2);
    const int64_t shift = r.shift > exponent ? r.shift - exponent : 0;
    const int64_t bias = down(row.bias[at] - half, least(exponent, r.shift));
    const int64_t acc = within(t, -most, most) * row.multiplier[i] + bias;
    const int64_t code = down(acc + (int64_t{1} << shift >> 1), shift) + r.zero_point;
    x[i] = static_cast<int32_t>(within(code, r.low, r.high));
  }
}

void run_masked_norm(const MaskedNormRows& r) {
  int32_t* x = r.scratch;
  int32_t* kept = x + r.width;
  for (int64_t row = 0; row < r.rows; ++row) {
    with_dtype(r.in_dtype, [&](auto* type) {
      widen_row(typed(r.in, type) + row * r.n, r.n, r.input_zero_point, x);
    });
    with_dtype(r.mask_dtype, [&](auto* type) {
      widen_row(typed(r.mask, type) + row % r.mask_rows * r.n, r.n, 0, kept);
    });
    int64_t count = 0;
    int32_t low = x[0], high = x[0];
    for (int64_t i = 0; i < r.n; ++i) {
      count += kept[i] != 0;
      low = x[i] < low ? x[i] : low;
      high = x[i] > high ? x[i] : high;
      kept[i] = kept[i] != 0 ? x[i] : 0;
    }
    count = count < r.least_count ? r.least_count : count;
    const Moments m = moments(kept, r.n, r.is_small);
    const int64_t mean = r.is_centred ? m.total : 0;
    int64_t bits;
    const int32_t root =
        masked_root(r, count * m.squares - mean * mean, count, &bits);
    const int64_t first = count * low - mean, last = count * high - mean;
    const int64_t size = last > -first ? last : -first;
    const int64_t at = row % r.period;
    NormRow own{static_cast<int32_t>(count), static_cast<int32_t>(mean), root, bits,
                r.multiplier + at * r.n, r.bias + at * r.width};
    const int64_t length = size ? 64 - __builtin_clzll(static_cast<uint64_t>(size * root)) : 0;
    if (size == 0 || (bits >= 0 && length <= 29 + bits)) {
      own.shift = within(bits, 0, 62);
      normalise(r, own, x);
    } else {
      normalise_far(r, own, x);
    }
    with_dtype(r.out_dtype, [&](auto* type) {
      narrow_row(x, r.n, typed(r.out, type) + row * r.n);
    });
  }
}

void run_look_up(const uint8_t* table, const uint8_t* in, uint8_t* out, int64_t n) {
#ifdef QJAX_VBMI
  if (has_vbmi()) return vbmi_look_up(table, in, out, n);
#endif
  for (int64_t i = 0; i < n; ++i) out[i] = table[in[i]];
}

// Sums of exponentials of what a mask keeps, all without one.
inline uint64_t sum_of(const SoftmaxRows& r, const uint8_t* distances,
                       const uint8_t* mask) {
#ifdef QJAX_VBMI
  if (has_vbmi()) return vbmi_sum(r.planes, distances, mask, r.n);
#endif
  uint64_t total = 0;
  for (int64_t i = 0; i < r.n; ++i) {
    total += !mask || mask[i] ? r.table[distances[i]] : 0;
  }
  return total;
}

// Codes by distance, of a row whose exponentials and more are `total`. Products of two
// integers of 32 bits without sign fit 64 bits.
inline void code_table(const SoftmaxRows& r, uint64_t total, int64_t count,
                       uint8_t* __restrict codes) {
  const int length = 64 - __builtin_clzll(total);
  // 2^(32 + length) / total, of up to 78 bits, by a quotient of two parts.
  const int rest = length > 30 ? length - 30 : 0;
  const uint64_t first = (uint64_t{1} << (31 + length - rest)) / total;
  const uint64_t left = (uint64_t{1} << (31 + length - rest)) - first * total;
  const uint64_t doubled =
      (first << (rest + 1)) + (left << (rest + 1)) / total;
  const uint64_t found = (doubled + 1) / 2;
  const uint32_t reciprocal =
      static_cast<uint32_t>(found > UINT32_MAX ? UINT32_MAX : found);
  const int64_t shift = r.shift > 62 ? 62 : r.shift;
  const uint64_t half = uint64_t{1} << length, own = (uint64_t{1} << shift) >> 1;
  const uint32_t multiplier = static_cast<uint32_t>(r.multiplier);
#ifdef QJAX_PAIRS
  if (fits_32(62, shift, r.zero_point)) {
    const auto by = W::set(reciprocal), halves = W::set(static_cast<int64_t>(half));
    const auto factor = W::set(multiplier), own_half = W::set(static_cast<int64_t>(own));
    const auto low = V::set(r.low), high = V::set(r.high);
    const auto zero_point = V::set(r.zero_point);
    for (int64_t d = 0; d < count; d += V::kLanes) {
      const Pair e = pair_of(V::load(reinterpret_cast<const int32_t*>(r.table) + d));
      const auto steps = [&](V::Reg x) {
        const auto p = W::logical(W::add(W::unsigned_product(x, by), halves), length + 1);
        return W::logical(W::add(W::unsigned_product(p, factor), own_half), shift);
      };
      const auto code = V::add(W::joined(steps(e.even), steps(e.odd)), zero_point);
      V::narrow(codes + d, V::minimum(V::maximum(code, low), high), V::kLanes);
    }
    return;
  }
#endif
  const int64_t zero_point = r.zero_point, low = r.low, high = r.high;
  const uint32_t* __restrict table = r.table;
  for (int64_t d = 0; d < count; ++d) {
    const uint32_t p = static_cast<uint32_t>(
        (static_cast<uint64_t>(table[d]) * reciprocal + half) >> (length + 1));
    const int64_t steps = static_cast<int64_t>(
        (static_cast<uint64_t>(p) * multiplier + own) >> shift);
    codes[d] = static_cast<uint8_t>(within(steps + zero_point, low, high));
  }
}

// Distances of a row from its largest byte of those that a mask keeps; returns the
// least byte's.
inline int distances_of(const SoftmaxRows& r, const uint8_t* __restrict in,
                        const uint8_t* __restrict mask, uint8_t* __restrict to) {
  const uint8_t flip = r.flip;
  uint8_t top = 0, bottom = UINT8_MAX;
  for (int64_t i = 0; i < r.n; ++i) {
    const uint8_t x = in[i] ^ flip, left_out = mask && !mask[i] ? UINT8_MAX : 0;
    const uint8_t upper = x & static_cast<uint8_t>(~left_out), lower = x | left_out;
    top = upper > top ? upper : top;
    bottom = lower < bottom ? lower : bottom;
  }
  for (int64_t i = 0; i < r.n; ++i) to[i] = static_cast<uint8_t>(top - (in[i] ^ flip));
  return top - bottom;
}

void run_softmax(const SoftmaxRows& r) {
  alignas(64) uint8_t codes[kBytes] = {};
  uint8_t* distances = r.scratch;
  const int32_t zero_code = coded(0, r.zero_point, r.low, r.high);
  for (int64_t row = 0; row < r.rows; ++row) {
    const uint8_t* mask = r.mask ? r.mask + row % r.mask_rows * r.n : nullptr;
    uint8_t* __restrict out = r.out + row * r.n;
    uint8_t any = !mask;
    for (int64_t i = 0; mask && i < r.n; ++i) any |= mask[i];
    if (!any && r.empty == 0) {
      for (int64_t i = 0; i < r.n; ++i) out[i] = static_cast<uint8_t>(zero_code);
      continue;
    }
    if (!any) mask = nullptr;
    int most = distances_of(r, r.in + row * r.n, mask, distances);
    if (!any && r.empty == 2) {  // As if all codes were one.
      most = 0;
      for (int64_t i = 0; i < r.n; ++i) distances[i] = 0;
    }
    code_table(r, sum_of(r, distances, mask) + r.plus, most + 1, codes);
    // The distance of what is left out means nothing.
    run_look_up(codes, distances, out, r.n);
    for (int64_t i = 0; mask && i < r.n; ++i) {
      out[i] = mask[i] ? out[i] : static_cast<uint8_t>(zero_code);
    }
  }
}

// codes = clip(round(x * inverse) + zero_point, low, high), halves to even; NaN counts
// as 0.
template <class T>
QJAX_INLINE void quantize_as(const Reals& r, T* __restrict codes) {
  constexpr float rounder = 12582912.0f;  // Rounds numbers below 2^22 to integers.
  const float* __restrict x = r.real;
  const float inverse = r.inverse;
  const int32_t zero_point = r.zero_point;
  const float low = static_cast<float>(r.low - zero_point);
  const float high = static_cast<float>(r.high - zero_point);
  for (int64_t i = 0; i < r.n; ++i) {
    float steps = x[i] * inverse;
    steps = steps == steps ? steps : 0.0f;
    // The ends are integers: clipped first, a number rounds to the same.
    steps = steps < low ? low : steps;
    steps = steps > high ? high : steps;
    const float whole = (steps + rounder) - rounder;
    codes[i] = static_cast<T>(static_cast<int32_t>(whole) + zero_point);
  }
}

void run_quantize(const Reals& r) {
  with_dtype(r.dtype, [&](auto* type) { quantize_as(r, typed(r.codes, type)); });
}

template <class T>
QJAX_INLINE void dequantize_as(const Reals& r, const T* __restrict codes) {
  float* __restrict x = r.real;
  const float zero_point = static_cast<float>(r.zero_point), scale = r.scale;
  for (int64_t i = 0; i < r.n; ++i) {
    x[i] = (static_cast<float>(codes[i]) - zero_point) * scale;
  }
}

void run_dequantize(const Reals& r) {
  const void* codes = r.codes;
  with_dtype(r.dtype, [&](auto* type) { dequantize_as(r, typed(codes, type)); });
}

}  // namespace
}  // namespace qjax

#define QJAX_WIDE                                                                 \
  run_exact_rows, run_weigh, run_round, run_norm, run_masked_norm, run_softmax, run_look_up,       \
      run_quantize, run_dequantize
