// Tables of bytes in registers, where AVX-512 has VBMI, which a processor with VNNI may
// lack: chosen when it runs. Before wide.h, after <immintrin.h>.
#pragma once

#include "kernels.h"

#define QJAX_VBMI
#define QJAX_WITH_VBMI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi")))

namespace qjax {
namespace {

inline bool has_vbmi() { return __builtin_cpu_supports("avx512vbmi"); }

struct ByteTable {
  __m512i quarters[4];
};

QJAX_WITH_VBMI inline ByteTable byte_table(const uint8_t* from) {
  return {{_mm512_loadu_si512(from), _mm512_loadu_si512(from + 64),
           _mm512_loadu_si512(from + 128), _mm512_loadu_si512(from + 192)}};
}

QJAX_WITH_VBMI inline __m512i looked_up(const ByteTable& table, __m512i x) {
  const auto& q = table.quarters;
  const __m512i low = _mm512_permutex2var_epi8(q[0], x, q[1]);
  const __m512i high = _mm512_permutex2var_epi8(q[2], x, q[3]);
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(x), low, high);
}

QJAX_WITH_VBMI inline __mmask64 first(int64_t n) {
  return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1;
}

QJAX_WITH_VBMI void vbmi_look_up(const uint8_t* table, const uint8_t* in, uint8_t* out,
                                 int64_t n) {
  const ByteTable own = byte_table(table);
  for (int64_t i = 0; i < n; i += 64) {
    const __mmask64 some = first(n - i);
    const __m512i x = _mm512_maskz_loadu_epi8(some, in + i);
    _mm512_mask_storeu_epi8(out + i, some, looked_up(own, x));
  }
}

// Sums of table[in[i]], of the integers whose bytes are the planes; of a mask, where it
// is not 0.
QJAX_WITH_VBMI uint64_t vbmi_sum(const uint8_t* planes, const uint8_t* in,
                                 const uint8_t* mask, int64_t n) {
  uint64_t total = 0;
  for (int plane = 0; plane < 4; plane += 2) {
    const ByteTable a = byte_table(planes + plane * kBytes);
    const ByteTable b = byte_table(planes + (plane + 1) * kBytes);
    const __m512i zero = _mm512_setzero_si512();
    __m512i low = zero, high = zero;
    for (int64_t i = 0; i < n; i += 64) {
      __mmask64 some = first(n - i);
      const __m512i x = _mm512_maskz_loadu_epi8(some, in + i);
      if (mask) {
        const __m512i kept = _mm512_maskz_loadu_epi8(some, mask + i);
        some = _mm512_test_epi8_mask(kept, kept);
      }
      const __m512i of_a = _mm512_maskz_mov_epi8(some, looked_up(a, x));
      const __m512i of_b = _mm512_maskz_mov_epi8(some, looked_up(b, x));
      low = _mm512_add_epi64(low, _mm512_sad_epu8(of_a, zero));
      high = _mm512_add_epi64(high, _mm512_sad_epu8(of_b, zero));
    }
    alignas(64) uint64_t lanes[8];
    _mm512_store_si512(lanes, _mm512_add_epi64(low, _mm512_slli_epi64(high, 8)));
    uint64_t sum = 0;
    for (uint64_t lane : lanes) sum += lane;
    total += sum << (8 * plane);
  }
  return total;
}

}  // namespace
}  // namespace qjax
