// What SIMDe 0.7 lacks of the instructions that isa_avx512_vnni.cc uses, for tests on
// machines without them. Each is plain C++ over the lanes.
#pragma once

#include <simde/x86/avx512.h>
#include <string.h>

namespace qjax {
namespace {

template <class To, class From, class Of>
To lanes(const From& from, Of&& of) {
  To found;
  of(reinterpret_cast<const char*>(&from), reinterpret_cast<char*>(&found));
  return found;
}

template <class T>
T lane(const char* from, int i) {
  T found;
  memcpy(&found, from + i * sizeof(T), sizeof(T));
  return found;
}

template <class T>
void set_lane(char* to, int i, T x) {
  memcpy(to + i * sizeof(T), &x, sizeof(T));
}

template <class From, class T, class Vector, class Wide>
Wide converted(const Vector& x) {
  return lanes<Wide>(x, [](const char* from, char* to) {
    for (int i = 0; i < 16; ++i) set_lane(to, i, static_cast<T>(lane<From>(from, i)));
  });
}

template <class T, class Vector>
void masked_store(void* out, uint32_t mask, const Vector& x) {
  const char* from = reinterpret_cast<const char*>(&x);
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i) & 1) set_lane(static_cast<char*>(out), i, lane<T>(from, i));
  }
}

inline simde__m512i shifted(const simde__m512i& x, const simde__m512i& counts) {
  return lanes<simde__m512i>(x, [&](const char* from, char* to) {
    const char* by = reinterpret_cast<const char*>(&counts);
    for (int i = 0; i < 16; ++i) {
      const uint32_t n = lane<uint32_t>(by, i);
      set_lane(to, i, lane<int32_t>(from, i) >> (n > 31 ? 31 : n));
    }
  });
}

}  // namespace
}  // namespace qjax

#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepi32_epi8
#undef _mm512_cvtepi32_epi16
#undef _mm512_srav_epi32
#undef _mm512_srai_epi32
#undef _mm512_mask_storeu_epi32
#undef _mm256_mask_storeu_epi16
#undef _mm_mask_storeu_epi8
#define _mm512_cvtepi8_epi32 qjax::converted<int8_t, int32_t, simde__m128i, simde__m512i>
#define _mm512_cvtepu8_epi32 qjax::converted<uint8_t, int32_t, simde__m128i, simde__m512i>
#define _mm512_cvtepi32_epi8 qjax::converted<int32_t, int8_t, simde__m512i, simde__m128i>
#define _mm512_cvtepi32_epi16 \
  qjax::converted<int32_t, int16_t, simde__m512i, simde__m256i>
#define _mm512_srav_epi32 qjax::shifted
#define _mm512_srai_epi32(x, n) qjax::shifted(x, simde_mm512_set1_epi32(n))
#define _mm512_mask_storeu_epi32 qjax::masked_store<int32_t>
#define _mm256_mask_storeu_epi16 qjax::masked_store<int16_t>
#define _mm_mask_storeu_epi8 qjax::masked_store<int8_t>
