// Steps that read or write at places that codes name, and sorts.
#include <algorithm>

#include "rows.h"

namespace qjax {
namespace {

// Windows of an operand at places that codes name, and where they are in another
// buffer, which has them side by side: what is gathered, or updates.
class Windows {
 public:
  Windows(Words& words, const Maker& maker, int64_t operand, int64_t other)
      : places_(words, maker), is_clipped_(words.flag()) {
    const int64_t rank = words.next(0, 64, "places have too many axes");
    batch_ = words.list(rank);
    places_strides_ = words.list(rank);
    operand_strides_ = words.list(rank);
    other_strides_ = words.list(rank);
    const int64_t coordinates = words.next(0, 64, "places have too many coordinates");
    steps_ = words.list(coordinates);
    lasts_ = words.list(coordinates);
    const int64_t axes = words.next(0, 64, "a window has too many axes");
    sizes_ = words.list(axes);
    from_ = words.list(axes);
    to_ = words.list(axes);
    is_empty_ = count_of(batch_) == 0 || count_of(sizes_) == 0;
    if (is_empty_) return;
    Reach places, own, others;
    for (size_t d = 0; d < batch_.size(); ++d) {
      places.add(batch_[d], places_strides_[d]);
      own.add(batch_[d], operand_strides_[d]);
      others.add(batch_[d], other_strides_[d]);
    }
    for (size_t k = 0; k < steps_.size(); ++k) {
      check(0 <= lasts_[k] && lasts_[k] < kMostElements,
            "a window must fit its operand");
      places.add(2, k == 0 ? 0 : 1);
      own.add(lasts_[k] + 1, steps_[k]);
    }
    for (size_t d = 0; d < sizes_.size(); ++d) {
      own.add(sizes_[d], from_[d]);
      others.add(sizes_[d], to_[d]);
    }
    if (!steps_.empty()) places.lies_in(maker.of(places_.buffer).elements);
    own.lies_in(maker.of(operand).elements);
    others.lies_in(maker.of(other).elements);
    // A window of one axis is a row of its own; else a place is a row of one.
    if (batch_.empty()) {
      batch_ = {1};
      places_strides_ = operand_strides_ = other_strides_ = {0};
    }
    if (sizes_.empty()) {
      sizes_ = {1};
      from_ = to_ = {1};
    }
  }

  // Calls `use(place in the operand, place in the other, is inside)` for each window,
  // the places in their order; one that is not inside is at no place of the operand.
  template <class Use>
  void each(const Memory& memory, Use&& use) const {
    if (!is_empty_) axis(memory, 0, 0, 0, 0, use);
  }
  // Whether a window is one integer.
  bool is_single() const { return sizes_.size() == 1 && sizes_[0] == 1; }
  // Calls `use(from, to, n, stride of from, stride of to)` for the rows of a window.
  template <class Use>
  void rows(int64_t from, int64_t to, Use&& use, size_t d = 0) const {
    if (d + 1 == sizes_.size()) return use(from, to, sizes_[d], from_[d], to_[d]);
    for (int64_t i = 0; i < sizes_[d]; ++i) {
      rows(from + i * from_[d], to + i * to_[d], use, d + 1);
    }
  }

 private:
  // The least and the largest place of strided ones.
  struct Reach {
    __int128 low = 0, high = 0;

    void add(int64_t size, int64_t stride) {
      check(-kMostElements <= stride && stride <= kMostElements,
            "a stride is too large");
      const __int128 far = static_cast<__int128>(size - 1) * stride;
      (far < 0 ? low : high) += far;
    }
    void lies_in(int64_t elements) const {
      check(0 <= low && high < elements, "a step leads outside of a buffer");
    }
  };

  template <class Use>
  void axis(const Memory& memory, size_t d, int64_t places, int64_t own, int64_t other,
            Use& use) const {
    const int64_t p = places_strides_[d], s = operand_strides_[d];
    const int64_t t = other_strides_[d];
    if (d + 1 < batch_.size()) {
      for (int64_t i = 0; i < batch_[d]; ++i) {
        axis(memory, d + 1, places + i * p, own + i * s, other + i * t, use);
      }
      return;
    }
    int64_t at[kRow];
    bool is_inside[kRow];
    int32_t x[kRow];
    each_row(batch_[d], [&](int64_t first, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        at[i] = own + (first + i) * s;
        is_inside[i] = true;
      }
      for (size_t k = 0; k < steps_.size(); ++k) {
        const int64_t from = places + first * p + static_cast<int64_t>(k);
        const int64_t last = lasts_[k], step = steps_[k];
        places_.load(memory, from, n, x, p);
        for (int64_t i = 0; i < n; ++i) {
          const int64_t start = std::min<int64_t>(std::max<int64_t>(x[i], 0), last);
          is_inside[i] = is_inside[i] && (is_clipped_ || start == x[i]);
          at[i] += start * step;
        }
      }
      for (int64_t i = 0; i < n; ++i) use(at[i], other + (first + i) * t, is_inside[i]);
    });
  }

  Source places_;
  bool is_clipped_, is_empty_;
  std::vector<int64_t> batch_, places_strides_, operand_strides_, other_strides_;
  std::vector<int64_t> steps_, lasts_, sizes_, from_, to_;
};

// Calls `use` with a null pointer to an unsigned type of a size.
template <class Use>
void with_size(Dtype dtype, Use&& use) {
  switch (size_of(dtype)) {
    case 1:
      return use(static_cast<uint8_t*>(nullptr));
    case 2:
      return use(static_cast<uint16_t*>(nullptr));
    default:
      return use(static_cast<uint32_t*>(nullptr));
  }
}

class Gather : public Step {
 public:
  Gather(Words& words, const Maker& maker)
      : in_(words, maker),
        out_(words, maker),
        fill_(words.int32()),
        windows_(words, maker, in_.buffer, out_.buffer) {
    check(in_.dtype == out_.dtype, "a gather must write the type that it reads");
  }
  void run(const Memory& memory) const override {
    with_size(out_.dtype, [&](auto* type) {
      using T = Pointee<decltype(type)>;
      const T* in = memory.as<T>(in_.buffer);
      T* out = memory.as<T>(out_.buffer);
      const T fill = static_cast<T>(fill_);
      if (windows_.is_single()) {
        return windows_.each(memory, [=](int64_t from, int64_t to, bool is_inside) {
          out[to] = is_inside ? in[from] : fill;
        });
      }
      windows_.each(memory, [&](int64_t from, int64_t to, bool is_inside) {
        windows_.rows(from, to, [&](int64_t i, int64_t o, int64_t n, int64_t s,
                                    int64_t t) {
          if (!is_inside) {
            for (int64_t k = 0; k < n; ++k) out[o + k * t] = fill;
          } else if (n > 4 && s == 1 && t == 1) {
            std::memcpy(out + o, in + i, static_cast<size_t>(n) * sizeof(T));
          } else {
            for (int64_t k = 0; k < n; ++k) out[o + k * t] = in[i + k * s];
          }
        });
      });
    });
  }

 private:
  Source in_, out_;
  int32_t fill_;
  Windows windows_;
};

// Joins updates to what lies in a buffer, in the order of their places.
class Scatter : public Step {
 public:
  Scatter(Words& words, const Maker& maker)
      : kind_(words.next(0, 3, "an unknown kind of scatter")),
        updates_(words, maker),
        out_(words, maker),
        zero_(words.int32()),
        windows_(words, maker, out_.buffer, updates_.buffer) {
    check(kind_ == kAdd ? out_.dtype == Dtype::kInt32 : out_.dtype == updates_.dtype,
          "a scatter must write the type that it reads, and a sum int32");
  }
  void run(const Memory& memory) const override {
    switch (kind_) {
      case kSet:
        return with_size(out_.dtype, [&](auto* type) {
          using T = Pointee<decltype(type)>;
          join<T, T>(memory, [](T, T update) { return update; });
        });
      case kAdd:
        return with_type(updates_.dtype, [&](auto* type) {
          const uint32_t zero = static_cast<uint32_t>(zero_);
          join<uint32_t, Pointee<decltype(type)>>(memory, [=](uint32_t x, auto update) {
            return x + (static_cast<uint32_t>(update) - zero);
          });
        });
      case kMax:
        return with_type(out_.dtype, [&](auto* type) {
          using T = Pointee<decltype(type)>;
          join<T, T>(memory, [](T x, T update) { return std::max(x, update); });
        });
      default:
        return with_type(out_.dtype, [&](auto* type) {
          using T = Pointee<decltype(type)>;
          join<T, T>(memory, [](T x, T update) { return std::min(x, update); });
        });
    }
  }

 private:
  enum Kind : int64_t { kSet, kAdd, kMax, kMin };

  template <class T, class U, class Of>
  void join(const Memory& memory, Of of) const {
    const U* updates = memory.as<U>(updates_.buffer);
    T* out = memory.as<T>(out_.buffer);
    windows_.each(memory, [&](int64_t to, int64_t from, bool is_inside) {
      if (!is_inside) return;
      windows_.rows(to, from, [&](int64_t o, int64_t i, int64_t n, int64_t t,
                                  int64_t s) {
        for (int64_t k = 0; k < n; ++k) {
          out[o + k * t] = of(out[o + k * t], updates[i + k * s]);
        }
      });
    });
  }

  int64_t kind_;
  Source updates_, out_;
  int32_t zero_;
  Windows windows_;
};

// Codes in ascending order along an axis, or their places in such an order.
class Sort : public Step {
 public:
  Sort(Words& words, const Maker& maker)
      : kind_(words.next(0, 2, "an unknown kind of sort")),
        in_(words, maker),
        out_(words, maker),
        outer_(words.size()),
        n_(words.next(0, INT32_MAX, "a sorted axis is too long")),
        inner_(words.size()) {
    const int64_t count = count_of({outer_, n_, inner_});
    maker.holds(in_.buffer, count);
    maker.holds(out_.buffer, count);
  }
  int64_t scratch_bytes() const override {
    return outer_ && inner_ ? n_ * (kind_ == kCodes ? 4 : 8) : 0;
  }
  int64_t work() const override { return count_of({outer_, n_, inner_}) * 8; }
  void run(const Memory& memory) const override {
    if (n_ == 0) return;
    const bool is_counted = size_of(in_.dtype) == 1 && n_ >= kLeastCounted;
    const bool is_narrow = is_counted || kind_ == kCodes;
    auto* codes = reinterpret_cast<int32_t*>(memory.scratch);
    auto* keys = reinterpret_cast<uint64_t*>(memory.scratch);
    for (int64_t o = 0; o < outer_; ++o) {
      for (int64_t i = 0; i < inner_; ++i) {
        const int64_t first = o * n_ * inner_ + i;
        if (is_counted) {
          count(memory, first, codes);
        } else if (kind_ == kCodes) {
          in_.load(memory, first, n_, codes, inner_);
          std::sort(codes, codes + n_);
        } else {
          read_keys(memory, first, keys);
          std::sort(keys, keys + n_);
        }
        each_row(n_, [&](int64_t k, int64_t n) {
          int32_t x[kRow];
          for (int64_t j = 0; j < n; ++j) {
            x[j] = is_narrow ? codes[k + j] : static_cast<int32_t>(keys[k + j]);
          }
          put(memory, first + k * inner_, n, x);
        });
      }
    }
  }

 private:
  enum Kind : int64_t { kCodes, kAscending, kDescending };

  // Sorts bytes, or their places, by how many there are of each.
  void count(const Memory& memory, int64_t first, int32_t* sorted) const {
    const int32_t least = in_.dtype == Dtype::kInt8 ? -128 : 0;
    const int32_t turned = kind_ == kDescending ? 255 : 0;
    const auto bin = [=](int32_t code) { return (code - least) ^ turned; };
    int64_t ends[256] = {};
    int32_t x[kRow];
    const auto load = [&](int64_t k, int64_t n) {
      in_.load(memory, first + k * inner_, n, x, inner_);
    };
    each_row(n_, [&](int64_t k, int64_t n) {
      load(k, n);
      for (int64_t j = 0; j < n; ++j) ++ends[bin(x[j])];
    });
    int64_t at = 0;
    for (int32_t b = 0; b < 256; ++b) {
      const int64_t own = ends[b];
      if (kind_ == kCodes) std::fill(sorted + at, sorted + at + own, b + least);
      ends[b] = at;
      at += own;
    }
    if (kind_ == kCodes) return;
    each_row(n_, [&](int64_t k, int64_t n) {
      load(k, n);
      for (int64_t j = 0; j < n; ++j) {
        sorted[ends[bin(x[j])]++] = static_cast<int32_t>(k + j);
      }
    });
  }
  // A key is a code before its place: keys differ, and equal codes keep their order.
  void read_keys(const Memory& memory, int64_t first, uint64_t* keys) const {
    const uint32_t turned = kind_ == kDescending ? 0x7fffffffu : 0x80000000u;
    each_row(n_, [&](int64_t k, int64_t n) {
      int32_t x[kRow];
      in_.load(memory, first + k * inner_, n, x, inner_);
      for (int64_t j = 0; j < n; ++j) {
        keys[k + j] = static_cast<uint64_t>(static_cast<uint32_t>(x[j]) ^ turned) << 32 |
                      static_cast<uint64_t>(k + j);
      }
    });
  }
  void put(const Memory& memory, int64_t at, int64_t n, const int32_t* x) const {
    if (inner_ == 1) return out_.store(memory, at, n, x);
    with_type(out_.dtype, [&](auto* type) {
      using T = Pointee<decltype(type)>;
      T* out = memory.as<T>(out_.buffer) + at;
      for (int64_t j = 0; j < n; ++j) out[j * inner_] = static_cast<T>(x[j]);
    });
  }

  static constexpr int64_t kLeastCounted = 128;

  int64_t kind_;
  Source in_, out_;
  int64_t outer_, n_, inner_;
};

}  // namespace

const Entry kGathers[] = {
    {27, make<Gather>},
    {28, make<Scatter>},
    {29, make<Sort>},
};

}  // namespace qjax
