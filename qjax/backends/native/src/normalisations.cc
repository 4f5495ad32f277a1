// Steps of softmaxes and normalisations: integers by sums over them, row by row.
#include <algorithm>
#include <type_traits>

#include "requantizer.h"
#include "rows.h"
#include "rules.h"

namespace qjax {
namespace {

// Softmax, log-softmax and log-sum-exp along the last axis, by a table of exponentials:
// the formulas of qjax/graph/operations/normalisations.py.
class Softmax : public Step {
 public:
  Softmax(Words& words, const Maker& maker)
      : set_(kernels()),
        kind_(words.next(0, 2, "an unknown kind of softmax")),
        in_(words, maker) {
    mask_ = words.next(-1, static_cast<int64_t>(maker.buffers.size()) - 1,
                       "a mask must be a buffer");
    mask_rows_ = words.next(1, kMostElements, "a mask must have rows");
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
    if (mask_ >= 0) maker.holds(mask_, count_of({std::min(mask_rows_, outer_), n_}));
    maker.holds(out_.buffer, kind_ == 2 ? outer_ : count);
    if (mask_ >= 0) mask_dtype_ = maker.of(mask_).dtype;
    check_fits(out_.dtype, low_, high_);
    is_bytes_ = kind_ == 0 && size_of(in_.dtype) == 1 && size_of(out_.dtype) == 1 &&
                (mask_ < 0 || size_of(mask_dtype_) == 1);
    if (is_bytes_) bytes_ = maker.layout.reserve(8 * kBytes);
    scratch_ = (std::max<int64_t>(n_, 1) * 12 + kSlack + kAlignment) / kAlignment *
               kAlignment;
  }
  int64_t scratch_bytes() const override { return scratch_; }
  void pack(const Constants& constants, uint8_t* packed) const override {
    const int32_t* table = constants.at<int32_t>(table_.from, rows_);
    for (int64_t i = 0; i < rows_; ++i) {
      check(table[i] >= 0 && table[i] <= (1 << 30), "exponentials must have 30 bits");
    }
    check(table[0] > 0, "the exponential of 0 must be positive");
    table_.pack(constants, packed);
    if (!is_bytes_) return;
    auto* near = reinterpret_cast<uint32_t*>(packed + bytes_);
    uint8_t* planes = packed + bytes_ + 4 * kBytes;
    for (int64_t d = 0; d < kBytes; ++d) {
      near[d] = static_cast<uint32_t>(table[std::min(d, rows_ - 1)]);
      for (int64_t k = 0; k < 4; ++k) {
        planes[k * kBytes + d] = static_cast<uint8_t>(near[d] >> (8 * k));
      }
    }
  }
  std::string explain(const uint8_t*) const override {
    return is_bytes_ ? "tables of bytes" : "";
  }
  void run(const Memory& memory) const override {
    if (is_bytes_) return rows_of_bytes(memory);
    for (int64_t o = 0; o < outer_; ++o) row(o, memory);
  }

 private:
  void rows_of_bytes(const Memory& memory) const {
    SoftmaxRows r{};
    r.in = memory.as<uint8_t>(in_.buffer);
    r.mask = mask_ < 0 ? nullptr : memory.as<uint8_t>(mask_);
    r.mask_rows = mask_rows_;
    r.out = memory.as<uint8_t>(out_.buffer);
    r.flip = in_.dtype == Dtype::kInt8 ? 128 : 0;
    r.rows = outer_;
    r.n = n_;
    r.table = reinterpret_cast<const uint32_t*>(memory.packed + bytes_);
    r.planes = memory.packed + bytes_ + 4 * kBytes;
    r.empty = empty_;
    r.plus = static_cast<uint64_t>(plus_);
    r.multiplier = static_cast<uint64_t>(multiplier_);
    r.shift = shift_;
    r.zero_point = zero_point_;
    r.low = low_;
    r.high = high_;
    r.scratch = memory.scratch;
    if (n_ > 0) set_.softmax(r);
  }

  void row(int64_t o, const Memory& memory) const {
    auto* codes = reinterpret_cast<int32_t*>(memory.scratch);
    auto* parts = codes + n_;
    auto* kept = parts + n_;  // 1 or 0.
    in_.load(memory, o * n_, n_, codes);
    bool any = mask_ < 0;
    std::fill(kept, kept + n_, 1);
    if (mask_ >= 0) {
      load(mask_dtype_, memory.as<uint8_t>(mask_), o % mask_rows_ * n_, 1, n_, kept);
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

  const Kernels& set_;
  int64_t kind_;
  Source in_, out_;
  int64_t mask_, mask_rows_, outer_, n_, rows_, empty_, plus_;
  Kept table_;
  int32_t input_zero_point_;
  int64_t input_multiplier_, input_shift_, multiplier_, shift_;
  int32_t zero_point_, low_, high_;
  Dtype mask_dtype_ = Dtype::kInt8;
  bool is_bytes_;
  int64_t bytes_ = 0;  // Place of the table of distances of bytes, and of its planes.
  int64_t scratch_;
};

// Normalisation along the last axis, by the moments of all places or of what a mask
// keeps.
template <class Rows>
class Norm : public Step {
 public:
  static constexpr bool kIsMasked = std::is_same_v<Rows, MaskedNormRows>;

  Norm(Words& words, const Maker& maker) : set_(kernels()), in_(words, maker) {
    if constexpr (kIsMasked) {
      mask_ = Source(words, maker);
      r_.mask_rows = words.next(1, kMostElements, "a mask must have rows");
      r_.mask_dtype = static_cast<int64_t>(mask_.dtype);
    }
    out_ = Source(words, maker);
    r_.rows = words.size();
    r_.n = words.next(1, int64_t{1} << 31, "a norm must be of codes");
    r_.period = words.next(1, kMostElements, "numbers must have rows");
    r_.width = (r_.n + set_.lanes - 1) / set_.lanes * set_.lanes;
    multiplier_ = Kept(maker, words.size(), count_of({r_.period, r_.n}) * 4);
    from_ = words.size();
    bias_ = maker.layout.reserve(count_of({r_.period, r_.width}) * 8);
    r_.is_centred = words.flag();
    int64_t places = words.size(), more = 0;
    if constexpr (kIsMasked) {
      check(r_.n <= places && places < int64_t{1} << 31,
            "a masked norm has more codes than its sums are made for");
      r_.least_count = words.flag();
      int length = 1;
      while (places >> length) ++length;
      const int64_t most = (int64_t{1} << 61) >> std::min(2 * length, 62);
      r_.epsilon = words.next(0, most, "epsilon of all places must have 61 bits");
      r_.floor = words.next(0, most, "the floor of all places must have 61 bits");
      r_.point = words.next(-900, 900, "a point must lie in -900 to 900");
    } else {
      check(places == r_.n, "a group must have as many codes as its row");
      r_.epsilon = words.next(0, int64_t{1} << 60, "epsilon must have 60 bits");
      r_.floor = words.next(0, int64_t{1} << 60, "the floor must have 60 bits");
      r_.point = words.next(-60, 30, "a point must lie in -60 to 30");
      more = words.next(0, 62, "`more` must lie in 0 to 62");
    }
    r_.input_zero_point = words.int32();
    r_.shift = words.next(0, 62, "a shift must lie in 0 to 62");
    bias_shift_ = words.next(0, 31, "a left shift must lie in 0 to 31");
    r_.zero_point = words.int32();
    r_.low = words.int32();
    r_.high = words.int32();
    const int64_t all = count_of({r_.rows, r_.n});
    maker.holds(in_.buffer, all);
    if constexpr (kIsMasked) {
      maker.holds(mask_.buffer, count_of({std::min(r_.mask_rows, r_.rows), r_.n}));
    }
    maker.holds(out_.buffer, all);
    check_fits(out_.dtype, r_.low, r_.high);
    // Bits behind the point of values that their group's root bounds.
    int bits = 0;
    while ((int64_t{1} << bits) < places) ++bits;
    r_.fraction = 30 - (kIsMasked || r_.is_centred ? (bits + 1) / 2 : 0) + more;
    r_.is_small = size_of(in_.dtype) == 1 && -512 < r_.input_zero_point &&
                  r_.input_zero_point < 512;
    r_.in_dtype = static_cast<int64_t>(in_.dtype);
    r_.out_dtype = static_cast<int64_t>(out_.dtype);
  }
  void pack(const Constants& constants, uint8_t* packed) const override {
    multiplier_.pack(constants, packed);
    const int64_t count = count_of({r_.period, r_.n}), lanes = set_.lanes;
    const int32_t* bias = constants.at<int32_t>(from_, count);
    auto* to = reinterpret_cast<int64_t*>(packed + bias_);
    const int64_t half = (int64_t{1} << r_.shift) >> 1;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t k = i % r_.n, lane = k % lanes;
      const int64_t place = k - lane + lane / 2 + lane % 2 * (lanes / 2);
      to[i / r_.n * r_.width + place] = bias[i] * (int64_t{1} << bias_shift_) + half;
    }
  }
  void run(const Memory& memory) const override {
    Rows r = r_;
    r.in = memory.as<uint8_t>(in_.buffer);
    r.out = memory.as<uint8_t>(out_.buffer);
    r.multiplier = multiplier_.in<int32_t>(memory);
    r.bias = reinterpret_cast<const int64_t*>(memory.packed + bias_);
    r.scratch = reinterpret_cast<int32_t*>(memory.scratch);
    if constexpr (kIsMasked) {
      r.mask = memory.as<uint8_t>(mask_.buffer);
      set_.masked_norm(r);
    } else {
      set_.norm(r);
    }
  }
  int64_t scratch_bytes() const override { return r_.width * (kIsMasked ? 8 : 4); }

 private:
  const Kernels& set_;
  Source in_, mask_, out_;
  Rows r_{};
  Kept multiplier_;
  int64_t from_ = 0, bias_ = 0, bias_shift_ = 0;
};

}  // namespace

const Entry kNormalisations[] = {
    {21, make<Softmax>},
    {22, make<Norm<NormRows>>},
    {35, make<Norm<MaskedNormRows>>},
};

}  // namespace qjax
