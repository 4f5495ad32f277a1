// Steps that take integers one by one: requantize, add, clip, products, choices.
#include <algorithm>

#include "pair_sums.h"
#include "requantizer.h"
#include "rows.h"
#include "rules.h"

namespace qjax {
namespace {

class Requantize : public Step {
 public:
  Requantize(Words& words, const Maker& maker)
      : set_(kernels()), in_(words, maker), out_(words, maker) {
    outer_ = words.size();
    channels_ = words.size();
    inner_ = words.size();
    Words numbers = words;  // They stand before the interval that they need.
    words.list(7);
    is_wide_ = words.flag();
    const int64_t low = words.next(), high = words.next();
    requantizer_ = Requantizer(numbers, channels_, Interval{low, high});
    requantizer_.check_type(out_.dtype);
    const int64_t count = count_of({outer_, channels_, inner_});
    maker.holds(in_.buffer, count);
    maker.holds(out_.buffer, count);
    is_single_ = channels_ == 1;
    width_ = is_single_ ? set_.lanes : (channels_ + 2 * set_.lanes) / set_.lanes * set_.lanes;
    requantizer_.reserve(maker, width_);
  }

  int64_t scratch_bytes() const override {
    return (is_single_ ? kChunk : std::max(channels_, kChunk)) * 4 + kSlack;
  }
  void pack(const Constants& constants, uint8_t* packed) const override {
    std::vector<int64_t> order(static_cast<size_t>(width_), is_single_ ? 0 : -1);
    for (int64_t c = 0; c < channels_ && !is_single_; ++c) {
      order[static_cast<size_t>(c)] = c;
    }
    requantizer_.pack(constants, packed, order, is_scattered());
  }
  std::string explain(const uint8_t* packed) const override {
    return name_of(requantizer_.in(packed).form);
  }

  void run(const Memory& memory) const override {
    if (count_of({outer_, channels_, inner_}) == 0) return;
    if (is_scattered()) return one_by_one(memory);
    const int64_t count = outer_ * channels_ * inner_;
    const int64_t row = is_single_ ? kChunk : channels_;
    const int64_t step = is_single_ ? kChunk : std::max<int64_t>(kChunk / row, 1) * row;
    auto* wide = reinterpret_cast<int32_t*>(memory.scratch);
    for (int64_t i = 0; i < count; i += step) {
      const int64_t n = std::min(step, count - i);
      Rows r{};
      if (in_.dtype == Dtype::kInt32) {
        r.in = memory.as<int32_t>(in_.buffer) + i;
      } else {
        in_.load(memory, i, n, wide);
        r.in = wide;
      }
      r.channels = is_single_ ? n : channels_;
      r.rows = n / r.channels;
      r.requantizer = &requantizer_.in(memory);
      r.out = memory.as<uint8_t>(out_.buffer) + i * size_of(out_.dtype);
      r.out_dtype = static_cast<int64_t>(out_.dtype);
      const bool is_even = is_exact(*r.requantizer);
      (is_even ? set_.exact_rows : set_.rows)(r);
    }
  }

 private:
  static constexpr int64_t kChunk = 4096;

  static bool is_exact(const PackedRequantizer& q) {
    return q.form == Form::kExact && q.rule == Rule::kHalfEven && q.is_narrow;
  }
  bool is_scattered() const { return is_wide_ || (inner_ > 1 && !is_single_); }

  void one_by_one(const Memory& memory) const {
    const PackedRequantizer& q = requantizer_.in(memory);
    int32_t x[kRow];
    each_channel_row(outer_, channels_, inner_,
                     [&](int64_t at, int64_t n, int64_t c, int64_t step) {
                       in_.load(memory, at, n, x);
                       for (int64_t i = 0; i < n; ++i) {
                         x[i] = reference_code(q, x[i], c + i * step);
                       }
                       out_.store(memory, at, n, x);
                     });
  }
  // Of the exact form, whose numbers are those of the formula.
  static int32_t reference_code(const PackedRequantizer& q, int64_t x, int64_t c) {
    const int64_t steps = rescaled(x - q.input_zero_point, q.multiplier()[c],
                                   q.shift()[c], q.rule);
    return coded(steps, q.zero_point, q.low, q.high);
  }

  const Kernels& set_;
  Source in_, out_;
  int64_t outer_, channels_, inner_, width_;
  bool is_wide_, is_single_;
  Requantizer requantizer_;
};

class Add : public Step {
 public:
  Add(Words& words, const Maker& maker)
      : set_(kernels()), out_(words, maker), count_(words.size()) {
    const int64_t n = words.next(1, 1 << 20, "a sum must have terms");
    for (int64_t i = 0; i < n; ++i) {
      const Source in(words, maker);
      const int32_t zero_point = words.int32(), multiplier = words.int32();
      maker.holds(in.buffer, count_);
      terms_.push_back({in, zero_point, multiplier});
    }
    shift_ = static_cast<int>(words.next(0, 62, "a shift must lie in 0 to 62"));
    zero_point_ = words.int32();
    low_ = words.int32();
    high_ = words.int32();
    check_fits(out_.dtype, low_, high_);
    maker.holds(out_.buffer, count_);
    is_pair_ = n == 2 && make_pair();
    is_narrow_ = reach() < static_cast<__int128>(1) << 61;
  }
  std::string explain(const uint8_t*) const override {
    return is_pair_ ? "two parts of 16 bits" : is_narrow_ ? "64 bits" : "128 bits";
  }

  void run(const Memory& memory) const override {
    if (is_pair_) {
      PairSum pair = pair_;
      pair.a = memory.as<uint8_t>(terms_[0].in.buffer);
      pair.b = memory.as<uint8_t>(terms_[1].in.buffer);
      pair.n = count_;
      pair.out = memory.as<uint8_t>(out_.buffer);
      return set_.pair_sum(pair);
    }
    if (is_narrow_) return narrow(memory);
    each_row(count_, [&](int64_t at, int64_t n) {
      int32_t x[kRow];
      __int128 sums[kRow] = {};
      for (const Term& term : terms_) {
        term.in.load(memory, at, n, x);
        for (int64_t i = 0; i < n; ++i) {
          const int64_t far = static_cast<int64_t>(x[i]) - term.zero_point;
          sums[i] += static_cast<__int128>(far) * term.multiplier;
        }
      }
      for (int64_t i = 0; i < n; ++i) x[i] = code(sums[i]);
      out_.store(memory, at, n, x);
    });
  }

 private:
  struct Term {
    Source in;
    int32_t zero_point, multiplier;
  };

  int32_t code(__int128 sum) const {
    return coded(half_even(sum, shift_), zero_point_, low_, high_);
  }

  // The largest magnitude of a sum, its rounding included; of terms that fit 32 bits.
  __int128 reach() const {
    __int128 found = static_cast<__int128>(1) << shift_;
    for (const Term& term : terms_) {
      const int64_t far = (int64_t{1} << (8 * size_of(term.in.dtype))) +
                          std::llabs(term.zero_point);
      if (far > INT32_MAX) return static_cast<__int128>(1) << 100;
      found += static_cast<__int128>(far) * std::llabs(term.multiplier);
    }
    return found;
  }

  void narrow(const Memory& memory) const {
    each_row(count_, [&](int64_t at, int64_t n) {
      alignas(64) int32_t x[kRow];  // Whole registers.
      alignas(64) int64_t sums[kRow];
      for (const Term& term : terms_) {
        term.in.load(memory, at, n, x);
        set_.weigh({x, n, term.zero_point, term.multiplier, &term == &terms_[0], sums});
      }
      set_.round({sums, n, shift_, zero_point_, low_, high_, x});
      out_.store(memory, at, n, x);
    });
  }

  bool make_pair() {
    const Term &a = terms_[0], &b = terms_[1];
    for (Dtype dtype : {a.in.dtype, b.in.dtype, out_.dtype}) {
      if (size_of(dtype) != 1) return false;
    }
    pair_ = {};
    pair_.is_a_signed = a.in.dtype == Dtype::kInt8;
    pair_.is_b_signed = b.in.dtype == Dtype::kInt8;
    const auto ratio = [&](const Term& term) {
      return std::ldexp(static_cast<long double>(term.multiplier), -shift_);
    };
    const auto code_of = [&](int64_t x, int64_t y) {
      return code(static_cast<__int128>(x - a.zero_point) * a.multiplier +
                  static_cast<__int128>(y - b.zero_point) * b.multiplier);
    };
    return fit_pair_sum(ratio(a), ratio(b), low_, high_, code_of, &pair_);
  }

  const Kernels& set_;
  Source out_;
  int64_t count_;
  std::vector<Term> terms_;
  int shift_;
  int32_t zero_point_, low_, high_;
  bool is_pair_, is_narrow_;
  PairSum pair_;
};

class Clip : public Step {
 public:
  Clip(Words& words, const Maker& maker)
      : in_(words, maker),
        out_(words, maker),
        count_(words.size()),
        low_(words.int32()),
        high_(words.int32()) {
    maker.holds(in_.buffer, count_);
    maker.holds(out_.buffer, count_);
  }
  void run(const Memory& memory) const override {
    each_row(count_, [&](int64_t at, int64_t n) {
      int32_t x[kRow];
      in_.load(memory, at, n, x);
      for (int64_t i = 0; i < n; ++i) x[i] = std::min(std::max(x[i], low_), high_);
      out_.store(memory, at, n, x);
    });
  }

 private:
  Source in_, out_;
  int64_t count_;
  int32_t low_, high_;
};

class Pair : public Step {
 public:
  Pair(Words& words, const Maker& maker)
      : kind_(words.next(0, 2, "an unknown kind of pair")),
        a_(words, maker),
        b_(words, maker),
        out_(words, maker) {
    const int64_t rank = words.next(0, 64, "a pair has too many axes");
    at_.sizes = words.list(rank);
    a_offset_ = words.size();
    at_.a = words.list(rank);
    b_offset_ = words.size();
    at_.b = words.list(rank);
    za_ = words.int32();
    zb_ = words.int32();
    maker.holds(a_.buffer, at_.sizes, a_offset_, at_.a);
    maker.holds(b_.buffer, at_.sizes, b_offset_, at_.b);
    maker.holds(out_.buffer, count_of(at_.sizes));
    check(kind_ != 0 || out_.dtype == Dtype::kInt32, "products must be int32");
  }
  void run(const Memory& memory) const override {
    at_.each([&](int64_t i, int64_t s, int64_t j, int64_t t, int64_t out, int64_t n) {
      int32_t x[kRow], y[kRow];
      a_.load(memory, a_offset_ + i, n, x, s);
      b_.load(memory, b_offset_ + j, n, y, t);
      for (int64_t k = 0; k < n; ++k) {
        if (kind_ == 0) {  // In 32 bits, which wrap.
          x[k] = static_cast<int32_t>(
              (static_cast<uint32_t>(x[k]) - static_cast<uint32_t>(za_)) *
              (static_cast<uint32_t>(y[k]) - static_cast<uint32_t>(zb_)));
        } else {
          x[k] = kind_ == 1 ? std::max(x[k], y[k]) : std::min(x[k], y[k]);
        }
      }
      out_.store(memory, out, n, x);
    });
  }

 private:
  int64_t kind_;
  Source a_, b_, out_;
  int64_t a_offset_, b_offset_;
  Strided at_;
  int32_t za_, zb_;
};

class Multiply : public Step {
 public:
  Multiply(Words& words, const Maker& maker)
      : in_(words, maker),
        out_(words, maker),
        outer_(words.size()),
        channels_(words.size()),
        inner_(words.size()) {
    kernel_ = Kept(maker, words.size(), channels_ * 4);
    bias_ = Kept(maker, words.size(), channels_ * 4);
    offset_ = words.int32();
    shift_ = words.next(0, 31, "a left shift must lie in 0 to 31");
    const int64_t count = count_of({outer_, channels_, inner_});
    maker.holds(in_.buffer, count);
    maker.holds(out_.buffer, Dtype::kInt32, count);
  }
  void pack(const Constants& constants, uint8_t* packed) const override {
    kernel_.pack(constants, packed);
    bias_.pack(constants, packed);
  }
  void run(const Memory& memory) const override {
    const int32_t* kernel = kernel_.in<int32_t>(memory);
    const int32_t* bias = bias_.in<int32_t>(memory);
    int32_t x[kRow];
    each_channel_row(outer_, channels_, inner_,
                     [&](int64_t at, int64_t n, int64_t c, int64_t step) {
                       in_.load(memory, at, n, x);
                       for (int64_t i = 0; i < n; ++i) {
                         const uint32_t far = static_cast<uint32_t>(x[i]) -
                                              static_cast<uint32_t>(offset_);
                         const int64_t o = c + i * step;
                         x[i] = static_cast<int32_t>(
                             (far * static_cast<uint32_t>(kernel[o]) << shift_) +
                             static_cast<uint32_t>(bias[o]));
                       }
                       out_.store(memory, at, n, x);
                     });
  }

 private:
  Source in_, out_;
  int64_t outer_, channels_, inner_;
  Kept kernel_, bias_;
  int32_t offset_;
  int64_t shift_;
};

class Select : public Step {
 public:
  Select(Words& words, const Maker& maker)
      : which_(words, maker), out_(words, maker), count_(words.size()) {
    const int64_t n = words.next(2, 1 << 20, "a selection must have two cases");
    for (int64_t i = 0; i < n; ++i) {
      cases_.emplace_back(words, maker);
      maker.holds(cases_.back().buffer, count_);
    }
    is_scalar_ = words.flag();
    maker.holds(which_.buffer, is_scalar_ ? std::min<int64_t>(count_, 1) : count_);
    maker.holds(out_.buffer, count_);
  }
  void run(const Memory& memory) const override {
    const int32_t most = static_cast<int32_t>(cases_.size()) - 1;
    each_row(count_, [&](int64_t at, int64_t n) {
      int32_t which[kRow], x[kRow], found[kRow];
      which_.load(memory, is_scalar_ ? 0 : at, n, which, is_scalar_ ? 0 : 1);
      for (int64_t i = 0; i < n; ++i) {
        which[i] = most == 1 ? which[i] != 0 : std::min(std::max(which[i], 0), most);
      }
      for (int32_t c = 0; c <= most; ++c) {
        cases_[static_cast<size_t>(c)].load(memory, at, n, x);
        for (int64_t i = 0; i < n; ++i) found[i] = which[i] == c ? x[i] : found[i];
      }
      out_.store(memory, at, n, found);
    });
  }

 private:
  Source which_, out_;
  int64_t count_;
  std::vector<Source> cases_;
  bool is_scalar_;
};

// Products as float32 rounds them, compared exactly.
class Compare : public Step {
 public:
  Compare(Words& words, const Maker& maker)
      : kind_(words.next(0, 5, "an unknown comparison")),
        a_(words, maker),
        b_(words, maker),
        out_(words, maker),
        count_(words.size()) {
    za_ = words.int32();
    zb_ = words.int32();
    m0_ = words.next(1, 1 << 24, "a multiplier must have 24 bits");
    e0_ = words.next(-300, 300, "an exponent must be within 300 of 0");
    m1_ = words.next(1, 1 << 24, "a multiplier must have 24 bits");
    e1_ = words.next(-300, 300, "an exponent must be within 300 of 0");
    maker.holds(a_.buffer, count_);
    maker.holds(b_.buffer, count_);
    maker.holds(out_.buffer, count_);
  }
  void run(const Memory& memory) const override {
    each_row(count_, [&](int64_t at, int64_t n) {
      int32_t x[kRow], y[kRow];
      a_.load(memory, at, n, x);
      b_.load(memory, at, n, y);
      for (int64_t i = 0; i < n; ++i) {
        x[i] = holds(order(to_float32((static_cast<int64_t>(x[i]) - za_) * m0_),
                           to_float32((static_cast<int64_t>(y[i]) - zb_) * m1_)));
      }
      out_.store(memory, at, n, x);
    });
  }

 private:
  // Sign of x * 2^e0 - y * 2^e1: the finer side in units of the other, and its rest.
  int order(int64_t x, int64_t y) const {
    const int64_t bits = std::min<int64_t>(std::llabs(e0_ - e1_), 62);
    int64_t& finer = e0_ < e1_ ? x : y;
    int64_t& other = e0_ < e1_ ? y : x;
    const int64_t whole = finer >> bits;
    const int64_t more = finer != whole * (int64_t{1} << bits);
    finer = 2 * whole + more;
    other = 2 * other;
    return x < y ? -1 : x > y;
  }
  bool holds(int sign) const {
    switch (kind_) {
      case 0:
        return sign == 0;
      case 1:
        return sign != 0;
      case 2:
        return sign < 0;
      case 3:
        return sign <= 0;
      case 4:
        return sign > 0;
      default:
        return sign >= 0;
    }
  }

  int64_t kind_;
  Source a_, b_, out_;
  int64_t count_;
  int32_t za_, zb_;
  int64_t m0_, e0_, m1_, e1_;
};

// Kinds in the order of their names: qjax/graph/operations/arithmetic.py.
enum Kind : int64_t {
  kAbs, kAdd, kAnd, kConvert, kDiv, kEq, kGe, kGt, kLe, kLt, kMax, kMin, kMul, kNe,
  kNeg, kNot, kOr, kRem, kShiftLeft, kShiftRightArithmetic, kShiftRightLogical, kSign,
  kSub, kXor,
};

class Arithmetic : public Step {
 public:
  Arithmetic(Words& words, const Maker& maker)
      : kind_(words.next(0, kXor, "an unknown kind of arithmetic")),
        dtype_(words.next(0, 5, "an unknown type of arithmetic")) {
    const int64_t rank = words.next(0, 64, "arithmetic has too many axes");
    at_.sizes = words.list(rank);
    a_ = Source(words, maker);
    at_.a = words.list(rank);
    b_ = Source(words, maker);
    at_.b = words.list(rank);
    out_ = Source(words, maker);
    maker.holds(a_.buffer, at_.sizes, 0, at_.a);
    maker.holds(b_.buffer, at_.sizes, 0, at_.b);
    maker.holds(out_.buffer, count_of(at_.sizes));
    static constexpr int kBits[] = {8, 8, 16, 16, 32, 1};
    bits_ = kBits[dtype_];
  }
  void run(const Memory& memory) const override {
    at_.each([&](int64_t i, int64_t s, int64_t j, int64_t t, int64_t out, int64_t n) {
      int32_t x[kRow], y[kRow];
      a_.load(memory, i, n, x, s);
      b_.load(memory, j, n, y, t);
      for (int64_t k = 0; k < n; ++k) {
        x[k] = static_cast<int32_t>(reduced(number(x[k], y[k])));
      }
      out_.store(memory, out, n, x);
    });
  }

 private:
  int64_t reduced(int64_t x) const {
    switch (dtype_) {
      case 0:
        return static_cast<int8_t>(x);
      case 1:
        return static_cast<uint8_t>(x);
      case 2:
        return static_cast<int16_t>(x);
      case 3:
        return static_cast<uint16_t>(x);
      case 4:
        return static_cast<int32_t>(x);
      default:
        return x != 0;
    }
  }
  int64_t shifted(int64_t x, int64_t y) const {
    const bool inside = 0 <= y && y < bits_;
    if (kind_ == kShiftLeft) return inside ? x * (int64_t{1} << y) : 0;
    const int64_t unit = int64_t{1} << bits_, low = ((x % unit) + unit) % unit;
    if (kind_ == kShiftRightLogical) return inside ? low >> y : 0;
    const int64_t own = low >= unit / 2 ? low - unit : low;
    return inside ? own >> y : (own < 0 ? -1 : 0);
  }
  int64_t number(int64_t x, int64_t y) const {
    switch (static_cast<Kind>(kind_)) {
      case kAbs:
        return std::llabs(x);
      case kAdd:
        return x + y;
      case kAnd:
        return x & y;
      case kConvert:
        return x;
      case kDiv:
        return y == 0 ? -1 : x / y;
      case kEq:
        return x == y;
      case kGe:
        return x >= y;
      case kGt:
        return x > y;
      case kLe:
        return x <= y;
      case kLt:
        return x < y;
      case kMax:
        return std::max(x, y);
      case kMin:
        return std::min(x, y);
      case kMul:
        return x * y;
      case kNe:
        return x != y;
      case kNeg:
        return -x;
      case kNot:
        return dtype_ == 5 ? 1 - x : ~x;
      case kOr:
        return x | y;
      case kRem:
        return y == 0 ? x : x % y;
      case kShiftLeft:
      case kShiftRightArithmetic:
      case kShiftRightLogical:
        return shifted(x, y);
      case kSign:
        return (x > 0) - (x < 0);
      case kSub:
        return x - y;
      case kXor:
        return x ^ y;
    }
    return 0;
  }

  int64_t kind_, dtype_;
  Source a_, b_, out_;
  Strided at_;
  int bits_;
};

}  // namespace

const Entry kElementwise[] = {
    {3, make<Requantize>},
    {4, make<Add>},
    {5, make<Clip>},
    {8, make<Pair>},
    {9, make<Multiply>},
    {15, make<Select>},
    {16, make<Compare>},
    {17, make<Arithmetic>},
};

}  // namespace qjax
