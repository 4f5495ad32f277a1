// The vector type of 256 bits, for the sets that have AVX2.
#include <immintrin.h>
#include <string.h>

#include "kernels.h"

namespace qjax {
namespace {

struct V {
  using Reg = __m256i;
  static constexpr int kLanes = 8;
  static constexpr int kMostAccumulators = 12;

  static Reg load(const int32_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static void store(int32_t* to, Reg x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x);
  }
  static Reg set(int32_t x) { return _mm256_set1_epi32(x); }
  static Reg add(Reg a, Reg b) { return _mm256_add_epi32(a, b); }
  static Reg multiply(Reg a, Reg b) { return _mm256_mullo_epi32(a, b); }
  static Reg minimum(Reg a, Reg b) { return _mm256_min_epi32(a, b); }
  static Reg maximum(Reg a, Reg b) { return _mm256_max_epi32(a, b); }
  static Reg both(Reg a, Reg b) { return _mm256_and_si256(a, b); }
  static Reg right(Reg x, Reg count) { return _mm256_srav_epi32(x, count); }
  static Reg sign(Reg x) { return _mm256_srai_epi32(x, 31); }
  static Reg positive(Reg x) { return _mm256_cmpgt_epi32(x, _mm256_setzero_si256()); }

  static Reg high_word(Reg acc, Reg m) {
    const Reg even = _mm256_mul_epi32(acc, m);
    const Reg odd = _mm256_mul_epi32(_mm256_srli_epi64(acc, 32),
                                     _mm256_srli_epi64(m, 32));
    return _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  }
  static Reg doubled_high(Reg acc, Reg m) {
    const Reg nudge = _mm256_set1_epi64x(int64_t{1} << 30);
    const Reg even = _mm256_add_epi64(_mm256_mul_epi32(acc, m), nudge);
    const Reg odd = _mm256_add_epi64(
        _mm256_mul_epi32(_mm256_srli_epi64(acc, 32), _mm256_srli_epi64(m, 32)), nudge);
    return _mm256_blend_epi32(_mm256_srli_epi64(even, 31), _mm256_slli_epi64(odd, 1),
                              0xAA);
  }

  // Signed types take the bytes of their unsigned twins: codes fit the type.
  template <class T>
  static void narrow(T* out, Reg x, int64_t n) {
    if constexpr (sizeof(T) == 4) {
      if (n == kLanes) return store(reinterpret_cast<int32_t*>(out), x);
    } else if constexpr (sizeof(T) == 1) {
      const Reg bytes = _mm256_shuffle_epi8(
          x, _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                              -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                              -1, -1));
      const __m128i low = _mm256_castsi256_si128(bytes);
      const __m128i high = _mm256_extracti128_si256(bytes, 1);
      const __m128i all = _mm_unpacklo_epi32(low, high);
      if (n == kLanes) {
        return _mm_storel_epi64(reinterpret_cast<__m128i*>(out), all);
      }
      alignas(16) uint8_t kept[16];
      _mm_store_si128(reinterpret_cast<__m128i*>(kept), all);
      memcpy(out, kept, static_cast<size_t>(n));
      return;
    } else {
      const Reg halves = _mm256_shuffle_epi8(
          x, _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,
                              0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1,
                              -1));
      const __m128i low = _mm256_castsi256_si128(halves);
      const __m128i high = _mm256_extracti128_si256(halves, 1);
      const __m128i all = _mm_unpacklo_epi64(low, high);
      if (n == kLanes) {
        return _mm_storeu_si128(reinterpret_cast<__m128i*>(out), all);
      }
      alignas(16) uint8_t kept[16];
      _mm_store_si128(reinterpret_cast<__m128i*>(kept), all);
      memcpy(out, kept, static_cast<size_t>(n) * 2);
      return;
    }
    alignas(32) int32_t kept[kLanes];
    store(kept, x);
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(kept[i]);
  }

  struct Pairs {
    Reg low, high;
  };
  using Halves = Reg;  // Integers of 16 bits.
  static Halves halves(const int16_t* from) {
    Reg x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    asm("" : "+x"(x));  // Else it is loaded for each of its uses.
    return x;
  }
  static Halves halves(const int8_t* from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Halves halves(const uint8_t* from) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Pairs interleave(Halves a, Halves b) {
    return {_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b)};
  }
  // Lanes of 128 bits hold channels 0 to 3 and 8 to 11, then 4 to 7 and 12 to 15.
  static int channel_of(int place) {
    const int high = place / 8, lane = place % 8;
    return lane / 4 * 8 + high * 4 + lane % 4;
  }
  template <class T>
  static void narrow_pair(T* out, Reg low, Reg high) {
    const Reg first = _mm256_permute2x128_si256(low, high, 0x20);  // 0-3, 4-7
    const Reg second = _mm256_permute2x128_si256(low, high, 0x31);
    narrow(out, first, 8);
    narrow(out + 8, second, 8);
  }
};

struct Shorts {
  using Code = int16_t;
  using Weight = int16_t;
  using Operand = __m256i;
  static constexpr int kTaps = 2;

  static Operand broadcast(const Code* codes) {
    int32_t pair;
    memcpy(&pair, codes, 4);
    return _mm256_set1_epi32(pair);
  }
  static Operand weights(const Weight* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static Operand widened(const int8_t* from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static V::Reg dot(V::Reg acc, Operand code, Operand weight) {
#ifdef QJAX_VNNI_256
    return _mm256_dpwssd_avx_epi32(acc, code, weight);
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(code, weight));
#endif
  }
};

}  // namespace
}  // namespace qjax
