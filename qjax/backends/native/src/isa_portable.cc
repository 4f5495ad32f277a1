// Plain C++ with the compiler's vectors, which any processor has in some form.
#include <string.h>

#include "kernels.h"

namespace qjax {
namespace {

struct V {
  static constexpr int kLanes = 4;
  static constexpr int kMostAccumulators = 8;
  typedef int32_t Reg __attribute__((vector_size(16)));

  static Reg load(const int32_t* from) {
    Reg x;
    memcpy(&x, from, sizeof(x));
    return x;
  }
  static void store(int32_t* to, Reg x) { memcpy(to, &x, sizeof(x)); }
  static Reg set(int32_t x) { return Reg{x, x, x, x}; }
  // Sums wrap, as accumulators do.
  static Reg add(Reg a, Reg b) {
    typedef uint32_t Unsigned __attribute__((vector_size(16)));
    return (Reg)((Unsigned)a + (Unsigned)b);
  }
  static Reg multiply(Reg a, Reg b) {
    typedef uint32_t Unsigned __attribute__((vector_size(16)));
    return (Reg)((Unsigned)a * (Unsigned)b);
  }
  template <class T>
  static Reg widen(const T* from) {
    return Reg{from[0], from[1], from[2], from[3]};
  }
  static Reg minimum(Reg a, Reg b) { return a < b ? a : b; }
  static Reg maximum(Reg a, Reg b) { return a > b ? a : b; }
  static Reg both(Reg a, Reg b) { return a & b; }
  static Reg right(Reg x, Reg count) { return x >> count; }
  static Reg sign(Reg x) { return x >> 31; }
  static Reg positive(Reg x) { return x > 0; }
  static int32_t shifted(int32_t a, int32_t b, int64_t more, int count) {
    return static_cast<int32_t>((static_cast<int64_t>(a) * b + more) >> count);
  }
  static Reg high_word(Reg x, Reg m) {
    return Reg{shifted(x[0], m[0], 0, 32), shifted(x[1], m[1], 0, 32),
               shifted(x[2], m[2], 0, 32), shifted(x[3], m[3], 0, 32)};
  }
  static Reg doubled_high(Reg x, Reg m) {
    constexpr int64_t nudge = int64_t{1} << 30;
    return Reg{shifted(x[0], m[0], nudge, 31), shifted(x[1], m[1], nudge, 31),
               shifted(x[2], m[2], nudge, 31), shifted(x[3], m[3], nudge, 31)};
  }
  template <class T>
  static void narrow(T* out, Reg x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(x[i]);
  }

  struct Pairs {
    struct Pair {
      Reg a, b;
    } low, high;
  };
  struct Halves {
    Reg first, second;
  };
  template <class T>
  static Halves halves(const T* from) {
    return {widen(from), widen(from + kLanes)};
  }
  static Pairs interleave(Halves a, Halves b) {
    return {{a.first, b.first}, {a.second, b.second}};
  }
  static int channel_of(int place) { return place; }
  template <class T>
  static void narrow_pair(T* out, Reg low, Reg high) {
    narrow(out, low, kLanes);
    narrow(out + kLanes, high, kLanes);
  }
};

struct Shorts {
  using Code = int16_t;
  using Weight = int16_t;
  using Operand = V::Pairs::Pair;
  static constexpr int kTaps = 2;

  static Operand broadcast(const Code* codes) {
    return {V::set(codes[0]), V::set(codes[1])};
  }
  template <class W>
  static Operand pairs(const W* w) {
    return {V::Reg{w[0], w[2], w[4], w[6]}, V::Reg{w[1], w[3], w[5], w[7]}};
  }
  static Operand weights(const Weight* from) { return pairs(from); }
  static Operand widened(const int8_t* from) { return pairs(from); }
  static V::Reg dot(V::Reg acc, Operand code, Operand weight) {
    return V::add(V::add(acc, V::multiply(code.a, weight.a)),
                  V::multiply(code.b, weight.b));
  }
};

}  // namespace
}  // namespace qjax

#include "tiles.h"
//
#include "wide.h"

namespace qjax {

const Kernels kPortable = {
    "portable", V::kLanes, 0, 0, Signs::kUnsigned, Shorts::kTaps, V::channel_of,
    nullptr, nullptr, run_shorts, run_narrow, run_depthwise, no_byte_depthwise,
    run_rows, run_stage, run_pair_sum, QJAX_WIDE, run_peak};

}  // namespace qjax
