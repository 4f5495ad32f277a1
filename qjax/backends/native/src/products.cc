// Products of codes and a kernel: convolutions and dots.
#include <algorithm>
#include <array>

#include "requantizer.h"
#include "rows.h"

namespace qjax {
namespace {

using Three = std::array<int64_t, 3>;
using Five = std::array<int64_t, 5>;

template <class Array>
Array read(Words& words) {
  Array found;
  for (auto& x : found) x = words.next(-kMostElements, kMostElements, "out of range");
  return found;
}

constexpr int64_t kMostStaged = int64_t{1} << 34;

// Codes are staged: put side by side with their padding, channels last, as unsigned
// bytes about 128, as signed bytes or as integers of 16 bits about 0, whichever the
// instruction set multiplies, before a kernel reads them.
class Product : public Step {
 public:
  Product(Words& words, const Maker& maker)
      : set_(kernels()), in_(maker.buffer(words)), out_(maker.buffer(words)) {
    offset_ = words.int32();
    batch_ = words.size();
    groups_ = words.next(1, kMostElements, "a product must have groups");
    channels_ = words.size();
    outputs_ = words.size();
    sizes_ = read<Three>(words);
    in_strides_ = read<Five>(words);
    for (auto& pad : padding_) {
      for (auto& n : pad) n = words.next(-kMostElements, kMostElements, "out of range");
    }
    spread_ = read<Three>(words);
    padding_code_ = words.int32();
    taps_ = read<Three>(words);
    strides_ = read<Three>(words);
    dilation_ = read<Three>(words);
    out_sizes_ = read<Three>(words);
    out_strides_ = read<Five>(words);
    kernel_dtype_ = words.dtype();
    kernel_ = words.size();
    bias_ = words.size();
    left_ = words.next(0, 31, "a left shift must lie in 0 to 31");
    const Interval acc{words.int32(), words.int32()};
    if (words.flag()) {
      requantizer_ = Requantizer(words, groups_ * outputs_, acc);
    } else {
      requantizer_ = Requantizer(groups_ * outputs_);
    }
    prepare(maker);
  }

  int64_t scratch_bytes() const override { return scratch_; }
  int64_t work() const override {
    return count_of({batch_, out_sizes_[0], out_sizes_[1], out_sizes_[2], groups_,
                     channels_, outputs_, taps()});
  }

  void pack(const Constants& constants, uint8_t* packed) const override;
  void run(const Memory& memory) const override { run_part(memory, 0, 1); }
  // Outputs are shared: each thread reads its own weights, and all of them all codes,
  // which are not staged twice but for rows.
  bool is_shared() const override {
    return groups_ == 1 && panels_ >= 2 * kShare && (is_in_place_ || is_rows_);
  }
  void run_part(const Memory& memory, int64_t part, int64_t parts) const override;
  std::string explain(const uint8_t* packed) const override {
    const char* how = is_picked_      ? "depthwise, bytes"
                      : is_depthwise_ ? "depthwise"
                      : is_bytes_     ? "bytes"
                                      : "16 bits";
    return std::string(set_.name) + ", " + how + ", " +
           name_of(requantizer_.in(packed).form);
  }

 private:
  void prepare(const Maker& maker);
  int64_t taps() const { return taps_[0] * taps_[1] * taps_[2]; }
  int64_t code_bytes() const { return is_bytes_ || is_picked_ ? 1 : 2; }
  // Whether weights stay bytes. Where codes have 16 bits, widening them on their way
  // to a register costs a product of many rows more than reading twice as much: 32 rows
  // of 1024 x 1024 take .92 ms so and .54 (AVX2), one row 29 us and 39.
  bool is_narrow() const { return is_bytes_ || is_narrow_; }
  int64_t weight_bytes() const { return is_narrow() ? 1 : 2; }
  // Whether codes are about 0, or unsigned bytes about 128.
  bool is_signed() const {
    if (is_picked_) return false;
    if (!is_bytes_ || set_.signs == Signs::kSigned) return true;
    if (is_few_) return false;
    return set_.signs == Signs::kBoth && in_dtype_ == Dtype::kInt8;
  }
  // What is added to centred codes when they are staged.
  int32_t about() const { return is_signed() ? 0 : 128; }
  template <class Code>
  void stage(const Memory& memory, int64_t example, int64_t group, Code* to,
             bool is_first = true) const;
  template <class T, class Code>
  void move(const T* from, int32_t add, Code* to, int64_t n) const;
  template <class Code>
  void run_tiles(const Memory& memory, int64_t part, int64_t parts) const;
  void run_depthwise(const Memory& memory) const;
  void prepare_picks(const Maker& maker);
  void run_picked(const Memory& memory) const;
  template <class T>
  int64_t weight(const Constants& constants, int64_t place) const;
  std::vector<int64_t> order() const;

  static constexpr int64_t kShare = 4;  // Panels of a share come by so many.

  const Kernels& set_;
  int64_t in_, out_, offset_, batch_, groups_, channels_, outputs_;
  Three sizes_, spread_, taps_, strides_, dilation_, out_sizes_;
  Five in_strides_, out_strides_;
  std::array<std::array<int64_t, 2>, 3> padding_;
  int32_t padding_code_;
  Dtype kernel_dtype_, in_dtype_, out_dtype_;
  int64_t kernel_, bias_, left_;
  Requantizer requantizer_;

  // What follows from the above.
  bool is_bytes_ = false, is_narrow_ = false, is_depthwise_ = false, is_rows_ = false;
  bool is_empty_ = false, is_in_place_ = false;
  bool is_few_ = false;  // Few rows, for which the set has a kernel of its own.
  bool is_picked_ = false;  // Depthwise, of bytes.
  int64_t picked_ = 0;  // Taps of a row that one run picks, kTaps at most.
  std::array<uint8_t, 64> picks_{};
  Three padded_;  // Sizes of the staged codes.
  Three planes_;  // Codes from one plane, row and pixel to the next.
  int64_t pixel_ = 0;  // Channels of a staged pixel.
  int64_t pixels_ = 1;  // That are computed as one, where channels are few.
  std::vector<int64_t> runs_;
  int64_t run_length_ = 0, run_steps_ = 0, panel_ = 0, panels_ = 0, width_ = 0;
  int64_t chunk_ = 0;  // Rows that are staged at once, of a dot.
  int64_t slack_ = kSlack;  // Bytes that may be read past the staged codes.
  int64_t weights_place_ = 0, bias_place_ = 0, scratch_ = 0;
};

// Depthwise products of bytes: one register has up to `lanes` channels, or those of some
// pixels, and all of them take their taps from 64 bytes.
void Product::prepare_picks(const Maker& maker) {
  const int64_t lanes = set_.lanes, unit = std::min(groups_, lanes);
  const bool is_beside = out_strides_[3] == groups_ && out_strides_[4] == 1;
  constexpr int64_t kMostTaps = 4;
  const int64_t size = static_cast<int64_t>(picks_.size());
  // Taps that fit where so many pixels are one.
  const auto fitting = [&](int64_t pixels) {
    const int64_t left = size / unit - 1 - (pixels - 1) * strides_[2];
    if (left < 0) return int64_t{0};
    return std::min({left / dilation_[2] + 1, kMostTaps, taps_[2]});
  };
  int64_t pixels = 1;
  while (is_beside && (pixels + 1) * unit <= lanes && pixels < out_sizes_[2] &&
         fitting(pixels + 1) == fitting(1)) {
    ++pixels;
  }
  // Two taps are one product of 16 bits.
  picked_ = fitting(pixels);
  is_picked_ = picked_ > 1;
  if (!is_picked_) return;
  pixels_ = pixels;
  pixel_ = unit;
  planes_ = {padded_[1] * padded_[2] * unit, padded_[2] * unit, unit};
  for (int64_t i = 0; i < taps_[0]; ++i) {
    for (int64_t j = 0; j < taps_[1]; ++j) {
      for (int64_t k = 0; k < taps_[2]; k += picked_) {
        runs_.push_back(i * dilation_[0] * planes_[0] + j * dilation_[1] * planes_[1] +
                        k * dilation_[2] * planes_[2]);
      }
    }
  }
  for (int64_t o = 0; o < pixels * unit; ++o) {
    for (int64_t t = 0; t < picked_; ++t) {
      const int64_t at = o / unit * strides_[2] + t * dilation_[2];
      picks_[static_cast<size_t>(o * kMostTaps + t)] =
          static_cast<uint8_t>(at * unit + o % unit);
    }
  }
  panels_ = (groups_ + unit - 1) / unit;
  panel_ = static_cast<int64_t>(runs_.size()) * lanes * kMostTaps;
  width_ = up(panels_, 2) * lanes;
  weights_place_ = maker.layout.reserve(panels_ * panel_);
  bias_place_ = maker.layout.reserve(width_ * 4);
  const int64_t staged = count_of({padded_[0], padded_[1], padded_[2], unit});
  check(staged <= kMostStaged, "padded codes are too large");
  scratch_ = up(staged + kSlack, kAlignment);
  requantizer_.reserve(maker, width_);
}

void Product::prepare(const Maker& maker) {
  in_dtype_ = maker.of(in_).dtype;
  out_dtype_ = maker.of(out_).dtype;
  check(size_of(in_dtype_) <= 2, "codes of a product must have 8 or 16 bits");
  check(kernel_dtype_ == Dtype::kInt8 || kernel_dtype_ == Dtype::kInt16,
        "a kernel must be int8 or int16");
  requantizer_.check_type(out_dtype_);
  const int64_t wanted = in_dtype_ == Dtype::kUint8    ? 128
                         : in_dtype_ == Dtype::kUint16 ? 32768
                                                       : 0;
  check(offset_ == wanted, "`offset` must centre the codes");
  maker.holds(in_, {batch_, sizes_[0], sizes_[1], sizes_[2], groups_ * channels_}, 0,
              {in_strides_.begin(), in_strides_.end()});
  maker.holds(out_,
              {batch_, out_sizes_[0], out_sizes_[1], out_sizes_[2], groups_ * outputs_},
              0, {out_strides_.begin(), out_strides_.end()});
  for (int d = 0; d < 3; ++d) {
    check(sizes_[d] >= 0 && spread_[d] >= 1 && taps_[d] >= 0 && strides_[d] >= 1 &&
              dilation_[d] >= 1 && out_sizes_[d] >= 0,
          "sizes and steps of a product must be positive");
    const int64_t whole = std::max<int64_t>((sizes_[d] - 1) * spread_[d] + 1, 0);
    padded_[d] = std::max<int64_t>(whole + padding_[d][0] + padding_[d][1], 0);
    check(padded_[d] <= kMostElements, "a padded size is too large");
    const int64_t reach =
        (out_sizes_[d] - 1) * strides_[d] + (taps_[d] - 1) * dilation_[d];
    check(out_sizes_[d] == 0 || taps_[d] == 0 || reach < padded_[d],
          "an output lies outside of the padded codes");
  }
  is_empty_ = count_of({batch_, out_sizes_[0], out_sizes_[1], out_sizes_[2],
                        groups_ * outputs_}) == 0;
  // A kernel without terms: one of zeros over channels that are not there.
  is_depthwise_ = channels_ == 1 && outputs_ == 1 && groups_ > 1;
  const bool may_be_narrow =
      !is_depthwise_ && kernel_dtype_ == Dtype::kInt8 && left_ == 0;
  is_bytes_ = may_be_narrow && set_.byte_taps && size_of(in_dtype_) == 1;
  constexpr int64_t kFewRows = 4;
  const int64_t rows = count_of({batch_, out_sizes_[0], out_sizes_[1], out_sizes_[2]});
  is_narrow_ = may_be_narrow && rows <= kFewRows;
  is_few_ = is_bytes_ && set_.few && rows <= kFewRows;
  if (is_depthwise_ && kernel_dtype_ == Dtype::kInt8 && left_ == 0 &&
      size_of(in_dtype_) == 1 && set_.byte_depthwise()) {
    prepare_picks(maker);
    if (is_picked_) return;
  }
  pixel_ = is_depthwise_ ? groups_ : channels_;
  const Three one = {1, 1, 1};
  bool is_padded = spread_ != one;
  for (const auto& pad : padding_) is_padded = is_padded || pad[0] || pad[1];
  is_rows_ = taps_ == one && strides_ == one && !is_padded && !is_depthwise_;
  // Of a kernel that is dense along the last axis, a row of taps is one run.
  const bool is_joined = dilation_[2] == 1 && !is_depthwise_;
  const int64_t across = is_joined ? 1 : taps_[2];
  run_length_ = is_depthwise_ ? 1 : is_joined ? taps_[2] * channels_ : channels_;
  if (is_joined && groups_ == 1 && !is_rows_ && strides_[2] <= taps_[2] &&
      outputs_ > 0 && out_strides_[3] == outputs_ && out_strides_[4] == 1) {
    // Several pixels are one: one run has the codes of all, each its own weights.
    for (int64_t n = 2; n * outputs_ <= set_.lanes && n <= out_sizes_[2]; ++n) {
      if (out_sizes_[2] % n == 0) pixels_ = n;
    }
    run_length_ += (pixels_ - 1) * strides_[2] * channels_;
  }
  const int64_t unit = is_bytes_ ? set_.byte_taps : set_.short_taps;
  run_steps_ =
      steps_of(run_length_, unit, is_bytes_ && !is_few_ ? set_.tile_steps : 0);
  const int64_t more = run_steps_ * unit - run_length_;  // Read past each run.
  is_in_place_ = is_bytes_ && !is_padded && !more && about() == offset_ &&
                 in_strides_[4] == 1 && in_strides_[3] >= pixel_ &&
                 (across > 1 || taps_[2] == 1 || in_strides_[3] == pixel_);
  if (is_in_place_) {
    planes_ = {in_strides_[1], in_strides_[2], in_strides_[3]};
  } else {
    planes_ = {padded_[1] * padded_[2] * pixel_, padded_[2] * pixel_, pixel_};
  }
  for (int64_t i = 0; i < taps_[0]; ++i) {
    for (int64_t j = 0; j < taps_[1]; ++j) {
      for (int64_t k = 0; k < across; ++k) {
        runs_.push_back(i * dilation_[0] * planes_[0] +
                        j * dilation_[1] * planes_[1] + k * dilation_[2] * planes_[2]);
      }
    }
  }
  const int64_t staged = count_of({padded_[0], padded_[1], padded_[2], pixel_});
  check(staged <= kMostStaged, "padded codes are too large");
  if (is_depthwise_) {
    const int64_t block = 2 * set_.lanes;
    if (runs_.size() % 2) runs_.push_back(runs_.front());  // Its weights are 0.
    if (strides_[2] == 1 && out_strides_[3] == groups_ && out_strides_[4] == 1) {
      pixels_ = std::max<int64_t>(std::min(block / groups_, out_sizes_[2]), 1);
    }
    width_ = up(pixels_ * groups_, block);
    panel_ = static_cast<int64_t>(runs_.size()) * block;
    panels_ = width_ / block;
    weights_place_ = maker.layout.reserve(panel_ * panels_ * 2);
    bias_place_ = maker.layout.reserve(width_ * 4);
    scratch_ = up(staged * 2 + 2 * block * 2 + kSlack, kAlignment);
  } else {
    slack_ = std::max(kSlack, more * code_bytes());
    panel_ = static_cast<int64_t>(runs_.size()) * run_steps_ * unit * set_.lanes;
    panels_ = up(pixels_ * outputs_, 4 * set_.lanes) / set_.lanes;
    width_ = groups_ * panels_ * set_.lanes;
    weights_place_ =
        maker.layout.reserve(count_of({groups_, panels_, panel_}) * weight_bytes());
    bias_place_ = maker.layout.reserve(width_ * 4);
    int64_t codes = staged;
    if (is_rows_) {
      constexpr int64_t kChunkBytes = 1 << 16;
      chunk_ = std::max<int64_t>(
          48, kChunkBytes / std::max<int64_t>(channels_ * code_bytes(), 1) / 48 * 48);
      codes = chunk_ * channels_;
    }
    scratch_ = up(codes * code_bytes() + slack_, kAlignment);
  }
  requantizer_.reserve(maker, width_);
}

// The channel of each place of the packed numbers.
std::vector<int64_t> Product::order() const {
  std::vector<int64_t> found(static_cast<size_t>(width_), -1);
  for (int64_t i = 0; i < width_; ++i) {
    int64_t channel;
    if (is_picked_) {
      const int64_t lane = i % set_.lanes;
      channel = i / set_.lanes * pixel_ + lane % pixel_;
      if (lane >= pixels_ * pixel_ || channel >= groups_) channel = -1;
    } else if (is_depthwise_) {
      const int64_t block = 2 * set_.lanes;
      channel = i / block * block + set_.channel_of(static_cast<int>(i % block));
      channel = channel < pixels_ * groups_ ? channel % groups_ : -1;
    } else {
      const int64_t own = panels_ * set_.lanes, o = i % own;
      channel = o < pixels_ * outputs_ ? i / own * outputs_ + o % outputs_ : -1;
    }
    found[static_cast<size_t>(i)] = channel;
  }
  return found;
}

// Weights of one group, [runs, length, outputs], in panels. The weights of each pixel of
// several lie `step` codes further in the run.
struct Panels {
  int64_t outputs, pixels, step, runs, length, run_steps, taps, lanes, panels, panel;
  int64_t left;
  bool is_narrow;

  template <class T>
  void pack(const T* kernel, void* to) const {
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t r = 0; r < runs; ++r) {
        for (int64_t i = 0; i < length; ++i) {
          const T* row = kernel + (r * length + i) * outputs;
          for (int64_t l = 0; l < lanes && p * lanes + l < pixels * outputs; ++l) {
            const int64_t o = p * lanes + l, pixel = pixels > 1 ? o / outputs : 0;
            const int64_t k = i + pixel * step;
            const int64_t place =
                p * panel + ((r * run_steps + k / taps) * lanes + l) * taps + k % taps;
            const int64_t value = row[o - pixel * outputs] * (int64_t{1} << left);
            if (is_narrow) {
              static_cast<int8_t*>(to)[place] = static_cast<int8_t>(value);
            } else {
              static_cast<int16_t*>(to)[place] = static_cast<int16_t>(value);
            }
          }
        }
      }
    }
  }
};

void Product::pack(const Constants& constants, uint8_t* packed) const {
  const int64_t terms = taps() * channels_, all = groups_ * outputs_;
  const std::vector<int64_t> channels = order();
  requantizer_.pack(constants, packed, channels);
  const int32_t input_zero_point = requantizer_.take_input_zero_point(packed);
  auto* bias_to = reinterpret_cast<int32_t*>(packed + bias_place_);
  const int32_t* bias = constants.at<int32_t>(bias_, all);
  const auto pack_kernel = [&](const auto* kernel) {
    if (left_) {
      for (int64_t i = 0; i < groups_ * terms * outputs_; ++i) {
        const int64_t shifted = kernel[i] * (int64_t{1} << left_);
        check(shifted >= -32768 && shifted <= 32767,
              "a kernel with its left shift must fit 16 bits");
      }
    }
    if (is_picked_) {
      const int64_t picks = static_cast<int64_t>(picks_.size());
      const int64_t a_row = (taps_[2] + picked_ - 1) / picked_;
      for (int64_t i = 0; i < panels_ * set_.lanes; ++i) {
        const int64_t c = channels[static_cast<size_t>(i)];
        if (c < 0) continue;
        for (int64_t t = 0; t < taps(); ++t) {
          const int64_t k = t % taps_[2];
          const int64_t run = t / taps_[2] * a_row + k / picked_;
          packed[weights_place_ + i / set_.lanes * panel_ + run * picks +
                 i % set_.lanes * 4 + k % picked_] =
              static_cast<uint8_t>(kernel[c * taps() + t]);
        }
      }
      return;
    }
    if (is_depthwise_) {
      auto* to = reinterpret_cast<int16_t*>(packed + weights_place_);
      const int64_t block = 2 * set_.lanes;
      for (int64_t i = 0; i < width_; ++i) {
        const int64_t c = channels[static_cast<size_t>(i)];
        if (c < 0) continue;
        for (int64_t t = 0; t < taps(); ++t) {
          const int64_t at = i / block * panel_ + t / 2 * 2 * block + i % block * 2;
          to[at + t % 2] = static_cast<int16_t>(kernel[c * taps() + t] * (1 << left_));
        }
      }
      return;
    }
    const int64_t step = strides_[2] * channels_;
    const Panels all_panels{outputs_,
                            pixels_,
                            step,
                            static_cast<int64_t>(runs_.size()),
                            run_length_ - (pixels_ - 1) * step,
                            run_steps_,
                            is_bytes_ ? set_.byte_taps : set_.short_taps,
                            set_.lanes,
                            panels_,
                            panel_,
                            left_,
                            is_narrow()};
    for (int64_t g = 0; g < groups_; ++g) {
      all_panels.pack(kernel + g * terms * outputs_,
                      packed + weights_place_ + g * panels_ * panel_ * weight_bytes());
    }
  };
  const auto sums = [&](const auto* kernel, int64_t channel) {
    const int64_t g = channel / outputs_, o = channel % outputs_;
    uint32_t sum = 0;
    for (int64_t k = 0; k < terms; ++k) {
      sum += static_cast<uint32_t>(kernel[(g * terms + k) * outputs_ + o]);
    }
    return sum;
  };
  const auto whole = [&](const auto* kernel) {
    pack_kernel(kernel);
    for (int64_t i = 0; i < width_; ++i) {
      const int64_t c = channels[static_cast<size_t>(i)];
      uint32_t value = 0;
      if (c >= 0) {
        value = static_cast<uint32_t>(bias[c]) - static_cast<uint32_t>(input_zero_point);
        // Unsigned bytes are codes about 128.
        if (about() == 128) value -= 128 * sums(kernel, c);
      }
      bias_to[i] = static_cast<int32_t>(value);
    }
  };
  if (kernel_dtype_ == Dtype::kInt8) {
    whole(constants.at<int8_t>(kernel_, groups_ * terms * outputs_));
  } else {
    whole(constants.at<int16_t>(kernel_, groups_ * terms * outputs_));
  }
}

// Codes of a register's bytes, which are moved here: calls cost more.
constexpr int64_t kFew = 16;
template <class T, class Code>
void move_few(const T* from, int32_t add, Code* to) {
  T own[kFew];
  std::memcpy(own, from, sizeof(own));
  for (int i = 0; i < kFew; ++i) to[i] = static_cast<Code>(own[i] + add);
}

// Moves codes side by side, `add` added to each.
template <class T, class Code>
void Product::move(const T* from, int32_t add, Code* to, int64_t n) const {
  if constexpr (sizeof(T) == 1) {
    if (sizeof(Code) == 1 && add == 0) {
      std::memcpy(to, from, static_cast<size_t>(n));
    } else {
      set_.stage({from, static_cast<T>(-1) < 0, sizeof(Code) == 1, add, to, n});
    }
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Code>(from[i] + add);
  }
}

// Puts one example's codes, of a group, of some or of all channels, where kernels read them.
// After the first one the padding is there.
template <class Code>
void Product::stage(const Memory& memory, int64_t example, int64_t group, Code* to,
                    bool is_first) const {
  const int32_t add = about() - static_cast<int32_t>(offset_);
  const auto code = [&](int32_t x) { return static_cast<Code>(x + add); };
  const Code fill = code(padding_code_);
  with_type(in_dtype_, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    const T* from = memory.as<T>(in_) + example * in_strides_[0] +
                    group * pixel_ * in_strides_[4];
    const int64_t n = pixel_, row = padded_[2] * n;
    // The last of some channels may be fewer.
    const int64_t own = std::min(n, groups_ * channels_ - group * n);
    const bool is_beside = in_strides_[4] == 1 && spread_[2] == 1 && own == n;
    const bool is_dense = is_beside && in_strides_[3] == n;
    // Place of a padded pixel among the codes, or -1.
    const auto source = [&](int d, int64_t i) {
      const int64_t at = i - padding_[d][0];
      if (spread_[d] == 1) return 0 <= at && at < sizes_[d] ? at : -1;
      if (at < 0 || at % spread_[d] || at / spread_[d] >= sizes_[d]) return int64_t{-1};
      return at / spread_[d];
    };
    for (int64_t z = 0; z < padded_[0]; ++z) {
      for (int64_t y = 0; y < padded_[1]; ++y, to += row) {
        const int64_t sz = source(0, z), sy = source(1, y);
        if (sz < 0 || sy < 0) {
          if (is_first) std::fill(to, to + row, fill);
          continue;
        }
        const T* line = from + sz * in_strides_[1] + sy * in_strides_[2];
        if (is_dense || (is_beside && n == kFew)) {
          const int64_t low = std::max<int64_t>(padding_[2][0], 0);
          const int64_t skip = std::max<int64_t>(-padding_[2][0], 0);
          const int64_t end = std::min(padded_[2], padding_[2][0] + sizes_[2]);
          const int64_t first = std::min(low, padded_[2]);
          if (is_first) std::fill(to, to + first * n, fill);
          const T* x = line + skip * in_strides_[3];
          Code* out = to + first * n;
          const int64_t count = std::max<int64_t>(end - first, 0) * n;
          if (is_dense) {
            move(x, add, out, count);
          } else {
            for (int64_t i = 0; i < count; i += kFew, x += in_strides_[3]) {
              move_few(x, add, out + i);
            }
          }
          if (is_first) std::fill(out + count, to + row, fill);
          continue;
        }
        for (int64_t x = 0; x < padded_[2]; ++x) {
          const int64_t sx = source(2, x);
          Code* out = to + x * n;
          if (sx < 0) {
            std::fill(out, out + n, fill);
            continue;
          }
          const T* pixel = line + sx * in_strides_[3];
          for (int64_t c = 0; c < own; ++c) out[c] = code(pixel[c * in_strides_[4]]);
          std::fill(out + own, out + n, Code{0});
        }
      }
    }
    if (is_first) std::fill(to, to + slack_ / static_cast<int64_t>(sizeof(Code)), Code{0});
  });
}

template <class Code>
void Product::run_tiles(const Memory& memory, int64_t part, int64_t parts) const {
  Code* staged = reinterpret_cast<Code*>(memory.scratch);
  const int64_t out_size = size_of(out_dtype_);
  Tiles t{};
  t.codes = staged;
  t.runs = runs_.data();
  t.n_runs = static_cast<int64_t>(runs_.size());
  t.run_steps = run_steps_;
  t.plane = strides_[0] * planes_[0];
  t.row = strides_[1] * planes_[1];
  t.pixel = pixels_ * strides_[2] * planes_[2];
  t.panel = panel_;
  t.is_signed = is_signed();
  t.outputs = pixels_ * outputs_;
  t.requantizer = &requantizer_.in(memory);
  t.out_dtype = static_cast<int64_t>(out_dtype_);
  t.out_plane = out_strides_[1];
  t.out_row = out_strides_[2];
  t.out_pixel = pixels_ * out_strides_[3];
  t.out_channel = out_strides_[4];
  const auto kernel = is_few_             ? set_.few
                      : sizeof(Code) == 1 ? set_.bytes
                      : is_narrow()     ? set_.narrow
                                        : set_.shorts;
  const auto group = [&](int64_t g) {
    t.weights = memory.packed + weights_place_ +
                g * panels_ * panel_ * weight_bytes();
    t.first = g * panels_ * set_.lanes;
    t.bias = reinterpret_cast<const int32_t*>(memory.packed + bias_place_) + t.first;
  };
  uint8_t* out = memory.as<uint8_t>(out_);
  const int32_t add = about() - static_cast<int32_t>(offset_);
  // Panels of this part, of one group.
  const int64_t shares = panels_ / kShare;
  const int64_t first = shares * part / parts * kShare * set_.lanes;
  const int64_t last = shares * (part + 1) / parts * kShare * set_.lanes;
  if (parts > 1) t.outputs = std::min(t.outputs, last) - first;
  if (t.outputs <= 0) return;
  for (int64_t g = 0; g < groups_; ++g) {
    group(g);
    if (parts > 1) {
      t.weights = static_cast<const uint8_t*>(t.weights) +
                  first / set_.lanes * panel_ * weight_bytes();
      t.first += first;
      t.bias += first;
    }
    uint8_t* own = out + g * outputs_ * out_strides_[4] * out_size;
    if (parts > 1) own += first * out_strides_[4] * out_size;
    for (int64_t b = 0; b < batch_; ++b) {
      uint8_t* to = own + b * out_strides_[0] * out_size;
      if (is_in_place_ || !is_rows_) {
        if (is_in_place_) {
          t.codes = memory.as<Code>(in_) + b * in_strides_[0] + g * channels_;
        } else {
          stage(memory, b, g, staged);
        }
        t.depth = out_sizes_[0];
        t.height = out_sizes_[1];
        t.width = out_sizes_[2] / pixels_;
        t.out = to;
        kernel(t);
        continue;
      }
      // A dot: rows in chunks, of the last axis.
      t.depth = t.height = 1;
      for (int64_t z = 0; z < sizes_[0]; ++z) {
        for (int64_t y = 0; y < sizes_[1]; ++y) {
          for (int64_t x = 0; x < sizes_[2]; x += chunk_) {
            t.width = std::min(chunk_, sizes_[2] - x);
            with_type(in_dtype_, [&](auto* type) {
              using T = Pointee<decltype(type)>;
              const T* from = memory.as<T>(in_) + b * in_strides_[0] +
                              z * in_strides_[1] + y * in_strides_[2] +
                              x * in_strides_[3] + g * channels_ * in_strides_[4];
              Code* row = staged;
              for (int64_t i = 0; i < t.width; ++i, row += channels_) {
                const T* own_row = from + i * in_strides_[3];
                if (in_strides_[4] == 1) {
                  move(own_row, add, row, channels_);
                } else {
                  for (int64_t c = 0; c < channels_; ++c) {
                    row[c] = static_cast<Code>(own_row[c * in_strides_[4]] + add);
                  }
                }
              }
              std::fill(row, row + slack_ / static_cast<int64_t>(sizeof(Code)),
                        Code{0});
            });
            t.out = to + (z * out_strides_[1] + y * out_strides_[2] +
                          x * out_strides_[3]) *
                             out_size;
            kernel(t);
          }
        }
      }
    }
  }
}

void Product::run_picked(const Memory& memory) const {
  ByteDepthwise d{};
  d.codes = memory.scratch;
  d.picks = picks_.data();
  d.runs = runs_.data();
  d.n_runs = static_cast<int64_t>(runs_.size());
  d.plane = strides_[0] * planes_[0];
  d.row = strides_[1] * planes_[1];
  d.pixel = strides_[2] * planes_[2];
  d.depth = out_sizes_[0];
  d.height = out_sizes_[1];
  d.width = out_sizes_[2];
  d.pixels = pixels_;
  d.requantizer = &requantizer_.in(memory);
  d.out_dtype = static_cast<int64_t>(out_dtype_);
  d.out_plane = out_strides_[1];
  d.out_row = out_strides_[2];
  d.out_pixel = out_strides_[3];
  d.out_channel = out_strides_[4];
  for (int64_t b = 0; b < batch_; ++b) {
    for (int64_t i = 0; i < panels_; ++i) {
      stage(memory, b, i, memory.scratch, b == 0 && i == 0);
      d.first = i * set_.lanes;
      d.weights = reinterpret_cast<const int8_t*>(memory.packed + weights_place_) + i * panel_;
      d.bias = reinterpret_cast<const int32_t*>(memory.packed + bias_place_) + d.first;
      d.outputs = std::min(pixels_ * pixel_, pixels_ * groups_ - i * pixel_);
      d.out = memory.as<uint8_t>(out_) +
              (b * out_strides_[0] + i * pixel_ * out_strides_[4]) * size_of(out_dtype_);
      set_.byte_depthwise()(d);
    }
  }
}

void Product::run_depthwise(const Memory& memory) const {
  auto* staged = reinterpret_cast<int16_t*>(memory.scratch);
  Depthwise d{};
  d.codes = staged;
  d.taps = runs_.data();
  d.n_pairs = static_cast<int64_t>(runs_.size()) / 2;
  d.plane = strides_[0] * planes_[0];
  d.row = strides_[1] * planes_[1];
  d.pixel = strides_[2] * planes_[2];
  d.depth = out_sizes_[0];
  d.height = out_sizes_[1];
  d.width = out_sizes_[2];
  d.weights = reinterpret_cast<const int16_t*>(memory.packed + weights_place_);
  d.channels = pixels_ * groups_;
  d.pixels = pixels_;
  d.bias = reinterpret_cast<const int32_t*>(memory.packed + bias_place_);
  d.requantizer = &requantizer_.in(memory);
  d.out_dtype = static_cast<int64_t>(out_dtype_);
  d.out_plane = out_strides_[1];
  d.out_row = out_strides_[2];
  d.out_pixel = out_strides_[3];
  d.out_channel = out_strides_[4];
  for (int64_t b = 0; b < batch_; ++b) {
    stage(memory, b, 0, staged);
    // Kernels read whole registers past the last channel.
    d.out = memory.as<uint8_t>(out_) + b * out_strides_[0] * size_of(out_dtype_);
    set_.depthwise(d);
  }
}

void Product::run_part(const Memory& memory, int64_t part, int64_t parts) const {
  if (is_empty_) return;
  if (is_picked_) {
    run_picked(memory);
  } else if (is_depthwise_) {
    run_depthwise(memory);
  } else if (is_bytes_) {
    run_tiles<uint8_t>(memory, part, parts);
  } else {
    run_tiles<int16_t>(memory, part, parts);
  }
}

}  // namespace

const Entry kProducts[] = {
    {6, make<Product>},
};

}  // namespace qjax
