// Steps that put integers elsewhere: fill, copy, take, embed.
#include <algorithm>

#include "rows.h"

namespace qjax {
namespace {

class Fill : public Step {
 public:
  Fill(Words& words, const Maker& maker)
      : out_(maker.buffer(words)), value_(words.int32()), buffer_(maker.of(out_)) {}
  void run(const Memory& memory) const override {
    with_type(buffer_.dtype, [&](auto* type) {
      using T = Pointee<decltype(type)>;
      T* out = memory.as<T>(out_);
      std::fill(out, out + buffer_.elements, static_cast<T>(value_));
    });
  }

 private:
  int64_t out_;
  int32_t value_;
  Buffer buffer_;
};

// Copies strided places to strided places.
class Copy : public Step {
 public:
  Copy(Words& words, const Maker& maker)
      : in_(maker.buffer(words)), out_(maker.buffer(words)) {
    const int64_t rank = words.next(0, 64, "a copy has too many axes");
    std::vector<int64_t> sizes = words.list(rank);
    in_offset_ = words.size();
    std::vector<int64_t> from = words.list(rank);
    out_offset_ = words.size();
    std::vector<int64_t> to = words.list(rank);
    maker.holds(in_, sizes, in_offset_, from);
    maker.holds(out_, sizes, out_offset_, to);
    from_ = maker.of(in_).dtype;
    to_ = maker.of(out_).dtype;
    is_empty_ = count_of(sizes) == 0;
    // Axes of size 1 go, and axes that are one in both are joined.
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] == 1) continue;
      if (!sizes_.empty() && in_strides_.back() == from[d] * sizes[d] &&
          out_strides_.back() == to[d] * sizes[d]) {
        sizes_.back() *= sizes[d];
        in_strides_.back() = from[d];
        out_strides_.back() = to[d];
      } else {
        sizes_.push_back(sizes[d]);
        in_strides_.push_back(from[d]);
        out_strides_.push_back(to[d]);
      }
    }
    if (sizes_.empty()) {
      sizes_ = {1};
      in_strides_ = out_strides_ = {1};
    }
  }

  void run(const Memory& memory) const override {
    if (is_empty_) return;
    if (from_ != to_) return axis(memory, in_offset_, out_offset_, 0);
    switch (size_of(to_)) {
      case 1:
        return same<uint8_t>(memory);
      case 2:
        return same<uint16_t>(memory);
      default:
        return same<uint32_t>(memory);
    }
  }

 private:
  template <class T>
  void same(const Memory& memory) const {
    axis(memory.as<T>(in_) + in_offset_, memory.as<T>(out_) + out_offset_, 0);
  }
  template <class T>
  void axis(const T* in, T* out, size_t d) const {
    const int64_t n = sizes_[d], s = in_strides_[d], t = out_strides_[d];
    if (d + 1 < sizes_.size()) {
      for (int64_t i = 0; i < n; ++i) axis(in + i * s, out + i * t, d + 1);
    } else if (s == 1 && t == 1) {
      std::memcpy(out, in, static_cast<size_t>(n) * sizeof(T));
    } else {
      for (int64_t i = 0; i < n; ++i) out[i * t] = in[i * s];
    }
  }
  // Of two types.
  void axis(const Memory& memory, int64_t in, int64_t out, size_t d) const {
    const int64_t n = sizes_[d], s = in_strides_[d], t = out_strides_[d];
    if (d + 1 < sizes_.size()) {
      for (int64_t i = 0; i < n; ++i) axis(memory, in + i * s, out + i * t, d + 1);
      return;
    }
    int32_t x[kRow];
    const uint8_t* from = memory.as<uint8_t>(in_);
    uint8_t* to = memory.as<uint8_t>(out_);
    each_row(n, [&](int64_t i, int64_t count) {
      load(from_, from, in + i * s, s, count, x);
      if (t == 1) return store(to_, to, out + i, count, x);
      for (int64_t k = 0; k < count; ++k) {
        store(to_, to, out + (i + k) * t, 1, x + k);
      }
    });
  }

  int64_t in_, out_, in_offset_, out_offset_;
  std::vector<int64_t> sizes_, in_strides_, out_strides_;
  Dtype from_, to_;
  bool is_empty_;
};

// Copies rows of a parameter, or places of a row, by numbers.
class Take : public Step {
 public:
  Take(Words& words, const Maker& maker)
      : in_(maker.buffer(words)),
        out_(maker.buffer(words)),
        outer_(words.size()),
        size_(words.size()),
        count_(words.size()),
        dtype_(maker.of(in_).dtype) {
    places_ = Kept(maker, words.size(), count_ * 4);
    maker.holds(in_, count_of({outer_, size_}));
    maker.holds(out_, dtype_, count_of({outer_, count_}));
    check(size_ > 0 || count_ == 0 || outer_ == 0, "nothing is there to take");
  }
  void pack(const Constants& constants, uint8_t* packed) const override {
    const int32_t* places = constants.at<int32_t>(places_.from, count_);
    for (int64_t i = 0; i < count_; ++i) {
      check(0 <= places[i] && places[i] < std::max<int64_t>(size_, 1),
            "a place lies outside of its row");
    }
    places_.pack(constants, packed);
  }
  void run(const Memory& memory) const override {
    const int32_t* places = places_.in<int32_t>(memory);
    with_type(dtype_, [&](auto* type) {
      using T = Pointee<decltype(type)>;
      const T* in = memory.as<T>(in_);
      T* out = memory.as<T>(out_);
      for (int64_t o = 0; o < outer_; ++o, in += size_, out += count_) {
        for (int64_t i = 0; i < count_; ++i) out[i] = in[places[i]];
      }
    });
  }

 private:
  int64_t in_, out_, outer_, size_, count_;
  Dtype dtype_;
  Kept places_;
};

class Embed : public Step {
 public:
  Embed(Words& words, const Maker& maker)
      : in_(maker.buffer(words)),
        out_(maker.buffer(words)),
        count_(words.size()),
        rows_(words.next(1, kMostElements, "a table must have rows")),
        width_(words.size()) {
    const int64_t from = words.size();
    const Dtype dtype = words.dtype();
    kernel_ = Kept(maker, from, count_of({rows_, width_}) * size_of(dtype));
    from_ = maker.of(in_).dtype;
    maker.holds(in_, count_);
    maker.holds(out_, dtype, count_of({count_, width_}));
    bytes_ = width_ * size_of(dtype);
  }
  void pack(const Constants& constants, uint8_t* packed) const override {
    kernel_.pack(constants, packed);
  }
  void run(const Memory& memory) const override {
    const uint8_t* kernel = kernel_.in<uint8_t>(memory);
    uint8_t* out = memory.as<uint8_t>(out_);
    with_type(from_, [&](auto* type) {
      const auto* in = memory.as<Pointee<decltype(type)>>(in_);
      for (int64_t i = 0; i < count_; ++i) {
        int64_t row = static_cast<int64_t>(in[i]);
        row = row < 0 ? row + rows_ : row;
        row = std::min(std::max<int64_t>(row, 0), rows_ - 1);
        std::memcpy(out + i * bytes_, kernel + row * bytes_,
                    static_cast<size_t>(bytes_));
      }
    });
  }

 private:
  int64_t in_, out_, count_, rows_, width_, bytes_;
  Dtype from_;
  Kept kernel_;
};

}  // namespace

const Entry kMoves[] = {
    {1, make<Fill>},
    {2, make<Copy>},
    {19, make<Take>},
    {18, make<Embed>},
};

}  // namespace qjax
