// What SIMDe 0.7 lacks of the instructions that avx512.h and isa_amx_int8.cc use, for
// tests on machines without them. Each is plain C++ over the lanes.
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

template <class T, int n = 16, class Vector>
void masked_store(void* out, uint32_t mask, const Vector& x) {
  const char* from = reinterpret_cast<const char*>(&x);
  for (int i = 0; i < n; ++i) {
    if ((mask >> i) & 1) set_lane(static_cast<char*>(out), i, lane<T>(from, i));
  }
}

inline simde__m512i widened(const simde__m256i& x) {
  return lanes<simde__m512i>(x, [](const char* from, char* to) {
    for (int i = 0; i < 32; ++i) {
      set_lane(to, i, static_cast<int16_t>(lane<uint8_t>(from, i)));
    }
  });
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

// Tiles as AMX has them: 16 rows of 64 bytes, of which a configuration uses a part.
struct EmulatedTiles {
  uint8_t bytes[8][16][64];
  int rows[8], width[8];
};
static thread_local EmulatedTiles tiles_of_thread;

inline void configure(const void* from) {
  const auto* c = static_cast<const uint8_t*>(from);
  for (int i = 0; i < 8; ++i) {
    tiles_of_thread.width[i] = c[16 + 2 * i] + 256 * c[17 + 2 * i];
    tiles_of_thread.rows[i] = c[48 + i];
  }
}
inline void load_tile(int tile, const void* from, int64_t stride) {
  auto& t = tiles_of_thread;
  memset(t.bytes[tile], 0, sizeof(t.bytes[tile]));
  for (int r = 0; r < t.rows[tile]; ++r) {
    memcpy(t.bytes[tile][r], static_cast<const uint8_t*>(from) + r * stride,
           static_cast<size_t>(t.width[tile]));
  }
}
inline void store_tile(int tile, void* to, int64_t stride) {
  const auto& t = tiles_of_thread;
  for (int r = 0; r < t.rows[tile]; ++r) {
    memcpy(static_cast<uint8_t*>(to) + r * stride, t.bytes[tile][r],
           static_cast<size_t>(t.width[tile]));
  }
}
template <class Code>
void multiply_tiles(int acc, int a, int b) {
  auto& t = tiles_of_thread;
  for (int m = 0; m < t.rows[acc]; ++m) {
    for (int n = 0; n < t.width[acc] / 4; ++n) {
      uint32_t sum;
      memcpy(&sum, t.bytes[acc][m] + 4 * n, 4);
      for (int k = 0; k < t.width[a]; ++k) {
        const int code = static_cast<Code>(t.bytes[a][m][k]);
        sum += static_cast<uint32_t>(
            code * static_cast<int8_t>(t.bytes[b][k / 4][4 * n + k % 4]));
      }
      memcpy(t.bytes[acc][m] + 4 * n, &sum, 4);
    }
  }
}

}  // namespace
}  // namespace qjax

#define _tile_release() static_cast<void>(0)
#define _tile_loadd qjax::load_tile
#define _tile_stream_loadd qjax::load_tile
#define _tile_stored qjax::store_tile
#define _tile_dpbssd qjax::multiply_tiles<int8_t>
#define _tile_dpbusd qjax::multiply_tiles<uint8_t>

#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepi32_epi8
#undef _mm512_cvtepi32_epi16
#undef _mm512_srav_epi32
#undef _mm512_srai_epi32
#undef _mm512_mask_storeu_epi32
#undef _mm256_mask_storeu_epi16
#undef _mm_mask_storeu_epi8
#undef _mm256_mask_storeu_epi8
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
#define _mm256_mask_storeu_epi8 qjax::masked_store<int8_t, 32>
#undef _mm512_cvtepu8_epi16
#define _mm512_cvtepu8_epi16 qjax::widened
