// Products of 32 bits in lanes of 64, those of even and of odd places of a register
// apart, where a set has them; else `QJAX_PAIRS` is not defined. After tiles.h.
#pragma once

#if defined(__AVX2__) && !defined(QJAX_SIMDE)
#define QJAX_PAIRS

namespace qjax {
namespace {

struct Pair {
  V::Reg even, odd;
};

#if defined(__AVX512F__)
struct W {
  using Reg = __m512i;
  static Reg set(int64_t x) { return _mm512_set1_epi64(x); }
  static Reg load(const int64_t* from) { return _mm512_loadu_si512(from); }
  static void store(int64_t* to, Reg x) { _mm512_storeu_si512(to, x); }
  static Reg add(Reg a, Reg b) { return _mm512_add_epi64(a, b); }
  static Reg upper(Reg x) { return _mm512_srli_epi64(x, 32); }
  static Reg product(Reg a, Reg b) { return _mm512_mul_epi32(a, b); }
  static Reg unsigned_product(Reg a, Reg b) { return _mm512_mul_epu32(a, b); }
  static Reg logical(Reg x, int64_t count) {
    return _mm512_srl_epi64(x, _mm_cvtsi64_si128(count));
  }
  static Reg right(Reg x, int64_t count) {
    return _mm512_sra_epi64(x, _mm_cvtsi64_si128(count));
  }
  static V::Reg joined(Reg even, Reg odd) {
    return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  }
};
#else
struct W {
  using Reg = __m256i;
  static Reg set(int64_t x) { return _mm256_set1_epi64x(x); }
  static Reg load(const int64_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static void store(int64_t* to, Reg x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x);
  }
  static Reg add(Reg a, Reg b) { return _mm256_add_epi64(a, b); }
  static Reg upper(Reg x) { return _mm256_srli_epi64(x, 32); }
  static Reg product(Reg a, Reg b) { return _mm256_mul_epi32(a, b); }
  static Reg unsigned_product(Reg a, Reg b) { return _mm256_mul_epu32(a, b); }
  static Reg logical(Reg x, int64_t count) {
    return _mm256_srl_epi64(x, _mm_cvtsi64_si128(count));
  }
  // Of |x| < 2^62.
  static Reg right(Reg x, int64_t count) {
    constexpr int64_t far = int64_t{1} << 62;
    return _mm256_sub_epi64(logical(add(x, set(far)), count), set(far >> count));
  }
  static V::Reg joined(Reg even, Reg odd) {
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  }
};
#endif

// Places of a register of 32 bits, the upper of each pair moved down.
QJAX_INLINE Pair pair_of(V::Reg x) { return {x, W::upper(x)}; }

}  // namespace
}  // namespace qjax
#endif
