"""Functions of integers in C, of which a source holds those that it calls."""

SOURCE = """
/* x / 2^shift, half to even. */
static int64_t NAME_round(int64_t x, int shift) {
  int64_t quotient, rest, half;
  if (shift == 0) return x;
  quotient = x >= 0 ? x >> shift : ~(~x >> shift);
  rest = x - quotient * ((int64_t)1 << shift);
  half = (int64_t)1 << (shift - 1);
  return quotient + (rest > half || (rest == half && (quotient & 1) != 0));
}

/* x / 2^shift, halves up. */
static int64_t NAME_up(int64_t x, int shift) {
  if (shift == 0) return x;
  x += (int64_t)1 << (shift - 1);
  return x >= 0 ? x >> shift : ~(~x >> shift);
}

/* An integer rounded to 24 bits, half to even, as float32 holds it. */
static int64_t NAME_float(int64_t x) {
  uint64_t size = x < 0 ? (uint64_t)0 - (uint64_t)x : (uint64_t)x, rest, half;
  int shift = 0;
  while ((size >> shift) >= ((uint64_t)1 << 24)) ++shift;
  if (shift == 0) return x;
  half = (uint64_t)1 << (shift - 1);
  rest = size & (2 * half - 1);
  size >>= shift;
  size += rest > half || (rest == half && (size & 1) != 0);
  return x < 0 ? -(int64_t)(size << shift) : (int64_t)(size << shift);
}

/* x / 2^n, halves away from zero. */
static int64_t NAME_divide(int64_t x, int n) {
  const int64_t rest = ((int64_t)1 << n) - 1;
  const int64_t quotient = x >= 0 ? x >> n : ~(~x >> n);
  const int64_t left = x - quotient * ((int64_t)1 << n);
  return quotient + (left > (rest >> 1) + (x < 0));
}

/* a * b / 2^31, halves up, by a nudge; saturates. */
static int64_t NAME_high(int64_t a, int64_t b) {
  const int64_t product = a * b;
  const int64_t nudge = product >= 0 ? (int64_t)1 << 30 : 1 - ((int64_t)1 << 30);
  const int64_t found = (product + nudge) / ((int64_t)1 << 31);
  return found > INT32_MAX ? INT32_MAX : found;
}

/* acc * multiplier / 2^shift, rounded once. */
static int64_t NAME_single(int64_t acc, int64_t multiplier, int shift) {
  const int64_t x = acc * multiplier + (shift ? (int64_t)1 << (shift - 1) : 0);
  return x >= 0 ? x >> shift : ~(~x >> shift);
}

/* acc * multiplier / 2^shift, rounded twice. */
static int64_t NAME_double(int64_t acc, int64_t multiplier, int shift) {
  const int left = shift < 31 ? 31 - shift : 0;
  const uint32_t bits = (uint32_t)((uint64_t)acc << left);
  const int64_t wrapped = bits > INT32_MAX ? (int64_t)bits - ((int64_t)1 << 32) : bits;
  return NAME_divide(NAME_high(wrapped, multiplier), shift > 31 ? shift - 31 : 0);
}

/* 1 / (1 + x / 2^31) for x from 0 to 2^31 - 1, by three of Newton's steps. */
static int64_t NAME_newton(int64_t x) {
  const int64_t total = x + INT32_MAX;
  const int64_t half = (total + (total >= 0 ? 1 : -1)) / 2;
  int64_t y = 1515870810 + NAME_high(half, -1010580540);
  int k;
  for (k = 0; k < 3; ++k) {
    const int64_t step = NAME_high(y, ((int64_t)1 << 29) - NAME_high(half, y)) * 4;
    y += step < INT32_MIN ? INT32_MIN : step > INT32_MAX ? INT32_MAX : step;
  }
  y *= 2;
  return y < INT32_MIN ? INT32_MIN : y > INT32_MAX ? INT32_MAX : y;
}

static int64_t NAME_clip(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

/* log(x / 2^19), 26 bits after the point, x from 2^19 to 2^31 - 1. */
static int64_t NAME_log(int64_t x) {
  const int64_t below = NAME_high(x, 1518500250), quarter = 1 << 23;
  int64_t a, b, q, square, power, other_power, middle, above, under;
  int own = 0, other = -1;
  while ((x << own) < ((int64_t)1 << 31)) ++own;
  while ((below << (other + 1)) < ((int64_t)1 << 31)) ++other;
  a = NAME_high(x << (own - 1), 1518500250) * 2;
  b = x << other;
  a = a < b ? a : b;
  if (a > INT32_MAX) a = INT32_MAX;
  power = (12 - own) * ((int64_t)1 << 25) + quarter;
  other_power = (12 - other) * ((int64_t)1 << 25) - quarter;
  if (power < other_power) power = other_power;
  middle = (a + 1805811301 + 1) / 2;
  q = (a - 1805811301) * 2;
  square = NAME_high(q, q);
  above = NAME_high(q, a) + NAME_high(NAME_high(q, square), 117049297);
  under = NAME_high(middle, 1057819769 + q + NAME_high(127690142, square));
  under = NAME_newton(under + NAME_high(638450708, q));
  return (NAME_high(power, 1488522236) + NAME_high(NAME_divide(above, 6), under)) * 2;
}

/* 1 / sqrt(x), times 2^(31 + shift): five of Newton's steps. */
static int64_t NAME_inverse(int64_t x, int *shift) {
  int64_t half, y = 1 << 28;
  int pairs = 0, k;
  *shift = 0;
  if (x <= 1) return INT32_MAX;
  *shift = 11;
  if (x >= 1 << 29) {
    x >>= 2;
    ++*shift;
  }
  while ((x << (2 * pairs)) < 1 << 27) ++pairs;
  *shift -= pairs;
  x = (x << (2 * pairs)) >> 1;
  half = (x + 1) / 2;
  for (k = 0; k < 5; ++k) {
    const int64_t cube = NAME_clip(NAME_high(NAME_high(y, y), y) * 64, INT32_MIN,
                                   INT32_MAX);
    y = (NAME_high(y, 3 << 27) - NAME_high(half, cube)) * 8;
    y = NAME_clip(y, INT32_MIN, INT32_MAX);
  }
  y = NAME_high(y, 1518500250);
  if (*shift < 0) {
    y *= (int64_t)1 << -*shift;
    *shift = 0;
  }
  return y;
}

static int32_t NAME_least(int32_t x, int32_t most) {
  return x < most ? x : most;
}

/* 2^30 / sqrt(x), up to the shift: five of Newton's steps. */
static int64_t NAME_root(uint64_t x, int *down) {
  uint64_t a, root;
  int length = 0, up, k;
  while (length < 64 && (x >> length) != 0) ++length;
  up = (62 - length) / 2 * 2;
  a = (x << up) >> 30;
  root = UINT64_C(2362232013) - ((UINT64_C(1395864371) * a) >> 32);
  for (k = 0; k < 5; ++k)
    root = (root * (((uint64_t)3 << 30) - ((((root * root) >> 30) * a) >> 32))) >> 31;
  *down = 60 - up / 2;
  return (int64_t)(root >> 1);
}

static uint64_t NAME_moved(uint64_t x, int up) {
  return up >= 0 ? x << (up < 63 ? up : 63) : x >> (up > -63 ? -up : 63);
}

/* A sum of squares and what is added to it, whose point is given, in 61 bits, and half
   of the bits behind their point. */
static uint64_t NAME_added(uint64_t squares, uint64_t epsilon, uint64_t floor,
                           int point, int *half) {
  const uint64_t most = epsilon > floor ? epsilon : floor;
  int own = 0, other = 0, up;
  while (own < 64 && (squares >> own) != 0) ++own;
  while (other < 64 && (most >> other) != 0) ++other;
  up = (own > other - point ? 64 - own : 64 - other + point) - 3;
  *half = (up - (up % 2 + 2) % 2) / 2;
  up = 2 * *half;
  squares = NAME_moved(squares, up) + NAME_moved(epsilon, up - point);
  floor = NAME_moved(floor, up - point);
  if (squares < floor) squares = floor;
  return squares > 0 ? squares : 1;
}

/* x / 2^down in 30 bits and an exponent. */
static int64_t NAME_held(int64_t x, int down, int *exponent) {
  const uint64_t size = (uint64_t)(x < 0 ? -x : x);
  int length = 0;
  while (length < 64 && (size >> length) != 0) ++length;
  *exponent = (int)NAME_clip(length - 30 - down, 0, 62);
  down += *exponent;
  x = down > 0 ? NAME_up(x, down < 62 ? down : 62) : x * ((int64_t)1 << -down);
  return NAME_clip(x, -1073741823, 1073741823);
}

/* Codes of a value that has an exponent, before their zero point. */
static int64_t NAME_far(int64_t t, int exponent, int64_t factor, int64_t bias,
                        int shift) {
  int less = exponent < shift ? exponent : shift;
  bias = bias >= 0 ? bias >> less : ~(~bias >> less);
  return NAME_up(t * factor + bias, shift > exponent ? shift - exponent : 0);
}

typedef struct {
  uint64_t reciprocal;
  int length;
} NAME_share;

/* round(2^(31 + length) / total), of a sum of `length` bits. */
static NAME_share NAME_reciprocal(uint64_t total) {
  NAME_share found = {0, 0};
  uint64_t rest, quotient;
  int k;
  while (found.length < 64 && (total >> found.length) != 0) ++found.length;
  rest = (uint64_t)1 << (found.length - 1);
  quotient = rest >= total;
  rest -= quotient * total;
  for (k = 0; k < 33; ++k) {
    rest <<= 1;
    quotient <<= 1;
    if (rest >= total) {
      rest -= total;
      quotient |= 1;
    }
  }
  found.reciprocal = (quotient + 1) / 2;
  if (found.reciprocal > UINT64_C(0xffffffff)) found.reciprocal = UINT64_C(0xffffffff);
  return found;
}

/* 2^30 times a part of a sum. */
static int64_t NAME_part(NAME_share share, uint64_t e) {
  uint64_t half = (uint64_t)1 << share.length;
  return (int64_t)((e * share.reciprocal + half) >> (share.length + 1));
}

/* 2^26 * log(total / one), of a unit of `length` bits, by the series of a quotient. */
static int64_t NAME_logarithm(uint64_t total, int length) {
  uint64_t a, z, series = 0;
  int own = 0, k;
  while (own < 64 && (total >> own) != 0) ++own;
  a = own < 32 ? total << (32 - own) : total >> (own - 32);
  z = ((a - ((uint64_t)1 << 31)) << 31) / (a + ((uint64_t)1 << 31));
  for (k = 19; k > 0; k -= 2) {
    const uint64_t n = (uint64_t)k;
    series = (((uint64_t)1 << 32) + n) / (2 * n) + ((((z * z) >> 31) * series) >> 31);
  }
  return ((own - length) * INT64_C(762123384786) + (int64_t)(((z * series) >> 30) << 9)
          + (1 << 13)) >> 14;
}

/* An integer of some bits, as two's complement has it. */
static int64_t NAME_wrap(int64_t x, int bits) {
  const uint64_t mask = ((uint64_t)1 << bits) - 1, own = (uint64_t)x & mask;
  return (own >> (bits - 1)) != 0 ? (int64_t)own - (int64_t)mask - 1 : (int64_t)own;
}

static int64_t NAME_left(int64_t x, int64_t by, int bits) {
  return by >= 0 && by < bits ? x * ((int64_t)1 << by) : 0;
}

static int64_t NAME_right(int64_t x, int64_t by, int bits) {
  const int64_t shift = by >= 0 && by < bits ? by : 62;
  return x >= 0 ? x >> shift : ~(~x >> shift);
}

static int64_t NAME_logical(int64_t x, int64_t by, int bits) {
  const uint64_t own = (uint64_t)x & (((uint64_t)1 << bits) - 1);
  return by >= 0 && by < bits ? (int64_t)(own >> by) : 0;
}

/* The sign of a * 2^up - b. */
static int NAME_order(int64_t a, int64_t b, int up) {
  const int64_t whole = b >= 0 ? b >> up : ~(~b >> up);
  if (a != whole) return a > whole ? 1 : -1;
  return b - whole * ((int64_t)1 << up) > 0 ? -1 : 0;
}
"""
