// Depthwise products over the vector type of tiles.h, in 16 bits.
namespace qjax {
namespace {

template <Form form, class T>
struct DepthwiseRows {
  static constexpr int64_t kBlock = 2 * V::kLanes;

  static void run(const Depthwise& d) {
    constexpr int kThree = 5;  // Pairs of 3 x 3 taps: they stay in registers.
    for (int64_t c = 0; c < d.channels; c += kBlock) {
      d.n_pairs == kThree ? block<kThree>(d, c) : block<0>(d, c);
    }
  }

  static QJAX_INLINE auto interleave(const int16_t* a, const int16_t* b) {
    return V::interleave(V::halves(a), V::halves(b));
  }

  // One block of channels, or of channels of several pixels, at all places.
  template <int pairs>
  static __attribute__((noinline)) void block(const Depthwise& d, int64_t c) {
    const Ends ends(*d.requantizer);
    const int64_t n_pairs = pairs ? pairs : d.n_pairs;
    const int16_t* from = d.weights + c * n_pairs * 2;
    constexpr int kept = pairs ? pairs : 1;
    Shorts::Operand weights[2 * kept];
    int64_t taps[2 * kept];
    if constexpr (pairs > 0) {
      QJAX_UNROLL for (int t = 0; t < 2 * pairs; ++t) {
        weights[t] = Shorts::weights(from + t * kBlock);
        taps[t] = d.taps[t];
      }
    }
    const V::Reg bias[2] = {V::load(d.bias + c), V::load(d.bias + c + V::kLanes)};
    const Numbers numbers[2] = {numbers_of(*d.requantizer, c),
                                numbers_of(*d.requantizer, c + V::kLanes)};
    for (int64_t z = 0; z < d.depth; ++z) {
      for (int64_t y = 0; y < d.height; ++y) {
        const int16_t* row = d.codes + z * d.plane + y * d.row + c;
        T* out = static_cast<T*>(d.out) + z * d.out_plane + y * d.out_row +
                 c * d.out_channel;
        for (int64_t next = 0; next < d.width; next += d.pixels) {
          const int64_t x = least(next, d.width - d.pixels);
          const int16_t* codes = row + x * d.pixel;
          V::Reg low = bias[0], high = bias[1];
          if constexpr (pairs > 0) {
            QJAX_UNROLL for (int t = 0; t < pairs; ++t) {
              const auto both =
                  interleave(codes + taps[2 * t], codes + taps[2 * t + 1]);
              low = Shorts::dot(low, both.low, weights[2 * t]);
              high = Shorts::dot(high, both.high, weights[2 * t + 1]);
            }
          } else {
            const int16_t* w = from;
            for (int64_t t = 0; t < n_pairs; ++t, w += 2 * kBlock) {
              const auto both =
                  interleave(codes + d.taps[2 * t], codes + d.taps[2 * t + 1]);
              low = Shorts::dot(low, both.low, Shorts::weights(w));
              high = Shorts::dot(high, both.high, Shorts::weights(w + kBlock));
            }
          }
          store(d, ends, numbers, low, high, c, out + x * d.out_pixel);
        }
      }
    }
  }

  static QJAX_INLINE void store(const Depthwise& d, const Ends& ends,
                                const Numbers* numbers, V::Reg low, V::Reg high,
                                int64_t c, T* out) {
    const int64_t n = least(kBlock, d.channels - c);
    alignas(64) T codes_of_block[kBlock];
    if constexpr (form == Form::kNone || form == Form::kExact) {
      alignas(64) int32_t wide[kBlock];
      V::store(wide, low);
      V::store(wide + V::kLanes, high);
      for (int i = 0; i < kBlock; ++i) {
        int32_t x = wide[i];
        if constexpr (form == Form::kExact) x = code_of(x, *d.requantizer, c + i);
        codes_of_block[V::channel_of(i)] = static_cast<T>(x);
      }
    } else {
      low = qjax::codes<form>(low, numbers[0], ends);
      high = qjax::codes<form>(high, numbers[1], ends);
      if (n == kBlock && d.out_channel == 1) return V::narrow_pair(out, low, high);
      V::narrow_pair(codes_of_block, low, high);
    }
    if (d.out_channel == 1 && n == V::kLanes) {
      memcpy(out, codes_of_block, sizeof(T) * V::kLanes);
    } else if (d.out_channel == 1) {
      for (int64_t i = 0; i < n; ++i) out[i] = codes_of_block[i];
    } else {
      for (int64_t i = 0; i < n; ++i) out[i * d.out_channel] = codes_of_block[i];
    }
  }
};

void run_depthwise(const Depthwise& d) { with_form<DepthwiseRows>(d); }

#ifndef QJAX_HAS_PICKS
auto no_byte_depthwise() -> void (*)(const ByteDepthwise&) { return nullptr; }
#endif

}  // namespace
}  // namespace qjax
