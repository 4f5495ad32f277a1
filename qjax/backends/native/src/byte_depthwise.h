// Depthwise products of bytes, after tiles.h and vbmi.h: one instruction of VBMI brings four
// taps of sixteen outputs side by side, the next multiplies and adds them up.
#pragma once

#ifdef QJAX_SIMDE
#define QJAX_WITH_VBMI
#endif

namespace qjax {
namespace {

template <Form form, class T>
struct PickedRows {
  static constexpr int kPlaces = 4;  // At once.
  static constexpr bool is_byte =
      sizeof(T) == 1 && form != Form::kNone && form != Form::kExact;

  QJAX_WITH_VBMI static void run(const ByteDepthwise& d) {
    constexpr int kThree = 3;  // Rows of 3 x 3 taps: they stay in registers.
    d.n_runs == kThree ? all<kThree>(d) : all<0>(d);
  }

  template <int runs>
  QJAX_WITH_VBMI static __attribute__((noinline)) void all(const ByteDepthwise& d) {
    const PackedRequantizer& q = *d.requantizer;
    const Ends ends(q);
    const Numbers numbers = numbers_of(q, d.first);
    const V::Reg picks = _mm512_loadu_si512(d.picks), bias = V::load(d.bias);
    const V::Reg low = V::set_bytes(q.low), high = V::set_bytes(q.high);
    constexpr int kept = runs ? runs : 1;
    V::Reg weights[kept];
    int64_t places[kept];
    QJAX_UNROLL for (int r = 0; r < runs; ++r) {
      weights[r] = Bytes::weights(d.weights + r * kBytesOfRun);
      places[r] = d.runs[r];
    }
    const uint8_t* from[kPlaces];
    T* to[kPlaces];
    int held = 0;
    const auto dot = [&](V::Reg acc, const uint8_t* codes, V::Reg weight) QJAX_WITH_VBMI {
      const V::Reg taps = _mm512_permutexvar_epi8(picks, _mm512_loadu_si512(codes));
      return Bytes::dot(acc, taps, weight);
    };
    const auto flush = [&]() QJAX_WITH_VBMI {
      // What is missing is computed again.
      for (int i = held; i < kPlaces; ++i) {
        from[i] = from[0];
        to[i] = to[0];
      }
      held = 0;
      V::Reg acc[kPlaces];
      QJAX_UNROLL for (int i = 0; i < kPlaces; ++i) acc[i] = bias;
      if constexpr (runs > 0) {
        QJAX_UNROLL for (int r = 0; r < runs; ++r) {
          QJAX_UNROLL for (int i = 0; i < kPlaces; ++i) {
            acc[i] = dot(acc[i], from[i] + places[r], weights[r]);
          }
        }
      } else {
        for (int64_t r = 0; r < d.n_runs; ++r) {
          const V::Reg weight = Bytes::weights(d.weights + r * kBytesOfRun);
          QJAX_UNROLL for (int i = 0; i < kPlaces; ++i) {
            acc[i] = dot(acc[i], from[i] + d.runs[r], weight);
          }
        }
      }
      if constexpr (is_byte) {
        if (d.out_channel == 1) {
          QJAX_UNROLL for (int i = 0; i < kPlaces; ++i) {
            acc[i] = steps<form>(acc[i], numbers, ends);
          }
          const V::Reg bytes =
              V::clipped<T>(V::packed<T>(acc[0], acc[1], acc[2], acc[3]), low, high);
          store<0>(d, bytes, to[0]);
          store<1>(d, bytes, to[1]);
          store<2>(d, bytes, to[2]);
          store<3>(d, bytes, to[3]);
          return;
        }
      }
      for (int i = 0; i < kPlaces; ++i) {
        finish<form>(acc[i], q, ends, d.first, to[i], d.outputs, d.out_channel);
      }
    };
    T* out = static_cast<T*>(d.out);
    for (int64_t z = 0; z < d.depth; ++z) {
      for (int64_t y = 0; y < d.height; ++y) {
        const uint8_t* codes = d.codes + z * d.plane + y * d.row;
        T* line = out + z * d.out_plane + y * d.out_row;
        for (int64_t next = 0; next < d.width; next += d.pixels) {
          const int64_t x = least(next, d.width - d.pixels);
          from[held] = codes + x * d.pixel;
          to[held] = line + x * d.out_pixel;
          if (++held == kPlaces) flush();
        }
      }
    }
    if (held) flush();
  }

  template <int i>
  QJAX_WITH_VBMI static void store(const ByteDepthwise& d, V::Reg bytes, T* to) {
    const __m128i own = _mm512_extracti32x4_epi32(bytes, i);
    if (d.outputs == V::kLanes) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), own);
    } else {
      _mm_mask_storeu_epi8(to, static_cast<__mmask16>((1u << d.outputs) - 1), own);
    }
  }

  static constexpr int64_t kBytesOfRun = 64;
};

QJAX_WITH_VBMI void run_byte_depthwise(const ByteDepthwise& d) {
  with_form<PickedRows>(d);
}

auto byte_depthwise() -> void (*)(const ByteDepthwise&) {
#ifndef QJAX_SIMDE
  if (!has_vbmi()) return nullptr;
#endif
  return run_byte_depthwise;
}

}  // namespace
}  // namespace qjax
