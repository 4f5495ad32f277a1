// Kernels over a vector type `V`, which one instruction set defines before it includes
// this file. All is in an unnamed namespace: each set has its own copy.
//
//   V::Reg, V::kLanes              int32 lanes, and how many
//   V::load, store, set, add, minimum, maximum, right (by a register)
//   V::high_word(acc, m)           (acc * m) >> 32
//   V::doubled_high(acc, m)        (acc * m + 2^30) >> 31
//   V::sign(x)                     -1 where x < 0, else 0
//   V::positive(x)                 -1 where x > 0, else 0
//   V::both(x, y)                  bits that both have
//   V::narrow(out, x, n)           stores n lanes as out's type, which holds them
//   Bytes, Shorts                  Code, Weight, kTaps, broadcast, weights, dot
//   Shorts::widened(from)          weights that are stored as bytes
//   V::multiply(x, y)              low 32 bits
//   V::halves(from)                2 * kLanes integers of 8 or 16 bits, as 16
//   V::interleave(a, b)            two such operands, pair by pair, in two
//   V::narrow_pair(out, low, high) stores codes that two such operands gave, in order
//   V::channel_of(place)           channel of a lane of the two
//   V::kMostAccumulators           registers that a tile may have
#include "kernels.h"
#include "rules.h"

#if defined(__clang__)
#define QJAX_UNROLL _Pragma("unroll")
#else
#define QJAX_UNROLL _Pragma("GCC unroll 32")
#endif

namespace qjax {
namespace {

// Weights of 8 bits stay bytes in memory and are widened on their way to a register:
// half of what must be read, which bounds a product of few rows.
struct Narrow {
  using Code = Shorts::Code;
  using Weight = int8_t;
  using Operand = Shorts::Operand;
  static constexpr int kTaps = Shorts::kTaps;

  static auto broadcast(const Code* codes) { return Shorts::broadcast(codes); }
  static Operand weights(const Weight* from) { return Shorts::widened(from); }
  static V::Reg dot(V::Reg acc, Operand code, Operand weight) {
    return Shorts::dot(acc, code, weight);
  }
};

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Numbers of one register's channels.
struct Numbers {
  V::Reg multiplier, half, shift;
};

QJAX_INLINE Numbers numbers_of(const PackedRequantizer& q, int64_t channel) {
  return {V::load(q.multiplier() + channel), V::load(q.half() + channel),
          V::load(q.shift() + channel)};
}

template <Form form>
QJAX_INLINE V::Reg rounded(V::Reg acc, const Numbers& n) {
  if constexpr (form == Form::kHighWord) {
    return V::right(V::add(V::high_word(acc, n.multiplier), n.half), n.shift);
  } else if constexpr (form == Form::kPower) {
    // `half` is 2^(s - 1) - 1 and the zero point, `multiplier` 1; 0 without a shift.
    const V::Reg odd = V::both(V::right(acc, n.shift), n.multiplier);
    return V::right(V::add(V::add(acc, n.half), odd), n.shift);
  } else {
    // Halves away from zero; `half` is 0 where there is no shift, and masks the sign.
    const V::Reg high = V::doubled_high(acc, n.multiplier);
    const V::Reg down = V::both(V::sign(high), V::positive(n.half));
    return V::right(V::add(V::add(high, n.half), down), n.shift);
  }
}

// What all channels share.
struct Ends {
  V::Reg input_zero_point, zero_point, low, high;

  explicit QJAX_INLINE Ends(const PackedRequantizer& q)
      : input_zero_point(V::set(static_cast<int32_t>(
            0u - static_cast<uint32_t>(q.input_zero_point)))),
        zero_point(V::set(q.zero_point)),
        low(V::set(q.low)),
        high(V::set(q.high)) {}
};

// Codes before they are clipped, of accumulators about 0.
template <Form form>
QJAX_INLINE V::Reg steps(V::Reg acc, const Numbers& n, const Ends& ends) {
  const V::Reg found = rounded<form>(acc, n);
  return form == Form::kDouble ? V::add(found, ends.zero_point) : found;
}

template <Form form>
QJAX_INLINE V::Reg codes(V::Reg acc, const Numbers& n, const Ends& ends) {
  return V::minimum(V::maximum(steps<form>(acc, n, ends), ends.low), ends.high);
}

// Codes of one accumulator by the reference formula.
QJAX_INLINE int32_t code_of(int32_t acc, const PackedRequantizer& q, int64_t channel) {
  const int64_t steps =
      rescaled(static_cast<int64_t>(acc) - q.input_zero_point,
               q.multiplier()[channel], q.shift()[channel], q.rule);
  return coded(steps, q.zero_point, q.low, q.high);
}

template <class T>
QJAX_INLINE void scatter(T* out, const int32_t* from, int64_t n, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) out[i * stride] = static_cast<T>(from[i]);
}

// Stores one register of accumulators as codes, n of them.
template <Form form, class T>
QJAX_INLINE void finish(V::Reg acc, const PackedRequantizer& q, const Ends& ends,
                        int64_t channel, T* out, int64_t n, int64_t stride) {
  if constexpr (form == Form::kNone || form == Form::kExact) {
    if (form == Form::kNone && stride == 1) return V::narrow(out, acc, n);
    alignas(64) int32_t wide[V::kLanes];
    V::store(wide, acc);
    if constexpr (form == Form::kExact) {
      for (int64_t i = 0; i < n; ++i) wide[i] = code_of(wide[i], q, channel + i);
    }
    scatter(out, wide, n, stride);
  } else {
    const V::Reg code = codes<form>(acc, numbers_of(q, channel), ends);
    if (stride == 1) {
      V::narrow(out, code, n);
    } else {
      alignas(64) int32_t wide[V::kLanes];
      V::store(wide, code);
      scatter(out, wide, n, stride);
    }
  }
}

constexpr int kMostPixels = 16;

// `MR` pixels in a row times `NZ` registers of outputs. `is_direct`: codes of one byte,
// side by side, by the high word, go from the registers to where they belong. Else
// accumulators go to `wide`, `kLanes * NZ` a pixel.
template <class Mode, bool is_direct, int MR, int NZ>
__attribute__((noinline)) void tile(const Tiles& t, const Ends& ends,
                                    const typename Mode::Code* codes_from,
                                    int64_t output, uint8_t* out, int32_t* wide) {
  using Weight = typename Mode::Weight;
  const int64_t pixel = t.pixel, panel = t.panel;
  const Weight* w = static_cast<const Weight*>(t.weights) + output / V::kLanes * panel;
  typename V::Reg acc[MR][NZ];
  QJAX_UNROLL for (int z = 0; z < NZ; ++z) {
    const auto bias = V::load(t.bias + output + z * V::kLanes);
    QJAX_UNROLL for (int p = 0; p < MR; ++p) acc[p][z] = bias;
  }
  for (int64_t r = 0; r < t.n_runs; ++r) {
    const typename Mode::Code* a = codes_from + t.runs[r];
    for (int64_t k = 0; k < t.run_steps; ++k) {
      typename Mode::Operand weights[NZ];
      QJAX_UNROLL for (int z = 0; z < NZ; ++z) weights[z] = Mode::weights(w + z * panel);
      QJAX_UNROLL for (int p = 0; p < MR; ++p) {
        const auto code = Mode::broadcast(a + p * pixel);
        QJAX_UNROLL for (int z = 0; z < NZ; ++z) {
          acc[p][z] = Mode::dot(acc[p][z], code, weights[z]);
        }
      }
      a += Mode::kTaps;
      w += V::kLanes * Mode::kTaps;
    }
  }
  QJAX_UNROLL for (int z = 0; z < NZ; ++z) {
    const int64_t o = output + z * V::kLanes;
    if constexpr (is_direct) {
      const int64_t n = least(V::kLanes, t.outputs - o);
      const Numbers numbers = numbers_of(*t.requantizer, t.first + o);
      QJAX_UNROLL for (int p = 0; p < MR; ++p) {
        const auto code = codes<Form::kHighWord>(acc[p][z], numbers, ends);
        V::narrow(out + p * t.out_pixel + o, code, n);
      }
    } else {
      QJAX_UNROLL for (int p = 0; p < MR; ++p) {
        V::store(wide + (p * NZ + z) * V::kLanes, acc[p][z]);
      }
    }
  }
}

template <class Mode>
using Tile = void (*)(const Tiles&, const Ends&, const typename Mode::Code*, int64_t,
                      uint8_t*, int32_t*);

// The tiles with `NZ` registers, by number of pixels.
template <class Mode, bool is_direct, int NZ>
QJAX_INLINE Tile<Mode> pick(int64_t pixels) {
  constexpr int most = V::kMostAccumulators / NZ;
  switch (pixels <= most ? pixels : 0) {
#define QJAX_TILE(M) \
  case M:            \
    return tile<Mode, is_direct, (M <= most ? M : 1), NZ>;
    QJAX_TILE(1)
    QJAX_TILE(2)
    QJAX_TILE(3)
    QJAX_TILE(4)
    QJAX_TILE(6)
    QJAX_TILE(8)
    QJAX_TILE(12)
    QJAX_TILE(16)
#undef QJAX_TILE
    default:
      return nullptr;
  }
}

// The number of pixels for a row of `width`: the largest tile that there is, or the
// next that leaves no rest.
template <class Mode, bool is_direct, int NZ>
QJAX_INLINE int64_t pixels_of(int64_t width) {
  constexpr int64_t limit = V::kMostAccumulators / NZ;
  int64_t most = least(least(limit, kMostPixels), width);
  while (!pick<Mode, is_direct, NZ>(most)) --most;
  for (int64_t n = most; 2 * n > most; --n) {
    if (width % n == 0 && pick<Mode, is_direct, NZ>(n)) return n;
  }
  return most;
}

// Turns accumulators of a tile into codes.
using Finish = void (*)(const Tiles&, const Ends&, const int32_t* wide, int64_t pixels,
                        int64_t registers, int64_t output, void* out, int64_t place);

template <Form form, class T>
void finish_tile(const Tiles& t, const Ends& ends, const int32_t* wide, int64_t pixels,
                 int64_t registers, int64_t output, void* out, int64_t place) {
  for (int64_t p = 0; p < pixels; ++p) {
    T* to = static_cast<T*>(out) + place + p * t.out_pixel;
    for (int64_t z = 0; z < registers; ++z, wide += V::kLanes) {
      const int64_t o = output + z * V::kLanes;
      finish<form>(V::load(wide), *t.requantizer, ends, t.first + o,
                   to + o * t.out_channel, least(V::kLanes, t.outputs - o),
                   t.out_channel);
    }
  }
}

template <class Mode, bool is_direct, int NZ>
void panels(const Tiles& t, const Ends& ends, int64_t output, Finish finish) {
  using Code = typename Mode::Code;
  alignas(64) int32_t wide[V::kMostAccumulators * V::kLanes];
  const int64_t most = pixels_of<Mode, is_direct, NZ>(t.width);
  for (int64_t d = 0; d < t.depth; ++d) {
    for (int64_t h = 0; h < t.height; ++h) {
      const Code* from = static_cast<const Code*>(t.codes) + d * t.plane + h * t.row;
      const int64_t place = d * t.out_plane + h * t.out_row;
      int64_t pixels = most;
      for (int64_t w = 0; w < t.width; w += pixels) {
        pixels = least(pixels, t.width - w);
        Tile<Mode> own = nullptr;
        while (!(own = pick<Mode, is_direct, NZ>(pixels))) --pixels;
        const int64_t at = place + w * t.out_pixel;
        uint8_t* bytes = is_direct ? static_cast<uint8_t*>(t.out) + at : nullptr;
        own(t, ends, from + w * t.pixel, output, bytes, wide);
        if constexpr (!is_direct) finish(t, ends, wide, pixels, NZ, output, t.out, at);
      }
    }
  }
}

template <class Mode, bool is_direct>
void all_panels(const Tiles& t, Finish finish) {
  const Ends ends(*t.requantizer);
  const int64_t registers = (t.outputs + V::kLanes - 1) / V::kLanes;
  int64_t done = 0;
  while (done < registers) {
    const int64_t left = registers - done, output = done * V::kLanes;
    if (left >= 4 && V::kMostAccumulators >= 24) {
      panels<Mode, is_direct, 4>(t, ends, output, finish);
      done += 4;
    } else if (left >= 2) {
      panels<Mode, is_direct, 2>(t, ends, output, finish);
      done += 2;
    } else {
      panels<Mode, is_direct, 1>(t, ends, output, finish);
      done += 1;
    }
  }
}

// Calls `Of<form, T>::run` for a form and a type of codes.
template <template <Form, class> class Of, class Work, class... Modes>
void with_form(const Work& work, Modes... modes) {
#define QJAX_TYPES(F)                                \
  switch (work.out_dtype) {                          \
    case 0:                                          \
      return Of<F, int8_t>::run(work, modes...);     \
    case 1:                                          \
      return Of<F, uint8_t>::run(work, modes...);    \
    case 2:                                          \
      return Of<F, int16_t>::run(work, modes...);    \
    case 3:                                          \
      return Of<F, uint16_t>::run(work, modes...);   \
    default:                                         \
      return Of<F, int32_t>::run(work, modes...);    \
  }
  switch (work.requantizer->form) {
    case Form::kNone:
      return Of<Form::kNone, int32_t>::run(work, modes...);
    case Form::kExact:
      QJAX_TYPES(Form::kExact)
    case Form::kHighWord:
      QJAX_TYPES(Form::kHighWord)
    case Form::kPower:
      QJAX_TYPES(Form::kPower)
    case Form::kDouble:
      QJAX_TYPES(Form::kDouble)
  }
#undef QJAX_TYPES
}

template <Form form, class T>
struct TilesAs {
  template <class Mode>
  static void run(const Tiles& t, Mode) {
    // Kernels of 16 bits are rare: they have the general tiles alone.
    constexpr bool may_be_direct = form == Form::kHighWord && sizeof(T) == 1 &&
                                   sizeof(typename Mode::Weight) == 1;
    if (may_be_direct && t.out_channel == 1) {
      all_panels<Mode, may_be_direct>(t, nullptr);
    } else {
      all_panels<Mode, false>(t, finish_tile<form, T>);
    }
  }
};

// The exact form takes its zero point itself, in 64 bits.
template <Form form>
QJAX_INLINE V::Reg about(V::Reg acc, const Ends& ends) {
  return form == Form::kExact ? acc : V::add(acc, ends.input_zero_point);
}

template <Form form, class T>
struct CodeRows {
  static void run(const Rows& r) {
    const PackedRequantizer& q = *r.requantizer;
    const Ends ends(q);
    T* out = static_cast<T*>(r.out);
    const int32_t* in = r.in;
    for (int64_t row = 0; row < r.rows; ++row, in += r.channels, out += r.channels) {
      int64_t c = 0;
      for (; c + V::kLanes <= r.channels; c += V::kLanes) {
        const int64_t place = q.is_single ? 0 : c;
        finish<form>(about<form>(V::load(in + c), ends), q, ends, place, out + c,
                     V::kLanes, 1);
      }
      if (c < r.channels) {
        alignas(64) int32_t rest[V::kLanes] = {};
        for (int64_t i = 0; c + i < r.channels; ++i) rest[i] = in[c + i];
        const int64_t place = q.is_single ? 0 : c;
        finish<form>(about<form>(V::load(rest), ends), q, ends, place, out + c,
                     r.channels - c, 1);
      }
    }
  }
};

#ifdef QJAX_HAS_BYTES
void run_bytes(const Tiles& t) { with_form<TilesAs>(t, Bytes()); }
#endif
void run_shorts(const Tiles& t) { with_form<TilesAs>(t, Shorts()); }
void run_narrow(const Tiles& t) { with_form<TilesAs>(t, Narrow()); }
void run_rows(const Rows& r) { with_form<CodeRows>(r); }

template <class A, class B>
void pair_sum(const PairSum& p) {
  constexpr int64_t block = 2 * V::kLanes;
  const int16_t parts[2][2] = {{p.lo_a, p.lo_b}, {p.hi_a, p.hi_b}};
  const auto lo = Shorts::broadcast(parts[0]), hi = Shorts::broadcast(parts[1]);
  const V::Reg lo_0 = V::set(p.lo_0), hi_0 = V::set(p.hi_0), half_word = V::set(16);
  const V::Reg low = V::set(p.low), high = V::set(p.high), shift = V::set(p.shift);
  const auto code = [&](Shorts::Operand pair) {
    const V::Reg rest = V::right(Shorts::dot(lo_0, pair, lo), half_word);
    const V::Reg steps = V::right(V::add(Shorts::dot(hi_0, pair, hi), rest), shift);
    return V::minimum(V::maximum(steps, low), high);
  };
  const A* a = static_cast<const A*>(p.a);
  const B* b = static_cast<const B*>(p.b);
  const auto pair = [&](const A* x, const B* y, uint8_t* out) {
    const auto pairs = V::interleave(V::halves(x), V::halves(y));
    V::narrow_pair(out, code(pairs.low), code(pairs.high));
  };
  int64_t i = 0;
  for (; i + block <= p.n; i += block) pair(a + i, b + i, p.out + i);
  if (i < p.n) {
    A x[block] = {};
    B y[block] = {};
    uint8_t out[block];
    for (int64_t k = 0; i + k < p.n; ++k) {
      x[k] = a[i + k];
      y[k] = b[i + k];
    }
    pair(x, y, out);
    for (int64_t k = 0; i + k < p.n; ++k) p.out[i + k] = out[k];
  }
}

void run_pair_sum(const PairSum& p) {
  if (p.is_a_signed) {
    return p.is_b_signed ? pair_sum<int8_t, int8_t>(p) : pair_sum<int8_t, uint8_t>(p);
  }
  return p.is_b_signed ? pair_sum<uint8_t, int8_t>(p) : pair_sum<uint8_t, uint8_t>(p);
}

// Widens bytes, or moves them to or from 128; `add` is what is added to each.
template <class From, class To>
QJAX_INLINE void stage_as(const void* from, int32_t add, void* to, int64_t n) {
  const From* x = static_cast<const From*>(from);
  To* out = static_cast<To*>(to);
  const To more = static_cast<To>(add);
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<To>(x[i] + more);
}

void run_stage(const Staging& s) {
  if (s.to_bytes) return stage_as<uint8_t, uint8_t>(s.from, s.add, s.to, s.n);
  if (s.is_signed) return stage_as<int8_t, int16_t>(s.from, s.add, s.to, s.n);
  stage_as<uint8_t, int16_t>(s.from, s.add, s.to, s.n);
}

}  // namespace
}  // namespace qjax

#include "depthwise.h"
