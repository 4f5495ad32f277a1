// What each instruction set has: kernels behind plain functions.
//
// The files isa_*.cc are compiled with flags of their own. They include this file, whose
// functions are always inlined, and rules.h and tiles.h, all in unnamed namespaces, and
// nothing of the standard library that is compiled into them: else the linker could take
// one set's copy of a function for all.
#pragma once

#include <cstdint>

#define QJAX_INLINE inline __attribute__((always_inline))

namespace qjax {

// How accumulators become codes; the numbers are in `PackedRequantizer`.
//
// All forms give clip(r + zero_point, low, high), r of (acc - input_zero_point):
enum class Form : int32_t {
  kNone,      // The accumulator itself.
  kExact,     // Any rule in 64 bits, by the reference formula.
  kHighWord,  // (((acc * m) >> 32) + 2^(s - 33)) >> (s - 32): halves up, s >= 33.
  kPower,     // acc / 2^s, halves to even, in 32 bits.
  kDouble,    // TFLite's double rounding, s >= 31, |acc| < 3 * 2^29.
};

enum class Rule : int32_t { kHalfEven, kTfliteDouble, kTfliteSingle, kFloat32 };

// The head of packed numbers; the arrays of `width` integers each follow: multiplier,
// half (what is added before the shift), shift. `kHighWord` and `kPower` have the zero
// point of codes in their half. Those of products have that of accumulators in the bias,
// but for `kExact`.
struct alignas(64) PackedRequantizer {
  Form form;
  Rule rule;
  int32_t input_zero_point, zero_point, low, high;
  int32_t width;  // Channels, filled up to whole registers twice over.
  int32_t is_single;  // All channels have the first one's numbers.
  int32_t is_narrow;  // Products of accumulators and multipliers have 61 bits.

  QJAX_INLINE const int32_t* multiplier() const {
    return reinterpret_cast<const int32_t*>(this + 1);
  }
  QJAX_INLINE const int32_t* half() const { return multiplier() + width; }
  QJAX_INLINE const int32_t* shift() const { return half() + width; }
};

// One product for one group of channels and one example.
//
//   acc[d, h, w, o] = bias[o] + sum over runs r and k of
//       codes[d * plane + h * row + w * pixel + runs[r] + k] * weights[r, k, o]
//
// A run is a contiguous stretch of codes. Weights are in panels of one register's
// outputs: [panel][run][k / taps][output][taps].
struct Tiles {
  const void* codes;
  const int64_t* runs;
  int64_t n_runs, run_steps;  // Steps: run length / taps, rounded up.
  int64_t plane, row, pixel;  // In codes.
  int64_t depth, height, width;
  const void* weights;
  int64_t panel;  // In weights.
  bool is_signed;  // Whether codes are, of bytes.
  int64_t outputs;
  const int32_t* bias;  // Filled up to whole panels.
  const PackedRequantizer* requantizer;
  int64_t first;  // Place of the first output among the requantizer's channels.
  void* out;
  int64_t out_dtype;
  int64_t out_plane, out_row, out_pixel, out_channel;  // In elements.
};

// One depthwise product: each channel has one output. Where pixels follow each other,
// `channels` may be those of several, `pixels`, at once.
//
//   acc[d, h, w, c] = bias[c] + sum over t of
//       codes[d * plane + h * row + w * pixel + taps[t] + c] * weights[t, c]
//
// Weights come in pairs of taps: [block][pair][2 registers, 2 taps a lane].
struct Depthwise {
  const int16_t* codes;
  const int64_t* taps;
  int64_t n_pairs;
  int64_t plane, row, pixel;
  int64_t depth, height, width;
  const int16_t* weights;
  int64_t channels, pixels;
  const int32_t* bias;  // By block in the order of the lanes, as the requantizer's.
  const PackedRequantizer* requantizer;
  void* out;
  int64_t out_dtype;
  int64_t out_plane, out_row, out_pixel, out_channel;
};

// One depthwise product of unsigned bytes, for one register's outputs: channels, or those
// of a few pixels at once. Of 64 bytes from each place a run picks four taps an output.
//
//   acc[d, h, w, o] = bias[o] + sum over runs r and taps t of
//       codes[d * plane + h * row + w * pixel + runs[r] + picks[o, t]] * weights[r, o, t]
struct ByteDepthwise {
  const uint8_t* codes;
  const uint8_t* picks;
  const int64_t* runs;
  int64_t n_runs;
  int64_t plane, row, pixel;
  int64_t depth, height, width;
  const int8_t* weights;
  int64_t outputs, pixels;  // Outputs of all of these pixels.
  const int32_t* bias;
  const PackedRequantizer* requantizer;
  int64_t first;  // Place of the first output among the requantizer's channels.
  void* out;
  int64_t out_dtype;
  int64_t out_plane, out_row, out_pixel, out_channel;
};

// Rows of accumulators, the channels of a requantizer last.
struct Rows {
  const int32_t* in;
  int64_t rows, channels;
  const PackedRequantizer* requantizer;
  void* out;
  int64_t out_dtype;
};

// Sums of two products of bytes, each multiplier in two parts of 16 bits:
//
//   code = clip((hi + (lo >> 16)) >> shift, low, high), lo = a * lo_a + b * lo_b + lo_0
struct PairSum {
  const void *a, *b;
  bool is_a_signed, is_b_signed;
  int64_t n;
  int16_t lo_a, lo_b, hi_a, hi_b;
  int32_t lo_0, hi_0, shift, low, high;
  uint8_t* out;
};

// Terms of weighted sums: sums[i] (+)= (x[i] - zero_point) * multiplier. Rows and sums
// may be read and written up to a whole register.
struct Weighted {
  const int32_t* x;
  int64_t n;
  int32_t zero_point, multiplier;
  bool is_first;  // Sets the sums.
  int64_t* sums;
};

// Codes of sums: clip(sum / 2^shift + zero_point), halves to even; |sum| < 2^62.
struct Rounded {
  const int64_t* sums;
  int64_t n, shift;
  int32_t zero_point, low, high;
  int32_t* out;
};

// Normalisations of rows: the formula of qjax/graph/operations/normalisations.py.
struct NormRows {
  const void* in;
  void* out;
  int64_t in_dtype, out_dtype;
  int64_t rows, n, period;
  const int32_t* multiplier;  // [period, n]
  // Shifted, with half of the last step: [period, width]; of each register of 32 bits
  // the even places, then the odd ones.
  const int64_t* bias;
  int64_t width;
  bool is_centred;
  bool is_small;  // Codes are below 2^10 about their zero point.
  int32_t input_zero_point;
  int64_t epsilon, floor, point;
  int64_t fraction;  // Bits behind the point of normalised values.
  int64_t shift;
  int32_t zero_point, low, high;
  int32_t* scratch;  // [width]
};

// The same by what a mask keeps: `point` may be any, `scratch` is [2, width].
struct MaskedNormRows : NormRows {
  const void* mask;  // [mask_rows, n], again and again.
  int64_t mask_dtype, mask_rows;
  int64_t least_count;
};

// Codes of real values, or real values of codes: real = scale * (code - zero_point).
struct Reals {
  float* real;
  void* codes;
  int64_t dtype, n;
  int32_t zero_point, low, high;  // The ends of codes are below 2^22 about it.
  float scale, inverse;
};

constexpr int64_t kBytes = 256;

// Softmaxes of rows of bytes: the formula of qjax/graph/operations/normalisations.py.
struct SoftmaxRows {
  const uint8_t* in;
  const uint8_t* mask;  // Null, or 0 where a place is left out.
  int64_t mask_rows;    // After which the mask comes again.
  uint8_t* out;
  uint8_t flip;  // Makes unsigned bytes of codes: 128 or 0.
  int64_t rows, n;
  const uint32_t* table;  // Exponentials by distance, [kBytes].
  const uint8_t* planes;  // Their bytes, [4, kBytes], the lowest first.
  int64_t empty;          // Of a row without places: 0 all codes of 0, 1 all, 2 alike.
  uint64_t plus, multiplier;
  int64_t shift;
  int32_t zero_point, low, high;
  uint8_t* scratch;  // [n]
};

// Bytes for products: bytes again, or integers of 16 bits.
struct Staging {
  const void* from;
  bool is_signed;  // Of bytes that are widened.
  bool to_bytes;
  int32_t add;
  void* to;
  int64_t n;
};

// Bytes that codes of byte products may be; weights are signed.
enum class Signs { kUnsigned, kSigned, kBoth };

struct Kernels {
  const char* name;
  int lanes;       // Integers of 32 bits in a register.
  int byte_taps;   // Products of bytes that one lane sums in one instruction, or 0.
  int tile_steps;  // Such sums in one instruction: runs come in parts of so many, or 0.
  Signs signs;
  int short_taps;
  // Channel of a lane in a block of two registers, of depthwise products.
  int (*channel_of)(int place);
  void (*bytes)(const Tiles&);
  void (*few)(const Tiles&);  // Unsigned bytes of few rows, where another is faster.
  void (*shorts)(const Tiles&);
  void (*narrow)(const Tiles&);  // Codes of 16 bits, weights of 8.
  void (*depthwise)(const Depthwise&);
  // Of bytes, where the set and this processor have it, else null.
  void (*(*byte_depthwise)())(const ByteDepthwise&);
  void (*rows)(const Rows&);
  void (*stage)(const Staging&);
  void (*pair_sum)(const PairSum&);
  // Of the exact form, halves to even, where `is_narrow`.
  void (*exact_rows)(const Rows&);
  void (*weigh)(const Weighted&);
  void (*round)(const Rounded&);
  void (*norm)(const NormRows&);
  void (*masked_norm)(const MaskedNormRows&);
  void (*softmax)(const SoftmaxRows&);
  // out[i] = table[in[i]], `kBytes` of them.
  void (*look_up)(const uint8_t* table, const uint8_t* in, uint8_t* out, int64_t n);
  void (*quantize)(const Reals&);
  void (*dequantize)(const Reals&);
  // Adds up products from registers alone; returns how many.
  int64_t (*peak)(int64_t rounds);
};

// Steps of `taps` products that sum `length` of them: with a limit on the steps of one
// instruction in parts of one length.
QJAX_INLINE int64_t steps_of(int64_t length, int64_t taps, int64_t limit) {
  const int64_t steps = (length + taps - 1) / taps;
  if (!limit || !steps) return steps;
  const int64_t parts = (steps + limit - 1) / limit;
  return parts * ((length + taps * parts - 1) / (taps * parts));
}

extern const Kernels kPortable;
#ifdef QJAX_AVX2
extern const Kernels kAvx2;
#endif
#ifdef QJAX_AVX_VNNI
extern const Kernels kAvxVnni;
#endif
#ifdef QJAX_AVX512_VNNI
extern const Kernels kAvx512Vnni;
#endif
#ifdef QJAX_AMX_INT8
extern const Kernels kAmxInt8;
#endif
#ifdef QJAX_NEON_DOT
extern const Kernels kNeonDot;
#endif

// The set in use.
const Kernels& kernels();

}  // namespace qjax
