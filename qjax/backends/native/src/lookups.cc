// Steps that look integers up, reduce them, or divide them.
#include <algorithm>

#include "requantizer.h"
#include "rows.h"
#include "rules.h"

namespace qjax {
namespace {

class Table : public Step {
 public:
  Table(Words& words, const Maker& maker)
      : in_(words, maker),
        out_(words, maker),
        outer_(words.size()),
        channels_(words.size()),
        inner_(words.size()) {
    const int64_t from = words.size();
    const Dtype dtype = words.dtype();
    rows_ = words.next(1, kMostElements, "a table must have rows");
    low_ = words.int32();
    const int64_t count = count_of({outer_, channels_, inner_});
    maker.holds(in_.buffer, count);
    maker.holds(out_.buffer, dtype, count);
    table_ = Kept(maker, from, count_of({rows_, channels_}) * size_of(dtype));
  }
  void pack(const Constants& constants, uint8_t* packed) const override {
    table_.pack(constants, packed);
  }
  void run(const Memory& memory) const override {
    const uint8_t* table = table_.in<uint8_t>(memory);
    with_type(out_.dtype, [&](auto* type) {
      using T = Pointee<decltype(type)>;
      const T* own = reinterpret_cast<const T*>(table);
      T* out = memory.as<T>(out_.buffer);
      int32_t x[kRow];
      each_channel_row(outer_, channels_, inner_,
                       [&](int64_t at, int64_t n, int64_t c, int64_t step) {
                         in_.load(memory, at, n, x);
                         for (int64_t i = 0; i < n; ++i) {
                           const int64_t row = static_cast<int64_t>(x[i]) - low_;
                           const int64_t place =
                               std::min(std::max<int64_t>(row, 0), rows_ - 1);
                           out[at + i] = own[place * channels_ + c + i * step];
                         }
                       });
    });
  }

 private:
  Source in_, out_;
  int64_t outer_, channels_, inner_, rows_;
  int32_t low_;
  Kept table_;
};

class Thresholds : public Step {
 public:
  Thresholds(Words& words, const Maker& maker)
      : in_(words, maker),
        out_(words, maker),
        outer_(words.size()),
        channels_(words.size()),
        inner_(words.size()) {
    const int64_t cuts = words.size(), table = words.size();
    count_ = words.size();
    cuts_ = Kept(maker, cuts, count_of({channels_, count_}) * 4);
    table_ = Kept(maker, table, count_of({channels_, count_ + 1}) * 4);
    const int64_t all = count_of({outer_, channels_, inner_});
    maker.holds(in_.buffer, all);
    maker.holds(out_.buffer, all);
  }
  void pack(const Constants& constants, uint8_t* packed) const override {
    cuts_.pack(constants, packed);
    table_.pack(constants, packed);
    const int32_t* codes = constants.at<int32_t>(table_.from, table_.bytes / 4);
    for (int64_t i = 0; i < table_.bytes / 4; ++i) {
      check_fits(out_.dtype, codes[i], codes[i]);
    }
  }
  void run(const Memory& memory) const override {
    const int32_t* cuts = cuts_.in<int32_t>(memory);
    const int32_t* table = table_.in<int32_t>(memory);
    int32_t x[kRow];
    each_channel_row(outer_, channels_, inner_,
                     [&](int64_t at, int64_t n, int64_t c, int64_t step) {
                       in_.load(memory, at, n, x);
                       for (int64_t i = 0; i < n; ++i) {
                         const int64_t o = c + i * step;
                         const int64_t place = reached(cuts + o * count_, x[i]);
                         x[i] = table[o * (count_ + 1) + place];
                       }
                       out_.store(memory, at, n, x);
                     });
  }

 private:
  // The number of thresholds that are not above an integer: by halves, no branches.
  int64_t reached(const int32_t* cuts, int32_t x) const {
    int64_t base = 0, left = count_;
    while (left > 0) {
      const int64_t half = (left + 1) / 2;
      base += cuts[base + half - 1] <= x ? half : 0;
      left -= half;
    }
    return base;
  }

  Source in_, out_;
  int64_t outer_, channels_, inner_, count_;
  Kept cuts_, table_;
};

enum Reduction : int64_t { kSum, kMax, kMin, kArgmax, kArgmin };

class Reduce : public Step {
 public:
  Reduce(Words& words, const Maker& maker)
      : kind_(words.next(0, 4, "an unknown reduction")),
        in_(words, maker),
        out_(words, maker),
        outer_(words.size()),
        n_(words.size()),
        inner_(words.size()),
        bias_(words.int32()) {
    maker.holds(in_.buffer, count_of({outer_, n_, inner_}));
    maker.holds(out_.buffer, count_of({outer_, inner_}));
    check(kind_ == kSum || n_ > 0 || outer_ == 0 || inner_ == 0,
          "the axis of an extreme must not be empty");
    check(kind_ == kMax || kind_ == kMin || out_.dtype == Dtype::kInt32,
          "sums and places must be int32");
  }
  void run(const Memory& memory) const override {
    for (int64_t o = 0; o < outer_; ++o) {
      if (inner_ == 1) {
        along(o, memory);
      } else {
        across(o, memory);
      }
    }
  }

 private:
  // Rows are the axis itself.
  void along(int64_t o, const Memory& memory) const {
    int32_t x[kRow], found = kind_ == kSum ? bias_ : 0;
    int64_t best = -1;
    each_row(n_, [&](int64_t at, int64_t n) {
      in_.load(memory, o * n_ + at, n, x);
      if (kind_ == kSum) {
        uint32_t sum = static_cast<uint32_t>(found);
        for (int64_t i = 0; i < n; ++i) sum += static_cast<uint32_t>(x[i]);
        found = static_cast<int32_t>(sum);
        return;
      }
      for (int64_t i = 0; i < n; ++i) {
        if (best < 0 || is_better(x[i], found)) {
          found = x[i];
          best = at + i;
        }
      }
    });
    if (kind_ >= kArgmax) found = static_cast<int32_t>(best);
    out_.store(memory, o, 1, &found);
  }

  // Rows lie across the axis.
  void across(int64_t o, const Memory& memory) const {
    int32_t x[kRow], found[kRow], best[kRow];
    each_row(inner_, [&](int64_t at, int64_t width) {
      for (int64_t i = 0; i < width; ++i) found[i] = bias_;
      for (int64_t k = 0; k < n_; ++k) {
        in_.load(memory, (o * n_ + k) * inner_ + at, width, x);
        if (kind_ == kSum) {
          for (int64_t i = 0; i < width; ++i) {
            found[i] = static_cast<int32_t>(static_cast<uint32_t>(found[i]) +
                                            static_cast<uint32_t>(x[i]));
          }
          continue;
        }
        for (int64_t i = 0; i < width; ++i) {
          const bool is_new = k == 0 || is_better(x[i], found[i]);
          found[i] = is_new ? x[i] : found[i];
          best[i] = is_new ? static_cast<int32_t>(k) : best[i];
        }
      }
      out_.store(memory, o * inner_ + at, width, kind_ >= kArgmax ? best : found);
    });
  }

  bool is_better(int32_t x, int32_t than) const {
    return kind_ == kMax || kind_ == kArgmax ? x > than : x < than;
  }

  int64_t kind_;
  Source in_, out_;
  int64_t outer_, n_, inner_;
  int32_t bias_;
};

class Window : public Step {
 public:
  Window(Words& words, const Maker& maker)
      : kind_(words.next(0, 2, "an unknown reduction")),
        in_(words, maker),
        out_(words, maker) {
    const int64_t rank = words.next(0, 64, "a window has too many axes");
    at_.sizes = words.list(rank);
    at_.a = words.list(rank);
    at_.b = at_.a;
    offset_ = words.size();
    taps_ = words.list(words.size());
    bias_ = words.int32();
    maker.holds(out_.buffer, count_of(at_.sizes));
    if (count_of(at_.sizes) && !taps_.empty()) {
      const auto [low, high] = std::minmax_element(taps_.begin(), taps_.end());
      check(*low >= -kMostElements && *high <= kMostElements, "a tap is too far");
      maker.holds(in_.buffer, at_.sizes, offset_ + *low, at_.a);
      maker.holds(in_.buffer, at_.sizes, offset_ + *high, at_.a);
    }
    check(kind_ == kSum || !taps_.empty(), "an extreme must be of something");
    check(kind_ != kSum || out_.dtype == Dtype::kInt32, "sums must be int32");
  }
  void run(const Memory& memory) const override {
    at_.each([&](int64_t i, int64_t s, int64_t, int64_t, int64_t out, int64_t n) {
      int32_t x[kRow], found[kRow];
      for (int64_t k = 0; k < n; ++k) found[k] = bias_;
      for (size_t t = 0; t < taps_.size(); ++t) {
        in_.load(memory, offset_ + i + taps_[t], n, x, s);
        for (int64_t k = 0; k < n; ++k) {
          if (kind_ == kSum) {
            found[k] = static_cast<int32_t>(static_cast<uint32_t>(found[k]) +
                                            static_cast<uint32_t>(x[k]));
          } else if (kind_ == kMax) {
            found[k] = t ? std::max(found[k], x[k]) : x[k];
          } else {
            found[k] = t ? std::min(found[k], x[k]) : x[k];
          }
        }
      }
      out_.store(memory, out, n, found);
    });
  }

 private:
  int64_t kind_;
  Source in_, out_;
  Strided at_;
  int64_t offset_;
  std::vector<int64_t> taps_;
  int32_t bias_;
};

class RunningSum : public Step {
 public:
  RunningSum(Words& words, const Maker& maker)
      : in_(maker.buffer(words)),
        out_(maker.buffer(words)),
        outer_(words.size()),
        n_(words.size()),
        inner_(words.size()),
        reverse_(words.flag()),
        zero_point_(words.int32()),
        bias_(words.int32()),
        dtype_(maker.of(in_).dtype) {
    const int64_t count = count_of({outer_, n_, inner_});
    maker.holds(in_, count);
    maker.holds(out_, Dtype::kInt32, count);
  }
  void run(const Memory& memory) const override {
    int32_t* out = memory.as<int32_t>(out_);
    with_type(dtype_, [&](auto* type) {
      const auto* in = memory.as<Pointee<decltype(type)>>(in_);
      for (int64_t o = 0; o < outer_; ++o) {
        for (int64_t i = 0; i < inner_; ++i) {
          uint32_t sum = static_cast<uint32_t>(bias_);
          for (int64_t k = 0; k < n_; ++k) {
            const int64_t at =
                (o * n_ + (reverse_ ? n_ - 1 - k : k)) * inner_ + i;
            sum += static_cast<uint32_t>(in[at]) - static_cast<uint32_t>(zero_point_);
            out[at] = static_cast<int32_t>(sum);
          }
        }
      }
    });
  }

 private:
  int64_t in_, out_, outer_, n_, inner_;
  bool reverse_;
  int32_t zero_point_, bias_;
  Dtype dtype_;
};

// The algorithm of qjax/integer_division.py.
class Divide : public Step {
 public:
  Divide(Words& words, const Maker& maker)
      : a_(words, maker), b_(words, maker), out_(words, maker), count_(words.size()) {
    za_ = words.int32();
    zb_ = words.int32();
    multiplier_ = words.int32();
    shift_ = words.next(0, 1 << 20, "a shift must not be negative");
    zero_point_ = words.int32();
    low_ = words.int32();
    high_ = words.int32();
    maker.holds(a_.buffer, count_);
    maker.holds(b_.buffer, count_);
    maker.holds(out_.buffer, count_);
    check(multiplier_ >= 0, "a multiplier must not be negative");
    check_fits(out_.dtype, low_, high_);
  }
  void run(const Memory& memory) const override {
    each_row(count_, [&](int64_t at, int64_t n) {
      int32_t x[kRow], y[kRow];
      a_.load(memory, at, n, x);
      b_.load(memory, at, n, y);
      for (int64_t i = 0; i < n; ++i) {
        x[i] = code(static_cast<int64_t>(x[i]) - za_, static_cast<int64_t>(y[i]) - zb_);
      }
      out_.store(memory, at, n, x);
    });
  }

 private:
  int32_t code(int64_t a, int64_t b) const {
    int64_t steps;
    if (b == 0) {
      steps = (a > 0) - (a < 0);
      steps *= int64_t{1} << 40;
    } else if (shift_ > 62) {
      steps = 0;
    } else {
      const int64_t size = std::llabs(b);
      int64_t reciprocal =
          ((static_cast<int64_t>(multiplier_) << 14) + (size >> 1)) / size;
      reciprocal = b < 0 ? -reciprocal : reciprocal;
      const int64_t half = (int64_t{1} << shift_) >> 1;
      steps = (a * reciprocal + half) >> shift_;
    }
    return coded(steps, zero_point_, low_, high_);
  }

  Source a_, b_, out_;
  int64_t count_;
  int32_t za_, zb_, multiplier_;
  int64_t shift_;
  int32_t zero_point_, low_, high_;
};

// Softmax, log-softmax and log-sum-exp along the last axis, by a table of exponentials:
// the formulas of qjax/graph/operations/normalisations.py.
class Softmax : public Step {
 public:
  Softmax(Words& words, const Maker& maker)
      : kind_(words.next(0, 2, "an unknown kind of softmax")),
        in_(words, maker) {
    mask_ = words.next(-1, static_cast<int64_t>(maker.buffers.size()) - 1,
                       "a mask must be a buffer");
    out_ = Source(words, maker);
    outer_ = words.size();
    n_ = words.size();
    const int64_t from = words.size();
    rows_ = words.next(1, kMostElements, "a table must have rows");
    table_ = Kept(maker, from, rows_ * 4);
    // Sums of more places might not fit.
    check(n_ <= words.size(), "a softmax has more places than its table is made for");
    empty_ = words.next(0, 2, "an unknown rule for empty rows");
    plus_ = words.next(0, int64_t{1} << 30, "`plus` must have 30 bits");
    input_zero_point_ = words.int32();
    input_multiplier_ = words.next(0, INT32_MAX, "a multiplier must be positive");
    input_shift_ = words.next(0, 62, "a shift must lie in 0 to 62");
    multiplier_ = words.next(0, INT32_MAX, "a multiplier must be positive");
    shift_ = words.next(0, 88, "a shift must lie in 0 to 88");
    zero_point_ = words.int32();
    low_ = words.int32();
    high_ = words.int32();
    const int64_t count = count_of({outer_, n_});
    maker.holds(in_.buffer, count);
    if (mask_ >= 0) maker.holds(mask_, count);
    maker.holds(out_.buffer, kind_ == 2 ? outer_ : count);
    if (mask_ >= 0) mask_dtype_ = maker.of(mask_).dtype;
    check_fits(out_.dtype, low_, high_);
    scratch_ = (std::max<int64_t>(n_, 1) * 12 + kSlack + kAlignment) / kAlignment * kAlignment;
  }
  int64_t scratch_bytes() const override { return scratch_; }
  void pack(const Constants& constants, uint8_t* packed) const override {
    const int32_t* table = constants.at<int32_t>(table_.from, rows_);
    for (int64_t i = 0; i < rows_; ++i) {
      check(table[i] >= 0 && table[i] <= (1 << 30), "exponentials must have 30 bits");
    }
    check(table[0] > 0, "the exponential of 0 must be positive");
    table_.pack(constants, packed);
  }
  void run(const Memory& memory) const override {
    for (int64_t o = 0; o < outer_; ++o) row(o, memory);
  }

 private:
  void row(int64_t o, const Memory& memory) const {
    auto* codes = reinterpret_cast<int32_t*>(memory.scratch);
    auto* parts = codes + n_;
    auto* kept = parts + n_;  // 1 or 0.
    in_.load(memory, o * n_, n_, codes);
    bool any = mask_ < 0;
    std::fill(kept, kept + n_, 1);
    if (mask_ >= 0) {
      load(mask_dtype_, memory.as<uint8_t>(mask_), o * n_, 1, n_, kept);
      for (int64_t i = 0; i < n_; ++i) {
        kept[i] = kept[i] != 0;
        any = any || kept[i];
      }
      if (!any && empty_ != 0) {
        std::fill(kept, kept + n_, 1);
        // As if all codes were one: their distances are 0.
        if (empty_ == 2) std::fill(codes, codes + n_, 0);
        any = true;
      }
    }
    any = any && n_ > 0;
    const int32_t* table = table_.in<int32_t>(memory);
    int32_t top = INT32_MIN;
    for (int64_t i = 0; i < n_; ++i) top = kept[i] ? std::max(top, codes[i]) : top;
    int64_t total = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const int64_t far = static_cast<int64_t>(top) - codes[i];
      const int64_t distance = std::min(std::max<int64_t>(far, 0), rows_ - 1);
      parts[i] = kept[i] && any ? table[distance] : 0;
      total += parts[i];
    }
    if (kind_ == 0) {
      shares(parts, any ? total + plus_ : 1, codes);
    } else if (!any) {
      std::fill(codes, codes + std::max<int64_t>(n_, 1), low_);
    } else {
      const int64_t log = logarithm(total, table[0]);
      for (int64_t i = 0; i < n_ && kind_ == 1; ++i) {
        const int64_t step = static_cast<int64_t>(codes[i]) - top;
        codes[i] = kept[i] ? log_code(step, -log) : low_;
      }
      if (kind_ == 2) {
        codes[0] = log_code(static_cast<int64_t>(top) - input_zero_point_, log);
      }
    }
    if (kind_ == 2) {
      out_.store(memory, o, 1, codes);
    } else {
      out_.store(memory, o * n_, n_, codes);
    }
  }

  void shares(const int32_t* parts, int64_t total, int32_t* codes) const {
    const int length = 64 - __builtin_clzll(static_cast<uint64_t>(total));
    const __int128 one = static_cast<__int128>(1) << (32 + length);
    const int64_t found = static_cast<int64_t>((one / total + 1) / 2);
    const int64_t reciprocal = std::min<int64_t>(found, (int64_t{1} << 32) - 1);
    const int64_t down = std::min<int64_t>(shift_, 62);
    const int64_t half = (int64_t{1} << down) >> 1;
    for (int64_t i = 0; i < n_; ++i) {
      const __int128 product = static_cast<__int128>(parts[i]) * reciprocal;
      const int64_t p = static_cast<int64_t>(
          (product + (static_cast<__int128>(1) << length)) >> (length + 1));
      codes[i] = coded((p * multiplier_ + half) >> down, zero_point_, low_, high_);
    }
  }

  // 2^26 * log(total / one), by the series of a quotient.
  static int64_t logarithm(int64_t total, int64_t one) {
    const int length = 64 - __builtin_clzll(static_cast<uint64_t>(total));
    const int one_length = 64 - __builtin_clzll(static_cast<uint64_t>(one));
    const int64_t a =
        length < 32 ? total << (32 - length) : total >> (length - 32);
    const int64_t z = ((a - (int64_t{1} << 31)) << 31) / (a + (int64_t{1} << 31));
    int64_t series = 0;
    for (int64_t k = 19; k > 0; k -= 2) {
      series = ((int64_t{2} << 31) + k) / (2 * k) + (((z * z) >> 31) * series >> 31);
    }
    const int64_t found =
        (length - one_length) * int64_t{762123384786} + ((z * series >> 30) << 9);
    return (found + (1 << 13)) >> 14;
  }

  int32_t log_code(int64_t step, int64_t log) const {
    const auto part = [](int64_t x, int64_t multiplier, int64_t shift) {
      const int64_t up = std::max<int64_t>(14 - shift, 0);
      const int64_t down = std::max<int64_t>(shift - 14, 0);
      const __int128 half = (static_cast<__int128>(1) << down) >> 1;
      return ((static_cast<__int128>(x) * multiplier << up) + half) >> down;
    };
    const __int128 total = part(step, input_multiplier_, input_shift_) +
                           part(log, multiplier_, shift_);
    const __int128 steps = (total + (1 << 13)) >> 14;
    const __int128 far = static_cast<__int128>(1) << 40;
    const __int128 held = steps < -far ? -far : steps > far ? far : steps;
    return coded(static_cast<int64_t>(held), zero_point_, low_, high_);
  }

  int64_t kind_;
  Source in_, out_;
  int64_t mask_, outer_, n_, rows_, empty_, plus_;
  Kept table_;
  int32_t input_zero_point_;
  int64_t input_multiplier_, input_shift_, multiplier_, shift_;
  int32_t zero_point_, low_, high_;
  Dtype mask_dtype_ = Dtype::kInt8;
  int64_t scratch_;
};

// Normalisation along the last axis: the formula of
// qjax/graph/operations/normalisations.py.
class Norm : public Step {
 public:
  Norm(Words& words, const Maker& maker)
      : in_(words, maker),
        out_(words, maker),
        outer_(words.size()),
        n_(words.next(1, int64_t{1} << 31, "a norm must be of codes")),
        period_(words.next(1, kMostElements, "numbers must have rows")) {
    const int64_t count = count_of({period_, n_});
    multiplier_ = Kept(maker, words.size(), count * 4);
    bias_ = Kept(maker, words.size(), count * 4);
    is_centred_ = words.flag();
    check(words.size() == n_, "a group must have as many codes as its row");
    epsilon_ = words.next(0, int64_t{1} << 60, "epsilon must have 60 bits");
    floor_ = words.next(0, int64_t{1} << 60, "the floor must have 60 bits");
    point_ = words.next(-60, 30, "a point must lie in -60 to 30");
    more_ = words.next(0, 62, "`more` must lie in 0 to 62");
    input_zero_point_ = words.int32();
    shift_ = words.next(0, 62, "a shift must lie in 0 to 62");
    bias_shift_ = words.next(0, 31, "a left shift must lie in 0 to 31");
    zero_point_ = words.int32();
    low_ = words.int32();
    high_ = words.int32();
    const int64_t all = count_of({outer_, n_});
    maker.holds(in_.buffer, all);
    maker.holds(out_.buffer, all);
    check_fits(out_.dtype, low_, high_);
    // Bits behind the point of values that their group's root bounds.
    int bits = 0;
    while ((int64_t{1} << bits) < n_) ++bits;
    fraction_ = 30 - (is_centred_ ? (bits + 1) / 2 : 0);
  }
  void pack(const Constants& constants, uint8_t* packed) const override {
    multiplier_.pack(constants, packed);
    bias_.pack(constants, packed);
  }
  void run(const Memory& memory) const override {
    const int32_t* multiplier = multiplier_.in<int32_t>(memory);
    const int32_t* bias = bias_.in<int32_t>(memory);
    auto* codes = reinterpret_cast<int32_t*>(memory.scratch);
    for (int64_t o = 0; o < outer_; ++o) {
      const int64_t row = o % period_ * n_;
      in_.load(memory, o * n_, n_, codes);
      group(codes, multiplier + row, bias + row);
      out_.store(memory, o * n_, n_, codes);
    }
  }
  int64_t scratch_bytes() const override { return n_ * 4; }

 private:
  // Integers of the formula fit 62 bits: the graph's validation has seen to it.
  void group(int32_t* codes, const int32_t* multiplier, const int32_t* bias) const {
    int64_t total = 0, squares = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const int64_t q = static_cast<int64_t>(codes[i]) - input_zero_point_;
      total += q;
      squares += q * q;
    }
    if (is_centred_) squares = n_ * squares - total * total;
    const int64_t whole = point_ >= 0 ? squares << point_ : squares >> -point_;
    const int64_t value = std::max<int64_t>(std::max(whole + epsilon_, floor_), 1);
    int64_t down;
    const int64_t root = reciprocal_root(value, &down);
    // The point is even.
    down = std::min<int64_t>(std::max<int64_t>(down - point_ / 2 - fraction_ - more_, 0), 62);
    const int64_t half = (int64_t{1} << down) >> 1;
    const int64_t own_half = (int64_t{1} << shift_) >> 1;
    const int64_t least = static_cast<int64_t>(low_) - zero_point_;
    const int64_t most = static_cast<int64_t>(high_) - zero_point_;
    for (int64_t i = 0; i < n_; ++i) {
      int64_t q = static_cast<int64_t>(codes[i]) - input_zero_point_;
      q = is_centred_ ? n_ * q - total : q;
      const __int128 product = static_cast<__int128>(q) * root;
      const int64_t t = static_cast<int64_t>((product + half) >> down);
      const int64_t acc = t * multiplier[i] +
                          static_cast<int64_t>(bias[i]) * (int64_t{1} << bias_shift_);
      const int64_t steps = (acc + own_half) >> shift_;
      codes[i] =
          static_cast<int32_t>(std::min(std::max(steps, least), most) + zero_point_);
    }
  }

  // One over a root, an integer of 30 bits and a shift, by Newton's steps.
  static int64_t reciprocal_root(int64_t x, int64_t* down) {
    const int length = 64 - __builtin_clzll(static_cast<uint64_t>(x));
    const int up = (62 - length) / 2 * 2;
    const uint64_t a = (static_cast<uint64_t>(x) << up) >> 30;
    uint64_t root = 2362232013u - ((1395864371u * a) >> 32);
    for (int step = 0; step < 5; ++step) {
      const uint64_t square = (root * root) >> 30;
      root = (root * ((uint64_t{3} << 30) - ((square * a) >> 32))) >> 31;
    }
    *down = 60 - up / 2;
    return static_cast<int64_t>(root >> 1);
  }

  Source in_, out_;
  int64_t outer_, n_, period_;
  Kept multiplier_, bias_;
  bool is_centred_;
  int64_t epsilon_, floor_, point_, more_;
  int32_t input_zero_point_;
  int64_t shift_, bias_shift_;
  int32_t zero_point_, low_, high_;
  int64_t fraction_;
};

// Runs a plan a number of times, in which carried values go from step to step.
class Loop : public Step {
 public:
  Loop(Words& words, const Maker& maker)
      : length_(words.size()), is_reversed_(words.flag()) {
    const int64_t consts = words.next(0, 1 << 20, "too many values");
    const int64_t carries = words.next(0, 1 << 20, "too many values");
    const int64_t xs = words.next(0, 1 << 20, "too many values");
    const int64_t ys = words.next(0, 1 << 20, "too many values");
    const auto read = [&](int64_t n) {
      std::vector<int64_t> found;
      for (int64_t i = 0; i < n; ++i) found.push_back(maker.buffer(words));
      return found;
    };
    consts_ = read(consts);
    carries_in_ = read(carries);
    xs_ = read(xs);
    carries_out_ = read(carries);
    ys_ = read(ys);
    arena_ = maker.buffer(words);
    Words inner = words.part(words.size());
    body_ = std::make_unique<Plan>(inner, maker.layout);
    inner.finish();
    check(body_->inputs() == consts + carries + xs && body_->outputs() == carries + ys,
          "the body of a loop must take and give its values");
    maker.holds(arena_, Dtype::kUint8, body_->arena_bytes());
    int64_t place = 0;
    const auto fits = [&](Buffer::Kind kind, int64_t outer, int64_t times) {
      const Buffer& own = body_->end(kind, place++);
      check(maker.of(outer).dtype == own.dtype, "values of a loop must keep their type");
      maker.holds(outer, count_of({times, own.elements}));
      return own.bytes();
    };
    for (int64_t v : consts_) fits(Buffer::kInput, v, 1);
    for (int64_t v : carries_in_) sizes_.push_back(fits(Buffer::kInput, v, 1));
    for (int64_t v : xs_) steps_.push_back(fits(Buffer::kInput, v, length_));
    place = 0;
    for (size_t i = 0; i < carries_out_.size(); ++i) {
      const int64_t bytes = fits(Buffer::kOutput, carries_out_[i], 1);
      check(bytes == sizes_[i], "a carried value must keep its size");
      state_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    }
    for (int64_t v : ys_) steps_.push_back(fits(Buffer::kOutput, v, length_));
  }

  void pack(const Constants& constants, uint8_t* packed) const override {
    body_->pack(constants, packed);
  }
  int64_t work() const override {
    return std::min(body_->work(), kMostElements / std::max<int64_t>(length_, 1)) *
           length_;
  }
  // Twice the carried values, and the scratch of the body.
  int64_t scratch_bytes() const override { return 2 * state_ + body_->scratch_bytes(); }

  void run(const Memory& memory) const override {
    uint8_t* states[2] = {memory.scratch, memory.scratch + state_};
    uint8_t* scratch = memory.scratch + 2 * state_;
    int64_t at = 0;
    for (size_t i = 0; i < carries_in_.size(); ++i) {
      copy(states[0] + at, memory.as<uint8_t>(carries_in_[i]), sizes_[i]);
      at += (sizes_[i] + kAlignment - 1) / kAlignment * kAlignment;
    }
    std::vector<const void*> inputs(static_cast<size_t>(body_->inputs()));
    std::vector<void*> outputs(static_cast<size_t>(body_->outputs()));
    for (int64_t step = 0; step < length_; ++step) {
      const int64_t place = is_reversed_ ? length_ - 1 - step : step;
      size_t in = 0, out = 0;
      for (int64_t v : consts_) inputs[in++] = memory.as<uint8_t>(v);
      at = 0;
      for (int64_t size : sizes_) {
        inputs[in++] = states[step % 2] + at;
        outputs[out++] = states[1 - step % 2] + at;
        at += (size + kAlignment - 1) / kAlignment * kAlignment;
      }
      for (size_t i = 0; i < xs_.size(); ++i) {
        inputs[in++] = memory.as<uint8_t>(xs_[i]) + place * steps_[i];
      }
      for (size_t i = 0; i < ys_.size(); ++i) {
        outputs[out++] = memory.as<uint8_t>(ys_[i]) + place * steps_[xs_.size() + i];
      }
      body_->run(memory.packed, memory.as<uint8_t>(arena_), scratch, inputs.data(),
                 outputs.data());
    }
    at = 0;
    for (size_t i = 0; i < carries_out_.size(); ++i) {
      copy(memory.as<uint8_t>(carries_out_[i]), states[length_ % 2] + at, sizes_[i]);
      at += (sizes_[i] + kAlignment - 1) / kAlignment * kAlignment;
    }
  }

 private:
  static void copy(uint8_t* to, const uint8_t* from, int64_t bytes) {
    if (bytes) std::memcpy(to, from, static_cast<size_t>(bytes));
  }

  int64_t length_;
  bool is_reversed_;
  std::vector<int64_t> consts_, carries_in_, xs_, carries_out_, ys_;
  int64_t arena_;
  std::unique_ptr<Plan> body_;
  std::vector<int64_t> sizes_, steps_;
  int64_t state_ = 0;
};

}  // namespace

const Entry kLookups[] = {
    {10, make<Table>},
    {11, make<Thresholds>},
    {12, make<Reduce>},
    {13, make<Window>},
    {14, make<RunningSum>},
    {20, make<Divide>},
    {21, make<Softmax>},
    {22, make<Norm>},
    {23, make<Loop>},
};

}  // namespace qjax
