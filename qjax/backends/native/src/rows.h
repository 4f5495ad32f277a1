// Integers of any type, a row at a time, as int32.
//
// Steps that are not products compute in int32 and so need no code for each pair of
// types.
#pragma once

#include "plan.h"

namespace qjax {

constexpr int64_t kRow = 512;

// Reads n integers, `stride` apart, the first at `at`.
void load(Dtype dtype, const uint8_t* from, int64_t at, int64_t stride, int64_t n,
          int32_t* to);
// Writes n integers side by side, reduced to the type.
void store(Dtype dtype, uint8_t* to, int64_t at, int64_t n, const int32_t* from);

// A value of a step, with its type.
struct Source {
  int64_t buffer = 0;
  Dtype dtype = Dtype::kInt32;

  Source() = default;
  Source(Words& words, const Maker& maker) : buffer(maker.buffer(words)) {
    dtype = maker.of(buffer).dtype;
  }
  void load(const Memory& memory, int64_t at, int64_t n, int32_t* to,
            int64_t stride = 1) const {
    qjax::load(dtype, memory.as<uint8_t>(buffer), at, stride, n, to);
  }
  void store(const Memory& memory, int64_t at, int64_t n, const int32_t* from) const {
    qjax::store(dtype, memory.as<uint8_t>(buffer), at, n, from);
  }
};

// Calls `use(at, n)` for the rows of `count` integers.
template <class Use>
void each_row(int64_t count, Use&& use) {
  for (int64_t at = 0; at < count; at += kRow) {
    use(at, count - at < kRow ? count - at : kRow);
  }
}

// [outer, channels, inner] in rows of one channel each, or of many if `inner` is 1.
template <class Use>
void each_channel_row(int64_t outer, int64_t channels, int64_t inner, Use&& use) {
  if (inner == 1) {
    for (int64_t o = 0; o < outer; ++o) {
      each_row(channels, [&](int64_t c, int64_t n) { use(o * channels + c, n, c, 1); });
    }
    return;
  }
  for (int64_t k = 0; k < outer * channels; ++k) {
    each_row(inner,
             [&](int64_t i, int64_t n) { use(k * inner + i, n, k % channels, 0); });
  }
}

// Pairs of strided places; the places of what they give are in order.
struct Strided {
  std::vector<int64_t> sizes, a, b;

  // Calls `use(place of a, stride, place of b, stride, out, n)` by rows.
  template <class Use>
  void each(Use&& use) const {
    if (count_of(sizes) == 0) return;
    if (sizes.empty()) return use(0, 1, 0, 1, 0, 1);
    axis(0, 0, 0, 0, use);
  }

 private:
  template <class Use>
  int64_t axis(size_t d, int64_t i, int64_t j, int64_t out, Use&& use) const {
    if (d + 1 == sizes.size()) {
      each_row(sizes[d], [&](int64_t k, int64_t n) {
        use(i + k * a[d], a[d], j + k * b[d], b[d], out + k, n);
      });
      return out + sizes[d];
    }
    for (int64_t k = 0; k < sizes[d]; ++k) {
      out = axis(d + 1, i + k * a[d], j + k * b[d], out, use);
    }
    return out;
  }
};

}  // namespace qjax
