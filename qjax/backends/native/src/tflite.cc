// Steps of graphs made from TFLite: qjax/graph/operations/tflite.py.
#include <algorithm>
#include <tuple>
#include <type_traits>

#include "pair_sums.h"
#include "requantizer.h"
#include "rows.h"
#include "rules.h"

namespace qjax {
namespace {

// code = clip(rescale(sum(rescale((q_i - z_i) << left_shift))) + zero_point)
class TfliteAdd : public Step {
 public:
  TfliteAdd(Words& words, const Maker& maker)
      : set_(kernels()),
        a_(words, maker),
        b_(words, maker),
        out_(words, maker),
        count_(words.size()) {
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
    is_pair_ = make_pair();
  }
  std::string explain(const uint8_t*) const override {
    return is_pair_ ? "two parts of 16 bits" : "64 bits";
  }
  void run(const Memory& memory) const override {
    if (is_pair_) {
      PairSum pair = pair_;
      pair.a = memory.as<uint8_t>(a_.buffer);
      pair.b = memory.as<uint8_t>(b_.buffer);
      pair.n = count_;
      pair.out = memory.as<uint8_t>(out_.buffer);
      return set_.pair_sum(pair);
    }
    each_row(count_, [&](int64_t at, int64_t n) {
      int32_t x[kRow];
      int64_t sums[kRow] = {};
      add(a_, za_, first_, tables_[0], memory, at, n, sums);
      add(b_, zb_, second_, tables_[1], memory, at, n, sums);
      for (int64_t i = 0; i < n; ++i) {
        x[i] = code(sums[i]);
      }
      out_.store(memory, at, n, x);
    });
  }

 private:
  struct Number {
    int32_t multiplier, shift;
  };

  int32_t code(int64_t sum) const {
    const int64_t steps = rescaled(sum, last_.multiplier, last_.shift, rule_);
    return coded(steps, zero_point_, low_, high_);
  }
  bool make_pair() {
    if (tables_[0].empty() || tables_[1].empty() || size_of(out_.dtype) != 1) {
      return false;
    }
    pair_ = {};
    pair_.is_a_signed = a_.dtype == Dtype::kInt8;
    pair_.is_b_signed = b_.dtype == Dtype::kInt8;
    const auto ratio = [&](Number number) {
      const long double product = static_cast<long double>(number.multiplier) * last_.multiplier;
      return std::ldexp(product, left_ - number.shift - last_.shift);
    };
    const int a = pair_.is_a_signed ? 128 : 0, b = pair_.is_b_signed ? 128 : 0;
    const auto code_of = [&](int x, int y) {
      return code(tables_[0][static_cast<size_t>(x + a)] +
                  tables_[1][static_cast<size_t>(y + b)]);
    };
    return fit_pair_sum(ratio(first_), ratio(second_), low_, high_, code_of, &pair_);
  }
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

  const Kernels& set_;
  Source a_, b_, out_;
  int64_t count_;
  int left_;
  int32_t za_, zb_;
  Number first_, second_, last_;
  int32_t zero_point_, low_, high_;
  Rule rule_;
  std::vector<int64_t> tables_[2];
  bool is_pair_;
  PairSum pair_;
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

// Images resized along both axes: four codes weighed, in units of 2^-20.
class TfliteResize : public Step {
 public:
  TfliteResize(Words& words, const Maker& maker)
      : in_(words, maker), out_(words, maker), batch_(words.size()) {
    for (Axis* axis : {&rows_, &columns_}) {
      axis->from = words.size();
      axis->to = words.size();
      axis->places = Kept(maker, words.size(), count_of({3, axis->to}) * 4);
    }
    channels_ = words.size();
    width_ = count_of({columns_.from, channels_});
    maker.holds(in_.buffer, count_of({batch_, rows_.from, width_}));
    maker.holds(out_.buffer, count_of({batch_, rows_.to, columns_.to, channels_}));
    is_empty_ = count_of({batch_, rows_.to, columns_.to, channels_}) == 0;
  }
  int64_t scratch_bytes() const override { return is_empty_ ? 0 : width_ * 8; }
  int64_t work() const override {
    return count_of({batch_, rows_.to, columns_.to, channels_});
  }
  void pack(const Constants& constants, uint8_t* packed) const override {
    for (const Axis* axis : {&rows_, &columns_}) {
      const int32_t* places = constants.at<int32_t>(axis->places.from, 3 * axis->to);
      for (int64_t i = 0; i < axis->to; ++i) {
        const int32_t before = places[i], after = places[axis->to + i];
        const int32_t rest = places[2 * axis->to + i];
        check(0 <= before && before < axis->from && 0 <= after && after < axis->from,
              "a place lies outside of its axis");
        check(-1024 <= rest && rest <= 1024, "a rest must lie within 2^10");
      }
      axis->places.pack(constants, packed);
    }
  }
  void run(const Memory& memory) const override {
    if (is_empty_) return;
    // Sums of bytes fit 32 bits.
    return size_of(in_.dtype) == 1 ? resize<int32_t>(memory) : resize<int64_t>(memory);
  }

 private:
  struct Axis {
    int64_t from = 0, to = 0;
    Kept places;
  };

  template <class Wide>
  void resize(const Memory& memory) const {
    const int32_t* rows = rows_.places.in<int32_t>(memory);
    const int32_t* columns = columns_.places.in<int32_t>(memory);
    auto* between = reinterpret_cast<Wide*>(memory.scratch);
    int64_t out = 0;
    for (int64_t b = 0; b < batch_; ++b) {
      for (int64_t r = 0; r < rows_.to; ++r) {
        const int64_t image = b * rows_.from;
        const int64_t before = (image + rows[r]) * width_;
        const int64_t after = (image + rows[rows_.to + r]) * width_;
        const int32_t down = rows[2 * rows_.to + r];
        each_row(width_, [&](int64_t at, int64_t n) {
          int32_t x[kRow], y[kRow];
          in_.load(memory, before + at, n, x);
          in_.load(memory, after + at, n, y);
          for (int64_t i = 0; i < n; ++i) {
            between[at + i] = weighed<Wide>(x[i], y[i], down);
          }
        });
        for (int64_t c = 0; c < columns_.to; ++c) {
          const Wide* left = between + columns[c] * channels_;
          const Wide* right = between + columns[columns_.to + c] * channels_;
          const int32_t far = columns[2 * columns_.to + c];
          each_row(channels_, [&](int64_t at, int64_t n) {
            int32_t x[kRow];
            for (int64_t i = 0; i < n; ++i) {
              const Wide total = weighed<Wide>(left[at + i], right[at + i], far);
              const Wide half = total > 0 ? 1 << 19 : -(1 << 19);
              x[i] = static_cast<int32_t>(wrapped<Wide>(total, half) / (1 << 20));
            }
            out_.store(memory, out + at, n, x);
          });
          out += channels_;
        }
      }
    }
  }
  // Unsigned, so that numbers that no graph has wrap.
  template <class Wide>
  static Wide wrapped(Wide a, Wide b) {
    using Bits = std::make_unsigned_t<Wide>;
    return static_cast<Wide>(static_cast<Bits>(a) + static_cast<Bits>(b));
  }
  template <class Wide>
  static Wide weighed(Wide a, Wide b, int32_t rest) {
    using Bits = std::make_unsigned_t<Wide>;
    const Bits first = static_cast<Bits>(a) * static_cast<Bits>(Wide{1024} - rest);
    const Bits second = static_cast<Bits>(b) * static_cast<Bits>(Wide{rest});
    return static_cast<Wide>(first + second);
  }

  Source in_, out_;
  int64_t batch_, channels_ = 0, width_ = 0;
  Axis rows_, columns_;
  bool is_empty_ = false;
};

}  // namespace

const Entry kTflite[] = {
    {24, make<TfliteAdd>},
    {25, make<TfliteAverage>},
    {30, make<TfliteResize>},
};

}  // namespace qjax
