// Products of two values, sums over the last axis of both.
#include <algorithm>

#include "requantizer.h"
#include "rows.h"

namespace qjax {
namespace {

// The second value is packed as a kernel is, in each run. With a' and b' the codes that
// an instruction set multiplies, and their zero points,
//
//   sum (a' - za)(b' - zb) = sum a' b' - za sum b' + n za zb - zb sum a'
//
// in 32 bits, which wrap: the middle terms are a bias, the last one is a row's.
class Matmul : public Step {
 public:
  Matmul(Words& words, const Maker& maker)
      : set_(kernels()),
        a_(words, maker),
        b_(words, maker),
        out_(maker.buffer(words)),
        batch_(words.size()),
        m_(words.size()),
        k_(words.size()),
        n_(words.size()),
        za_(words.int32()),
        zb_(words.int32()) {
    maker.holds(a_.buffer, count_of({batch_, m_, k_}));
    maker.holds(b_.buffer, count_of({batch_, n_, k_}));
    maker.holds(out_, Dtype::kInt32, count_of({batch_, m_, n_}));
    // Bytes about a zero point of their type are 9 bits; more may not fit 16.
    const auto fits = [](Dtype dtype, int64_t zero) {
      return size_of(dtype) == 1 ? -32000 <= zero && zero <= 32000
                                 : dtype == Dtype::kInt16 && zero == 0;
    };
    is_bytes_ = set_.byte_taps && size_of(a_.dtype) == 1 && size_of(b_.dtype) == 1;
    is_signed_ = set_.signs != Signs::kUnsigned;
    is_short_ = !is_bytes_ && fits(a_.dtype, za_) && fits(b_.dtype, zb_);
    if (!is_bytes_ && !is_short_) {
      scratch_ = up((count_of({m_, k_}) + count_of({n_, k_})) * 4, kAlignment);
      return;
    }
    const int64_t size = is_bytes_ ? 1 : 2;
    taps_ = is_bytes_ ? set_.byte_taps : set_.short_taps;
    steps_ = steps_of(k_, taps_, is_bytes_ ? set_.tile_steps : 0);
    slack_ = std::max(kSlack, (steps_ * taps_ - k_) * size);
    panels_ = up(n_, 4 * set_.lanes) / set_.lanes;
    codes_bytes_ = up(count_of({m_, k_}) * size + slack_, kAlignment);
    row_bytes_ = up(steps_ * taps_ * size, kAlignment);
    weights_bytes_ =
        up(count_of({panels_, set_.lanes, steps_, taps_}) * size, kAlignment);
    scratch_ = codes_bytes_ + row_bytes_ + weights_bytes_ + panels_ * set_.lanes * 4;
  }
  int64_t scratch_bytes() const override { return scratch_; }
  int64_t work() const override { return count_of({batch_, m_, n_, k_}); }
  std::string explain(const uint8_t*) const override {
    const char* how = is_bytes_ ? "bytes" : is_short_ ? "16 bits" : "32 bits";
    return std::string(set_.name) + ", " + how;
  }

  void run(const Memory& memory) const override {
    int32_t* out = memory.as<int32_t>(out_);
    if (m_ == 0 || n_ == 0) return;
    for (int64_t i = 0; i < batch_; ++i, out += m_ * n_) {
      if (!is_bytes_ && !is_short_) {
        plain(memory, i, out);
      } else if (!is_bytes_) {
        tiles<int16_t>(memory, i, za_, zb_, 0, 0, out);
      } else {
        // Codes are unsigned bytes or signed ones, the second ones always signed.
        const int32_t a =
            (a_.dtype == Dtype::kInt8 ? 128 : 0) - (is_signed_ ? 128 : 0);
        const int32_t b = b_.dtype == Dtype::kInt8 ? 0 : -128;
        tiles<uint8_t>(memory, i, -a, -b, za_ + a, zb_ + b, out);
      }
    }
  }

 private:
  // Codes less what makes them `Code`; `za` and `zb` are left of their zero points.
  template <class Code>
  void tiles(const Memory& memory, int64_t i, int32_t less_a, int32_t less_b, int32_t za,
             int32_t zb, int32_t* out) const {
    auto* a = reinterpret_cast<Code*>(memory.scratch);
    auto* row = reinterpret_cast<Code*>(memory.scratch + codes_bytes_);
    uint8_t* weights = memory.scratch + codes_bytes_ + row_bytes_;
    auto* bias = reinterpret_cast<int32_t*>(weights + weights_bytes_);
    staged(a_, memory, i * m_ * k_, m_ * k_, less_a, a);
    std::memset(a + m_ * k_, 0, static_cast<size_t>(slack_));
    std::memset(row, 0, static_cast<size_t>(row_bytes_));
    const int64_t places = panels_ * set_.lanes;
    const uint32_t both = static_cast<uint32_t>(k_) * static_cast<uint32_t>(za) *
                          static_cast<uint32_t>(zb);
    for (int64_t o = 0; o < places; ++o) {
      if (o < n_) {
        staged(b_, memory, (i * n_ + o) * k_, k_, less_b, row);
      } else if (o == n_) {
        std::memset(row, 0, static_cast<size_t>(row_bytes_));
      }
      // All taps of a step have 32 bits.
      const auto* from = reinterpret_cast<const uint8_t*>(row);
      uint8_t* to = weights + (o / set_.lanes * steps_ * set_.lanes + o % set_.lanes) * 4;
      for (int64_t k = 0; k < steps_; ++k) {
        std::memcpy(to + k * set_.lanes * 4, from + k * 4, 4);
      }
      const uint32_t sum = za ? total(row, k_, true) : 0;
      bias[o] = static_cast<int32_t>(both - static_cast<uint32_t>(za) * sum);
    }
    static constexpr PackedRequantizer kNothing{};
    static constexpr int64_t kFirst = 0;
    Tiles t{};
    t.codes = a;
    t.runs = &kFirst;
    t.n_runs = 1;
    t.run_steps = steps_;
    t.pixel = k_;
    t.depth = t.height = 1;
    t.width = m_;
    t.weights = weights;
    t.panel = steps_ * set_.lanes * taps_;
    t.is_signed = is_signed_;
    t.outputs = n_;
    t.bias = bias;
    t.requantizer = &kNothing;
    t.out = out;
    t.out_dtype = static_cast<int64_t>(Dtype::kInt32);
    t.out_pixel = n_;
    t.out_channel = 1;
    (sizeof(Code) == 1 ? set_.bytes : set_.shorts)(t);
    if (!zb) return;
    for (int64_t r = 0; r < m_; ++r) {
      const uint32_t sum = total(a + r * k_, k_, is_signed_);
      const uint32_t less = static_cast<uint32_t>(zb) * sum;
      int32_t* own = out + r * n_;
      for (int64_t o = 0; o < n_; ++o) {
        own[o] = static_cast<int32_t>(static_cast<uint32_t>(own[o]) - less);
      }
    }
  }

  template <class T>
  static uint32_t sum_of(const T* x, int64_t n) {
    uint32_t sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += static_cast<uint32_t>(x[i]);
    return sum;
  }
  static uint32_t total(const int16_t* x, int64_t n, bool) { return sum_of(x, n); }
  static uint32_t total(const uint8_t* x, int64_t n, bool is_signed) {
    return is_signed ? sum_of(reinterpret_cast<const int8_t*>(x), n) : sum_of(x, n);
  }

  // Arguments are values, which stores of bytes cannot change.
  template <class T, class Code>
  static void moved(const T* __restrict from, int64_t n, Code less, Code* __restrict to) {
    for (int64_t i = 0; i < n; ++i) {
      to[i] = static_cast<Code>(static_cast<Code>(from[i]) - less);
    }
  }
  template <class Code>
  static void staged(const Source& from, const Memory& memory, int64_t at, int64_t n,
                     int32_t less, Code* to) {
    with_type(from.dtype, [&](auto* type) {
      const auto* in = memory.as<Pointee<decltype(type)>>(from.buffer) + at;
      moved(in, n, static_cast<Code>(less), to);
    });
  }

  void plain(const Memory& memory, int64_t i, int32_t* out) const {
    auto* a = reinterpret_cast<int32_t*>(memory.scratch);
    int32_t* b = a + m_ * k_;
    a_.load(memory, i * m_ * k_, m_ * k_, a);
    b_.load(memory, i * n_ * k_, n_ * k_, b);
    for (int64_t r = 0; r < m_; ++r) {
      for (int64_t o = 0; o < n_; ++o) {
        uint32_t sum = 0;  // Wraps, as accumulators do.
        for (int64_t k = 0; k < k_; ++k) {
          sum += (static_cast<uint32_t>(a[r * k_ + k]) - static_cast<uint32_t>(za_)) *
                 (static_cast<uint32_t>(b[o * k_ + k]) - static_cast<uint32_t>(zb_));
        }
        *out++ = static_cast<int32_t>(sum);
      }
    }
  }

  const Kernels& set_;
  Source a_, b_;
  int64_t out_, batch_, m_, k_, n_;
  int32_t za_, zb_;
  bool is_bytes_ = false, is_short_ = false, is_signed_ = false;
  int64_t taps_ = 0, steps_ = 0, panels_ = 0, codes_bytes_ = 0, row_bytes_ = 0;
  int64_t weights_bytes_ = 0, slack_ = 0, scratch_ = 0;
};

}  // namespace

const Entry kMatmul[] = {
    {7, make<Matmul>},
};

}  // namespace qjax
