// The vector type of 512 bits, for the sets that have AVX-512 VNNI.
#define QJAX_HAS_BYTES
#define QJAX_HAS_PICKS
#ifdef QJAX_SIMDE  // Emulated, for tests on other machines.
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include "emulated.h"
#else
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined registers of its own header for mistakes.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif
#include <string.h>

#include "kernels.h"

namespace qjax {
namespace {

struct V {
  using Reg = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kMostAccumulators = 24;

  static Reg load(const int32_t* from) { return _mm512_loadu_si512(from); }
  static void store(int32_t* to, Reg x) { _mm512_storeu_si512(to, x); }
  static Reg set(int32_t x) { return _mm512_set1_epi32(x); }
  static Reg add(Reg a, Reg b) { return _mm512_add_epi32(a, b); }
  static Reg multiply(Reg a, Reg b) { return _mm512_mullo_epi32(a, b); }
  static Reg minimum(Reg a, Reg b) { return _mm512_min_epi32(a, b); }
  static Reg maximum(Reg a, Reg b) { return _mm512_max_epi32(a, b); }
  static Reg both(Reg a, Reg b) { return _mm512_and_si512(a, b); }
  static Reg right(Reg x, Reg count) { return _mm512_srav_epi32(x, count); }
  static Reg sign(Reg x) { return _mm512_srai_epi32(x, 31); }
  static Reg positive(Reg x) {
    return _mm512_maskz_set1_epi32(_mm512_cmpgt_epi32_mask(x, _mm512_setzero_si512()),
                                   -1);
  }

  static Reg high_word(Reg acc, Reg m) {
    const Reg even = _mm512_mul_epi32(acc, m);
    const Reg odd = _mm512_mul_epi32(_mm512_srli_epi64(acc, 32),
                                     _mm512_srli_epi64(m, 32));
    return high_words(even, odd);
  }
  // The same of accumulators in memory: a load brings the odd ones to their places.
  static Reg high_word_of(const int32_t* acc, Reg m) {
    Reg odd;
#ifdef QJAX_SIMDE
    odd = _mm512_srli_epi64(load(acc), 32);
#else
    asm("vmovshdup %1, %0" : "=v"(odd) : "m"(*reinterpret_cast<const Reg*>(acc)));
#endif
    return high_words(_mm512_mul_epi32(load(acc), m),
                      _mm512_mul_epi32(odd, _mm512_srli_epi64(m, 32)));
  }
  // In one shuffle: a shift and a blend are two instructions.
  static Reg high_words(Reg even, Reg odd) {
#ifdef QJAX_SIMDE  // Version 0.7 lacks the shuffle.
    return _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
#else
    return _mm512_castps_si512(_mm512_mask_movehdup_ps(
        _mm512_castsi512_ps(odd), 0x5555, _mm512_castsi512_ps(even)));
#endif
  }
  static Reg doubled_high(Reg acc, Reg m) {
    const Reg nudge = _mm512_set1_epi64(int64_t{1} << 30);
    const Reg even = _mm512_add_epi64(_mm512_mul_epi32(acc, m), nudge);
    const Reg odd = _mm512_add_epi64(
        _mm512_mul_epi32(_mm512_srli_epi64(acc, 32), _mm512_srli_epi64(m, 32)), nudge);
    return _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 31),
                                   _mm512_slli_epi64(odd, 1));
  }

  template <class T>
  static void narrow(T* out, Reg x, int64_t n) {
    const uint32_t mask = (1u << n) - 1;
    if constexpr (sizeof(T) == 4) {
      _mm512_mask_storeu_epi32(out, static_cast<__mmask16>(mask), x);
    } else if constexpr (sizeof(T) == 1) {
      const __m128i bytes = _mm512_cvtepi32_epi8(x);
      if (n == kLanes) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
      } else {
        _mm_mask_storeu_epi8(out, static_cast<__mmask16>(mask), bytes);
      }
    } else {
      const __m256i halves = _mm512_cvtepi32_epi16(x);
      if (n == kLanes) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves);
      } else {
        _mm256_mask_storeu_epi16(out, static_cast<__mmask16>(mask), halves);
      }
    }
  }

  // Four registers as 64 bytes in order, saturated at the ends of their type.
  template <class T>
  static Reg packed(Reg a, Reg b, Reg c, Reg d) {
    const Reg ab = _mm512_packs_epi32(a, b), cd = _mm512_packs_epi32(c, d);
    // Lanes of 128 bits hold four of each.
    const Reg all = static_cast<T>(-1) < 0 ? _mm512_packs_epi16(ab, cd)
                                           : _mm512_packus_epi16(ab, cd);
    const Reg order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7,
                                        11, 15);
    return _mm512_permutexvar_epi32(order, all);
  }
  template <class T>
  static Reg clipped(Reg bytes, Reg low, Reg high) {
    if constexpr (static_cast<T>(-1) < 0) {
      return _mm512_min_epi8(_mm512_max_epi8(bytes, low), high);
    } else {
      return _mm512_min_epu8(_mm512_max_epu8(bytes, low), high);
    }
  }
  static Reg set_bytes(int32_t x) { return _mm512_set1_epi8(static_cast<char>(x)); }

  struct Pairs {
    Reg low, high;
  };
  using Halves = Reg;  // Integers of 16 bits.
  static Halves halves(const int16_t* from) {
    Reg x = _mm512_loadu_si512(from);
#ifndef QJAX_SIMDE
    asm("" : "+v"(x));  // Else it is loaded for each of its uses.
#endif
    return x;
  }
  static Halves halves(const int8_t* from) {
    return _mm512_cvtepi8_epi16(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Halves halves(const uint8_t* from) {
    return _mm512_cvtepu8_epi16(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Pairs interleave(Halves a, Halves b) {
    return {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)};
  }
  // Lanes of 128 bits hold channels 8 i to 8 i + 3, then 8 i + 4 to 8 i + 7.
  static int channel_of(int place) {
    const int high = place / 16, lane = place % 16;
    return lane / 4 * 8 + high * 4 + lane % 4;
  }
  // Packing is the inverse of interleaving.
  template <class T>
  static void narrow_pair(T* out, Reg low, Reg high) {
    if constexpr (sizeof(T) == 4) {
      const Reg first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20,
                                          21, 22, 23);
      const Reg second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15,
                                           28, 29, 30, 31);
      _mm512_storeu_si512(out, _mm512_permutex2var_epi32(low, first, high));
      _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi32(low, second, high));
    } else if constexpr (sizeof(T) == 2) {
      _mm512_storeu_si512(out, static_cast<T>(-1) < 0 ? _mm512_packs_epi32(low, high)
                                                      : _mm512_packus_epi32(low, high));
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                          _mm512_cvtepi16_epi8(_mm512_packs_epi32(low, high)));
    }
  }
};

struct Bytes {
  using Code = uint8_t;
  using Weight = int8_t;
  using Operand = __m512i;
  static constexpr int kTaps = 4;

  static Operand broadcast(const Code* codes) {
    int32_t four;
    memcpy(&four, codes, 4);
    return _mm512_set1_epi32(four);
  }
  static Operand weights(const Weight* from) { return _mm512_loadu_si512(from); }
  static V::Reg dot(V::Reg acc, Operand code, Operand weight) {
    return _mm512_dpbusd_epi32(acc, code, weight);
  }
};

struct Shorts {
  using Code = int16_t;
  using Weight = int16_t;
  using Operand = __m512i;
  static constexpr int kTaps = 2;

  static Operand broadcast(const Code* codes) {
    int32_t pair;
    memcpy(&pair, codes, 4);
    return _mm512_set1_epi32(pair);
  }
  static Operand weights(const Weight* from) { return _mm512_loadu_si512(from); }
  static Operand widened(const int8_t* from) {
    return _mm512_cvtepi8_epi16(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static V::Reg dot(V::Reg acc, Operand code, Operand weight) {
    return _mm512_dpwssd_epi32(acc, code, weight);
  }
};

}  // namespace
}  // namespace qjax
