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
      : set_(kernels()),
        in_(words, maker),
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
    is_bytes_ = channels_ == 1 && size_of(in_.dtype) == 1 && size_of(dtype) == 1;
    if (is_bytes_) bytes_ = maker.layout.reserve(kBytes);
  }
  void pack(const Constants& constants, uint8_t* packed) const override {
    table_.pack(constants, packed);
    if (!is_bytes_) return;
    const uint8_t* table = constants.at<uint8_t>(table_.from, rows_);
    for (int64_t i = 0; i < kBytes; ++i) {  // By the bits of a code.
      const int64_t x = in_.dtype == Dtype::kInt8 ? static_cast<int8_t>(i) : i;
      packed[bytes_ + i] = table[std::min(std::max<int64_t>(x - low_, 0), rows_ - 1)];
    }
  }
  void run(const Memory& memory) const override {
    if (is_bytes_) {
      return set_.look_up(memory.packed + bytes_, memory.as<uint8_t>(in_.buffer),
                          memory.as<uint8_t>(out_.buffer), outer_ * inner_);
    }
    const uint8_t* table = table_.in<uint8_t>(memory);
    with_type(out_.dtype, [&](auto* type) {
      using T = Pointee<decltype(type)>;
      const T* own = reinterpret_cast<const T*>(table);
      T* out = memory.as<T>(out_.buffer);
      int32_t x[kRow];
      each_channel_row(outer_, channels_, inner_,
                       [&](int64_t at, int64_t n, int64_t c, int64_t step) {
                         in_.load(memory, at, n, x);
                         if (channels_ == 1) return one_channel(x, n, own, out + at);
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
  template <class T>
  void one_channel(const int32_t* x, int64_t n, const T* table, T* out) const {
    const int64_t low = low_, last = rows_ - 1;
    for (int64_t i = 0; i < n; ++i) {
      out[i] = table[std::min(std::max<int64_t>(x[i] - low, 0), last)];
    }
  }

  const Kernels& set_;
  Source in_, out_;
  int64_t outer_, channels_, inner_, rows_;
  int32_t low_;
  Kept table_;
  bool is_bytes_;
  int64_t bytes_ = 0;
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
    {23, make<Loop>},
};

}  // namespace qjax
