// AMX: products of tiles, 16 rows of 64 bytes by 16 outputs, in one instruction. What is
// no product of bytes runs as under AVX-512 VNNI.
#define QJAX_OWN_PEAK
#include "avx512.h"
//
#include "tiles.h"
//
#ifndef QJAX_SIMDE
#include "vbmi.h"
#endif
#include "byte_depthwise.h"
//
#include "wide.h"

namespace qjax {
namespace {

constexpr int64_t kTileRows = 16, kTileSteps = 16;  // Steps of four bytes.
// Tiles at once. Where they are done after few products, two: then their codes are made
// while the next are multiplied.
constexpr int64_t kMostTiles = 4, kFewProducts = 4;

// Tiles 0 to 3 are accumulators, 4 and 5 codes, 6 and 7 weights.
struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  Shapes(int64_t codes, int64_t steps) {
    for (int i = 0; i < 8; ++i) {
      bytes[i] = static_cast<uint16_t>(i / 2 == 2 ? 4 * steps : 64);
      rows[i] = static_cast<uint8_t>(i < 6 ? codes : steps);
    }
  }
};

// The intrinsic of GCC 12 claims to read 8 bytes, so the others may never be written.
QJAX_INLINE void configure_tiles(const Shapes& shapes) {
#ifdef QJAX_SIMDE
  configure(&shapes);
#else
  __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
#endif
}

// Tiles are named by literal numbers.
#define QJAX_MULTIPLY(acc, codes, weights)     \
  do {                                         \
    if constexpr (is_signed) {                 \
      _tile_dpbssd(acc, codes, weights);       \
    } else {                                   \
      _tile_dpbusd(acc, codes, weights);       \
    }                                          \
  } while (false)

// Weights that do not stay in the first cache are read without driving codes out of it.
#define QJAX_LOAD_WEIGHTS(tile, from)     \
  do {                                    \
    if constexpr (is_streamed) {          \
      _tile_stream_loadd(tile, from, 64); \
    } else {                              \
      _tile_loadd(tile, from, 64);        \
    }                                     \
  } while (false)

// Accumulates `M` tiles of rows times `N` of outputs, in tiles.
template <bool is_signed, bool is_streamed, int M, int N>
void accumulate(const Tiles& t, const uint8_t* const* from, int64_t steps,
                int64_t output) {
  const int32_t* bias = t.bias + output;
  const int8_t* w = static_cast<const int8_t*>(t.weights) + output / V::kLanes * t.panel;
  // The same row sixteen times.
  _tile_loadd(0, bias, 0);
  if constexpr (N == 2) {
    _tile_loadd(1, bias + V::kLanes, 0);
    if constexpr (M == 2) {
      _tile_loadd(2, bias, 0);
      _tile_loadd(3, bias + V::kLanes, 0);
    }
  } else {
    if constexpr (M > 1) _tile_loadd(1, bias, 0);
    if constexpr (M > 2) _tile_loadd(2, bias, 0);
    if constexpr (M > 3) _tile_loadd(3, bias, 0);
  }
  for (int64_t r = 0; r < t.n_runs; ++r) {
    for (int64_t k = 0; k < t.run_steps; k += steps, w += 64 * steps) {
      const int64_t at = t.runs[r] + 4 * k;
      QJAX_LOAD_WEIGHTS(6, w);
      _tile_loadd(4, from[0] + at, t.pixel);
      QJAX_MULTIPLY(0, 4, 6);
      if constexpr (N == 2) {
        QJAX_LOAD_WEIGHTS(7, w + t.panel);
        QJAX_MULTIPLY(1, 4, 7);
        if constexpr (M == 2) {
          _tile_loadd(5, from[1] + at, t.pixel);
          QJAX_MULTIPLY(2, 5, 6);
          QJAX_MULTIPLY(3, 5, 7);
        }
      } else {
        if constexpr (M > 1) {
          _tile_loadd(5, from[1] + at, t.pixel);
          QJAX_MULTIPLY(1, 5, 6);
        }
        if constexpr (M > 2) {
          _tile_loadd(4, from[2] + at, t.pixel);
          QJAX_MULTIPLY(2, 4, 6);
        }
        if constexpr (M > 3) {
          _tile_loadd(5, from[3] + at, t.pixel);
          QJAX_MULTIPLY(3, 5, 6);
        }
      }
    }
  }
}

// Stores them, `16 N` accumulators a row.
template <int N>
QJAX_INLINE void store_tiles(int64_t held, int32_t* wide) {
  constexpr int64_t size = kTileRows * V::kLanes * N, row = 64 * N;
  _tile_stored(0, wide, row);
  if constexpr (N == 2) {
    _tile_stored(1, wide + V::kLanes, row);
    if (held == 1) return;
    _tile_stored(2, wide + size, row);
    _tile_stored(3, wide + size + V::kLanes, row);
  } else {
    if (held > 1) _tile_stored(1, wide + size, row);
    if (held > 2) _tile_stored(2, wide + 2 * size, row);
    if (held > 3) _tile_stored(3, wide + 3 * size, row);
  }
}

// The rows of the tiles: 16 outputs in a row, or places of the codes that follow each
// other past the end of a row, whose outputs between two rows are left out.
struct Places {
  explicit Places(const Tiles& t) : t(t) {
    const int64_t across = (t.width + kTileRows - 1) / kTileRows;
    if (t.pixel > 0 && t.row >= t.width * t.pixel && t.row % t.pixel == 0) {
      const int64_t all = (t.height - 1) * (t.row / t.pixel) + t.width;
      if ((all + kTileRows - 1) / kTileRows < t.height * across) {
        line = t.row / t.pixel;
        count = all;
        lines = 1;
      }
    }
    tiles = (count + kTileRows - 1) / kTileRows;
    rows = least(count, kTileRows);
  }

  // Place of the first row of a tile; the last tile repeats rows of the one before.
  int64_t first(int64_t tile) const { return least(tile * kTileRows, count - rows); }

  const Tiles& t;
  int64_t line = t.width;   // Places of one row of outputs.
  int64_t count = t.width;  // Places that follow each other.
  int64_t lines = t.height;
  int64_t tiles, rows;
};

// Codes of one tile, 64 at a time.
template <Form form, class T, int N>
QJAX_INLINE void narrow_tile(const int32_t* wide, const Numbers* numbers,
                             const Ends& ends, V::Reg low, V::Reg high, uint8_t* out) {
  const auto of = [&](int64_t i) {
    const Numbers& n = numbers[i % N];
    const int32_t* acc = wide + i * V::kLanes;
    if constexpr (form == Form::kHighWord) {
      return V::right(V::add(V::high_word_of(acc, n.multiplier), n.half), n.shift);
    } else {
      return steps<form>(V::load(acc), n, ends);
    }
  };
  QJAX_UNROLL for (int64_t i = 0; i < kTileRows * N; i += 4) {
    const auto bytes = V::packed<T>(of(i), of(i + 1), of(i + 2), of(i + 3));
    _mm512_storeu_si512(out + 16 * i, V::clipped<T>(bytes, low, high));
  }
}

template <int n>
struct Count {
  static constexpr int value = n;
};

template <Form form, class T>
struct Products {
  // Codes of one byte side by side.
  static constexpr bool is_byte =
      sizeof(T) == 1 && form != Form::kNone && form != Form::kExact;

  static void run(const Tiles& t) {
    const Places places(t);
    const int64_t parts = (t.run_steps + kTileSteps - 1) / kTileSteps;
    const int64_t steps = parts ? t.run_steps / parts : 1;
    const Shapes shapes(places.rows, steps);
    configure_tiles(shapes);
    const int64_t panels = (t.outputs + V::kLanes - 1) / V::kLanes;
    int64_t done = 0;
    for (; done + 2 <= panels; done += 2) panel<2>(t, places, steps, done * V::kLanes);
    if (done < panels) panel<1>(t, places, steps, done * V::kLanes);
    _tile_release();
  }

  // Tiles that are computed at once: where their outputs begin.
  struct Group {
    int64_t held = 0;
    int64_t first[kMostTiles], begins[kMostTiles];
  };

  template <int N>
  static void panel(const Tiles& t, const Places& places, int64_t steps,
                    int64_t output) {
    const auto* codes = static_cast<const uint8_t*>(t.codes);
    const uint8_t* from[kMostTiles];
    const bool is_short = t.n_runs * t.run_steps <= kFewProducts * steps;
    const int64_t most = (is_short ? 2 : kMostTiles) / N;
    Group group, before;
    alignas(64) int32_t wide[kMostTiles * kTileRows * V::kLanes];
    const auto finish = [&] {
      for (int64_t i = 0; i < before.held; ++i) {
        finish_one<N>(t, places, wide + i * kTileRows * V::kLanes * N, before.first[i],
                      before.begins[i], output);
      }
    };
    // While tiles are multiplied, those before become codes.
    const auto flush = [&] {
      multiply<N>(t, from, group.held, steps, output);
      finish();
      store_tiles<N>(group.held, wide);
      before = group;
      group.held = 0;
    };
    for (int64_t d = 0; d < t.depth; ++d) {
      for (int64_t h = 0; h < places.lines; ++h) {
        for (int64_t i = 0; i < places.tiles; ++i) {
          const int64_t k = group.held++, first = places.first(i);
          group.first[k] = first;
          group.begins[k] = d * t.out_plane + h * t.out_row;
          from[k] = codes + d * t.plane + h * t.row + first * t.pixel;
          if (group.held == most) flush();
        }
      }
    }
    if (group.held) flush();
    finish();
  }

  template <int N>
  static void multiply(const Tiles& t, const uint8_t* const* from, int64_t held,
                       int64_t steps, int64_t output) {
    constexpr int64_t kStays = 16 << 10;
    if (t.panel * N > kStays) {
      t.is_signed ? run_as<true, true, N>(t, from, held, steps, output)
                  : run_as<false, true, N>(t, from, held, steps, output);
    } else {
      t.is_signed ? run_as<true, false, N>(t, from, held, steps, output)
                  : run_as<false, false, N>(t, from, held, steps, output);
    }
  }
  template <bool is_signed, bool is_streamed, int N>
  static void run_as(const Tiles& t, const uint8_t* const* from, int64_t held,
                     int64_t steps, int64_t output) {
    const auto of = [&](auto m) {
      accumulate<is_signed, is_streamed, decltype(m)::value, N>(t, from, steps, output);
    };
    if constexpr (N == 1) {
      if (held == 4) return of(Count<4>());
      if (held == 3) return of(Count<3>());
    }
    held == 2 ? of(Count<2>()) : of(Count<1>());
  }

  template <int N>
  static void finish_one(const Tiles& t, const Places& places, const int32_t* wide,
                         int64_t first, int64_t begins, int64_t output) {
    const PackedRequantizer& q = *t.requantizer;
    constexpr int64_t width = V::kLanes * N;
    alignas(64) uint8_t bytes[kTileRows * width];
    const bool is_fast = is_byte && t.out_channel == 1;
    const int64_t outputs = least(width, t.outputs - output);
    if constexpr (is_byte) {
      if (is_fast) {
        Numbers numbers[N];
        for (int i = 0; i < N; ++i) {
          numbers[i] = numbers_of(q, t.first + output + i * V::kLanes);
        }
        const bool is_whole = places.rows == kTileRows && outputs == width &&
                              t.out_pixel == width &&
                              first % places.line + kTileRows <= t.width;
        uint8_t* out = bytes;
        if (is_whole) out = static_cast<uint8_t*>(t.out) + place(t, places, first, begins);
        narrow_tile<form, T, N>(wide, numbers, Ends(q),
                                V::set_bytes(q.low), V::set_bytes(q.high), out);
        if (is_whole) return;
      }
    }
    // Stretches of outputs in one row.
    for (int64_t i = 0; i < places.rows;) {
      const int64_t column = (first + i) % places.line;
      const int64_t n = least(t.width - column, places.rows - i);
      if (n > 0) {
        const int64_t at = place(t, places, first + i, begins);
        if (is_fast) {
          copy<N>(t, bytes + i * width, n, outputs, at + output);
        } else {
          finish_tile<form, T>(t, Ends(q), wide + i * width, n, N, output, t.out, at);
        }
      }
      i += n > 0 ? n : least(places.line - column, places.rows - i);
    }
  }

  static int64_t place(const Tiles& t, const Places& places, int64_t i, int64_t begins) {
    return begins + i / places.line * t.out_row + i % places.line * t.out_pixel;
  }

  template <int N>
  static void copy(const Tiles& t, const uint8_t* from, int64_t n, int64_t outputs,
                   int64_t at) {
    uint8_t* out = static_cast<uint8_t*>(t.out) + at;
    const uint32_t mask = static_cast<uint32_t>((uint64_t{1} << outputs) - 1);
    for (int64_t i = 0; i < n; ++i, from += V::kLanes * N, out += t.out_pixel) {
      if constexpr (N == 1) {
        _mm_mask_storeu_epi8(out, static_cast<__mmask16>(mask),
                             _mm_load_si128(reinterpret_cast<const __m128i*>(from)));
      } else {
        _mm256_mask_storeu_epi8(
            out, mask, _mm256_load_si256(reinterpret_cast<const __m256i*>(from)));
      }
    }
  }
};

int64_t run_amx_peak(int64_t rounds) {
  const Shapes shapes(kTileRows, kTileSteps);
  configure_tiles(shapes);
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return rounds * kMostTiles * kTileRows * V::kLanes * 4 * kTileSteps;
}

void run_amx(const Tiles& t) { with_form<Products>(t); }

}  // namespace

const Kernels kAmxInt8 = {
    "amx_int8", V::kLanes, Bytes::kTaps, kTileSteps, Signs::kBoth, Shorts::kTaps, V::channel_of,
    run_amx, run_bytes, run_shorts, run_narrow, run_depthwise, byte_depthwise,
    run_rows, run_stage, run_pair_sum, QJAX_WIDE, run_amx_peak};

}  // namespace qjax
