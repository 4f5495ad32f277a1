// Steps of graphs made from TFLite: qjax/graph/operations/tflite.py.
#include <algorithm>
#include <tuple>

#include "requantizer.h"
#include "rows.h"
#include "rules.h"

namespace qjax {
namespace {

// code = clip(rescale(sum(rescale((q_i - z_i) << left_shift))) + zero_point)
class TfliteAdd : public Step {
 public:
  TfliteAdd(Words& words, const Maker& maker)
      : a_(words, maker), b_(words, maker), out_(words, maker), count_(words.size()) {
    left_ = static_cast<int>(words.next(0, 31, "a left shift must lie in 0 to 31"));
    za_ = words.int32();
    zb_ = words.int32();
    for (Number* number : {&first_, &second_, &last_}) {
      number->multiplier = words.int32();
      number->shift =
          static_cast<int32_t>(words.next(0, 62, "a shift must lie in 0 to 62"));
    }
    zero_point_ = words.int32();
    low_ = words.int32();
    high_ = words.int32();
    rule_ = static_cast<Rule>(words.next(0, 3, "an unknown rule of rounding"));
    maker.holds(a_.buffer, count_);
    maker.holds(b_.buffer, count_);
    maker.holds(out_.buffer, count_);
    check_fits(out_.dtype, low_, high_);
    // What a byte adds, from a table.
    for (const auto& [source, zero, number, table] :
         {std::tuple(&a_, za_, &first_, &tables_[0]),
          std::tuple(&b_, zb_, &second_, &tables_[1])}) {
      if (size_of(source->dtype) > 1) continue;
      const int32_t first = source->dtype == Dtype::kInt8 ? -128 : 0;
      for (int32_t q = first; q < first + 256; ++q) {
        table->push_back(part(q, zero, *number));
      }
    }
  }
  void run(const Memory& memory) const override {
    each_row(count_, [&](int64_t at, int64_t n) {
      int32_t x[kRow];
      int64_t sums[kRow] = {};
      add(a_, za_, first_, tables_[0], memory, at, n, sums);
      add(b_, zb_, second_, tables_[1], memory, at, n, sums);
      for (int64_t i = 0; i < n; ++i) {
        x[i] = coded(rescaled(sums[i], last_.multiplier, last_.shift, rule_),
                     zero_point_, low_, high_);
      }
      out_.store(memory, at, n, x);
    });
  }

 private:
  struct Number {
    int32_t multiplier, shift;
  };

  int64_t part(int64_t q, int64_t zero_point, Number number) const {
    const int64_t shifted = (q - zero_point) * (int64_t{1} << left_);
    return rescaled(shifted, number.multiplier, number.shift, rule_);
  }
  void add(const Source& source, int32_t zero_point, Number number,
           const std::vector<int64_t>& table, const Memory& memory, int64_t at,
           int64_t n, int64_t* sums) const {
    int32_t x[kRow];
    source.load(memory, at, n, x);
    if (table.empty()) {
      for (int64_t i = 0; i < n; ++i) sums[i] += part(x[i], zero_point, number);
      return;
    }
    const int64_t* own = table.data() + (source.dtype == Dtype::kInt8 ? 128 : 0);
    for (int64_t i = 0; i < n; ++i) sums[i] += own[x[i]];
  }

  Source a_, b_, out_;
  int64_t count_;
  int left_;
  int32_t za_, zb_;
  Number first_, second_, last_;
  int32_t zero_point_, low_, high_;
  Rule rule_;
  std::vector<int64_t> tables_[2];
};

// code = clip(round(q / counts)), halves away from zero
class TfliteAverage : public Step {
 public:
  TfliteAverage(Words& words, const Maker& maker)
      : in_(words, maker),
        out_(words, maker),
        outer_(words.size()),
        channels_(words.size()),
        inner_(words.size()),
        counts_(maker, words.size(), channels_ * 4),
        low_(words.int32()),
        high_(words.int32()) {
    const int64_t count = count_of({outer_, channels_, inner_});
    maker.holds(in_.buffer, count);
    maker.holds(out_.buffer, count);
    check_fits(out_.dtype, low_, high_);
  }
  void pack(const Constants& constants, uint8_t* packed) const override {
    const int32_t* counts = constants.at<int32_t>(counts_.from, channels_);
    for (int64_t c = 0; c < channels_; ++c) {
      check(counts[c] > 0, "counts must be positive");
    }
    counts_.pack(constants, packed);
  }
  void run(const Memory& memory) const override {
    const int32_t* counts = counts_.in<int32_t>(memory);
    int32_t x[kRow];
    each_channel_row(outer_, channels_, inner_,
                     [&](int64_t at, int64_t n, int64_t c, int64_t step) {
                       in_.load(memory, at, n, x);
                       for (int64_t i = 0; i < n; ++i) {
                         const int64_t count = counts[c + i * step];
                         const int64_t half = x[i] > 0 ? count / 2 : -(count / 2);
                         x[i] = coded((x[i] + half) / count, 0, low_, high_);
                       }
                       out_.store(memory, at, n, x);
                     });
  }

 private:
  Source in_, out_;
  int64_t outer_, channels_, inner_;
  Kept counts_;
  int32_t low_, high_;
};

// Products of gemmlowp: a * b / 2^31, halves up, by a nudge, truncated; saturates.
int64_t high_product(int64_t a, int64_t b) {
  const int64_t product = a * b;
  const int64_t nudge = product >= 0 ? int64_t{1} << 30 : 1 - (int64_t{1} << 30);
  return std::min<int64_t>((product + nudge) / (int64_t{1} << 31), INT32_MAX);
}

// x / 2^n to nearest, halves away from zero.
int64_t divided_by_power(int64_t x, int n) {
  const int64_t rest = (int64_t{1} << n) - 1;
  return (x >> n) + ((x & rest) > (rest >> 1) + (x < 0) ? 1 : 0);
}

// gemmlowp's 1 / (1 + x) for x in [0, 1), with 31 bits of fraction.
int64_t newton(int64_t x) {
  const auto held = [](int64_t v) {
    return std::min<int64_t>(std::max<int64_t>(v, INT32_MIN), INT32_MAX);
  };
  const int64_t total = x + INT32_MAX;
  const int64_t half = (total + (total >= 0 ? 1 : -1)) / 2;
  int64_t y = 1515870810 + high_product(half, -1010580540);
  for (int step = 0; step < 3; ++step) {
    const int64_t rest = (int64_t{1} << 29) - high_product(half, y);
    y += held(high_product(y, rest) * 4);
  }
  return held(y * 2);
}

class TfliteSoftmax : public Step {
 public:
  TfliteSoftmax(Words& words, const Maker& maker)
      : in_(words, maker),
        out_(words, maker),
        outer_(words.size()),
        n_(words.next(1, 4095, "a softmax must have 1 to 4095 terms")) {
    const int64_t from = words.size();
    rows_ = words.next(1, kMostElements, "a table must have rows");
    table_ = Kept(maker, from, rows_ * 4);
    low_ = words.int32();
    high_ = words.int32();
    const int64_t count = count_of({outer_, n_});
    maker.holds(in_.buffer, count);
    maker.holds(out_.buffer, count);
    check_fits(out_.dtype, low_, high_);
  }
  int64_t scratch_bytes() const override { return n_ * 4; }
  void pack(const Constants& constants, uint8_t* packed) const override {
    const int32_t* table = constants.at<int32_t>(table_.from, rows_);
    for (int64_t i = 0; i < rows_; ++i) {
      check(table[i] >= 0, "exponentials must not be negative");
    }
    check(table[0] == INT32_MAX, "the exponential of 0 must be 1");
    table_.pack(constants, packed);
  }
  void run(const Memory& memory) const override {
    const int32_t* table = table_.in<int32_t>(memory);
    auto* x = reinterpret_cast<int32_t*>(memory.scratch);
    for (int64_t o = 0; o < outer_; ++o) {
      in_.load(memory, o * n_, n_, x);
      const int32_t top = *std::max_element(x, x + n_);
      int64_t total = 0;
      for (int64_t i = 0; i < n_; ++i) {
        const int64_t place = static_cast<int64_t>(top) - x[i];
        x[i] = table[std::min(place, rows_ - 1)];
        total += divided_by_power(x[i], 12);
      }
      const int length = 64 - __builtin_clzll(static_cast<uint64_t>(total));
      const int64_t quotient =
          newton((total << (32 - length)) - (int64_t{1} << 31));
      for (int64_t i = 0; i < n_; ++i) {
        const int64_t share = high_product(quotient, x[i]);
        x[i] = coded(divided_by_power(share, length + 3), low_, low_, high_);
      }
      out_.store(memory, o * n_, n_, x);
    }
  }

 private:
  Source in_, out_;
  int64_t outer_, n_, rows_;
  Kept table_;
  int32_t low_, high_;
};

}  // namespace

const Entry kTflite[] = {
    {24, make<TfliteAdd>},
    {25, make<TfliteAverage>},
    {26, make<TfliteSoftmax>},
};

}  // namespace qjax
