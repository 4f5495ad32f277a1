// Steps of graphs made from TFLite along the last axis: softmaxes, norms.
#include <algorithm>

#include "fractions.h"
#include "requantizer.h"
#include "rows.h"
#include "rules.h"

namespace qjax {
namespace {

// Rows of a softmax, with numbers by their distance from the largest code of a row.
class OfRows : public Step {
 public:
  OfRows(Words& words, const Maker& maker)
      : in_(words, maker),
        out_(words, maker),
        outer_(words.size()),
        n_(words.next(1, 4095, "a softmax must have 1 to 4095 terms")) {
    const int64_t from = words.size();
    rows_ = words.next(1, kMostElements / 4, "a table must have rows");
    exponentials_ = Kept(maker, from, rows_ * 4);
    const int64_t count = count_of({outer_, n_});
    maker.holds(in_.buffer, count);
    maker.holds(out_.buffer, count);
  }
  int64_t scratch_bytes() const override { return n_ * 4; }
  int64_t work() const override { return count_of({outer_, n_, 16}); }

 protected:
  void pack_exponentials(const Constants& constants, uint8_t* packed, int32_t first,
                         int32_t most) const {
    const int32_t* table = constants.at<int32_t>(exponentials_.from, rows_);
    for (int64_t i = 0; i < rows_; ++i) {
      check(0 <= table[i] && table[i] <= most, "an exponential is out of range");
    }
    check(table[0] >= first, "the exponential of 0 is too small");
    exponentials_.pack(constants, packed);
  }
  // Calls `use(places, first)` with the place of each code of a row in the table.
  template <class Use>
  void each(const Memory& memory, Use&& use) const {
    auto* x = reinterpret_cast<int32_t*>(memory.scratch);
    for (int64_t o = 0; o < outer_; ++o) {
      in_.load(memory, o * n_, n_, x);
      const int64_t top = *std::max_element(x, x + n_);
      for (int64_t i = 0; i < n_; ++i) {
        x[i] = static_cast<int32_t>(std::min(top - x[i], rows_ - 1));
      }
      use(x);
      out_.store(memory, o * n_, n_, x);
    }
  }

  Source in_, out_;
  int64_t outer_, n_, rows_;
  Kept exponentials_;
};
class TfliteSoftmax : public OfRows {
 public:
  TfliteSoftmax(Words& words, const Maker& maker)
      : OfRows(words, maker), low_(words.int32()), high_(words.int32()) {
    check_fits(out_.dtype, low_, high_);
  }
  void pack(const Constants& constants, uint8_t* packed) const override {
    pack_exponentials(constants, packed, INT32_MAX, INT32_MAX);
  }
  void run(const Memory& memory) const override {
    const int32_t* table = exponentials_.in<int32_t>(memory);
    each(memory, [&](int32_t* x) {
      int64_t total = 0;
      for (int64_t i = 0; i < n_; ++i) {
        x[i] = table[x[i]];
        total += divided_by_power(x[i], 12);
      }
      const int length = length_of(total);
      const int64_t quotient = newton((total << (32 - length)) - (int64_t{1} << 31));
      for (int64_t i = 0; i < n_; ++i) {
        const int64_t share = high_product(quotient, x[i]);
        x[i] = coded(divided_by_power(share, length + 3), low_, low_, high_);
      }
    });
  }

 private:
  int32_t low_, high_;
};

class TfliteLogSoftmax : public OfRows {
 public:
  TfliteLogSoftmax(Words& words, const Maker& maker)
      : OfRows(words, maker), steps_(maker, words.size(), rows_ * 4) {
    zero_point_ = words.int32();
    low_ = words.int32();
    high_ = words.int32();
    check_fits(out_.dtype, low_, high_);
  }
  void pack(const Constants& constants, uint8_t* packed) const override {
    pack_exponentials(constants, packed, INT32_MAX, INT32_MAX);
    steps_.pack(constants, packed);
  }
  void run(const Memory& memory) const override {
    const int32_t* table = exponentials_.in<int32_t>(memory);
    const int32_t* steps = steps_.in<int32_t>(memory);
    each(memory, [&](int32_t* x) {
      int64_t total = 0;
      for (int64_t i = 0; i < n_; ++i) total += divided_by_power(table[x[i]], 12);
      const int64_t log = logarithm(total);
      for (int64_t i = 0; i < n_; ++i) {
        const int64_t rest = divided_by_power(steps[x[i]] - log, 22);
        x[i] = coded(rest, zero_point_, low_, high_);
      }
    });
  }

 private:
  Kept steps_;
  int32_t zero_point_ = 0, low_ = 0, high_ = 0;
};

// With 16-bit codes: the quotient comes from a table.
class TfliteSoftmax16 : public OfRows {
 public:
  TfliteSoftmax16(Words& words, const Maker& maker)
      : OfRows(words, maker),
        reciprocals_(maker, words.size(), kReciprocals * 4),
        high_(static_cast<int32_t>(
            words.next(0, INT32_MAX, "the largest code must not be negative"))) {
    check_fits(out_.dtype, 0, high_);
  }
  void pack(const Constants& constants, uint8_t* packed) const override {
    pack_exponentials(constants, packed, 1, kMost);
    const int32_t* table = constants.at<int32_t>(reciprocals_.from, kReciprocals);
    for (int64_t i = 0; i < kReciprocals; ++i) {
      check(0 <= table[i] && table[i] <= kMost, "a reciprocal is out of range");
    }
    reciprocals_.pack(constants, packed);
  }
  void run(const Memory& memory) const override {
    const int32_t* table = exponentials_.in<int32_t>(memory);
    const int32_t* reciprocals = reciprocals_.in<int32_t>(memory);
    each(memory, [&](int32_t* x) {
      int64_t total = 0;
      for (int64_t i = 0; i < n_; ++i) total += x[i] = table[x[i]];
      const int room = 32 - length_of(total), shift = 31 - room;
      const int64_t place = (((total << (room - 1)) + (1 << 13)) >> 14) - (1 << 16);
      const int64_t inside = std::min(std::max<int64_t>(place, 0), kReciprocals - 1);
      const int64_t half = (int64_t{1} << shift) >> 1;
      for (int64_t i = 0; i < n_; ++i) {
        const int64_t product = int64_t{x[i]} * reciprocals[inside];
        x[i] = coded((product + half) >> shift, 0, 0, high_);
      }
    });
  }

 private:
  static constexpr int64_t kReciprocals = 1 << 16;
  static constexpr int32_t kMost = 0x7fff;

  Kept reciprocals_;
  int32_t high_;
};

// code = clip(round(128 * q / sqrt(sum(q^2)))), q about its zero point
class TfliteL2Norm : public Step {
 public:
  TfliteL2Norm(Words& words, const Maker& maker)
      : in_(words, maker), out_(words, maker), outer_(words.size()), n_(words.size()) {
    zero_ = words.int32();
    low_ = words.int32();
    high_ = words.int32();
    const int64_t count = count_of({outer_, n_});
    maker.holds(in_.buffer, count);
    maker.holds(out_.buffer, count);
    check_fits(out_.dtype, low_, high_);
  }
  int64_t work() const override { return count_of({outer_, n_, 8}); }
  void run(const Memory& memory) const override {
    int32_t x[kRow];
    const uint32_t zero = static_cast<uint32_t>(zero_);
    const auto load = [&](int64_t at, int64_t n) {
      in_.load(memory, at, n, x);
      for (int64_t i = 0; i < n; ++i) {
        x[i] = static_cast<int32_t>(static_cast<uint32_t>(x[i]) - zero);
      }
    };
    for (int64_t o = 0; o < outer_; ++o) {
      uint32_t total = 0;
      each_row(n_, [&](int64_t at, int64_t n) {
        load(o * n_ + at, n);
        for (int64_t i = 0; i < n; ++i) {
          total += static_cast<uint32_t>(x[i]) * static_cast<uint32_t>(x[i]);
        }
      });
      const auto root = inverse_root(static_cast<int32_t>(total));
      each_row(n_, [&](int64_t at, int64_t n) {
        load(o * n_ + at, n);
        for (int64_t i = 0; i < n; ++i) {
          const int64_t code =
              rescaled(x[i], root.first, root.second + 24, Rule::kTfliteDouble);
          x[i] = coded(code, 0, low_, high_);
        }
        out_.store(memory, o * n_ + at, n, x);
      });
    }
  }

 private:
  Source in_, out_;
  int64_t outer_, n_;
  int32_t zero_, low_, high_;
};

}  // namespace

const Entry kTfliteRows[] = {
    {26, make<TfliteSoftmax>},
    {31, make<TfliteLogSoftmax>},
    {32, make<TfliteL2Norm>},
    {33, make<TfliteSoftmax16>},
};

}  // namespace qjax
