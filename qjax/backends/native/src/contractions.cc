// Sums of products in 32 bits, whatever the types and the axes: what no kernel of
// `products.cc` computes.
#include <algorithm>

#include "rows.h"

namespace qjax {
namespace {

// out += sum((x - zero of x) * (y - zero of y) << shift), modulo 2^32
class Contraction : public Step {
 public:
  Contraction(Words& words, const Maker& maker)
      : x_(words, maker), y_(words, maker), out_(words, maker) {
    zx_ = words.int32();
    zy_ = words.int32();
    shift_ = words.next(0, 31, "a left shift must lie in 0 to 31");
    const int64_t free = words.next(1, 64, "a contraction must have 1 to 64 axes");
    const int64_t summed = words.next(0, 64, "a contraction has too many terms");
    sizes_ = words.list(free + summed);
    xs_ = words.list(free + summed);
    ys_ = words.list(free + summed);
    outs_ = words.list(free);
    free_ = static_cast<size_t>(free);
    is_empty_ = count_of(sizes_) == 0;
    check(out_.dtype == Dtype::kInt32, "a contraction must write int32");
    maker.holds(x_.buffer, sizes_, 0, xs_);
    maker.holds(y_.buffer, sizes_, 0, ys_);
    const std::vector<int64_t> own(sizes_.begin(), sizes_.begin() + free);
    maker.holds(out_.buffer, own, 0, outs_);
  }
  int64_t work() const override { return count_of(sizes_); }
  void run(const Memory& memory) const override {
    if (!is_empty_) outer(memory, 0, 0, 0, 0);
  }

 private:
  // Free axes; the last one by rows.
  void outer(const Memory& memory, size_t d, int64_t x, int64_t y, int64_t out) const {
    if (d + 1 < free_) {
      for (int64_t i = 0; i < sizes_[d]; ++i) {
        outer(memory, d + 1, x + i * xs_[d], y + i * ys_[d], out + i * outs_[d]);
      }
      return;
    }
    int32_t* to = memory.as<int32_t>(out_.buffer) + out;
    each_row(sizes_[d], [&](int64_t at, int64_t n) {
      uint32_t acc[kRow] = {};
      terms(memory, free_, x + at * xs_[d], y + at * ys_[d], n, acc);
      for (int64_t i = 0; i < n; ++i) {
        int32_t& own = to[(at + i) * outs_[d]];
        own = static_cast<int32_t>(static_cast<uint32_t>(own) + (acc[i] << shift_));
      }
    });
  }
  void terms(const Memory& memory, size_t d, int64_t x, int64_t y, int64_t n,
             uint32_t* acc) const {
    if (d < sizes_.size()) {
      for (int64_t i = 0; i < sizes_[d]; ++i) {
        terms(memory, d + 1, x + i * xs_[d], y + i * ys_[d], n, acc);
      }
      return;
    }
    int32_t p[kRow], q[kRow];
    x_.load(memory, x, n, p, xs_[free_ - 1]);
    y_.load(memory, y, n, q, ys_[free_ - 1]);
    const uint32_t zx = static_cast<uint32_t>(zx_), zy = static_cast<uint32_t>(zy_);
    for (int64_t i = 0; i < n; ++i) {
      acc[i] += (static_cast<uint32_t>(p[i]) - zx) * (static_cast<uint32_t>(q[i]) - zy);
    }
  }

  Source x_, y_, out_;
  int32_t zx_, zy_;
  int64_t shift_;
  size_t free_;
  std::vector<int64_t> sizes_, xs_, ys_, outs_;
  bool is_empty_;
};

}  // namespace

const Entry kContractions[] = {
    {34, make<Contraction>},
};

}  // namespace qjax
