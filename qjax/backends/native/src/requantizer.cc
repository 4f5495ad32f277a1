#include "requantizer.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <set>
#include <utility>

#include "rules.h"

namespace qjax {
namespace {

int trailing_zeros(int64_t x) { return x ? __builtin_ctzll(static_cast<uint64_t>(x)) : 63; }

constexpr size_t kMostCertified = 1024;
// Of accumulators about their zero point, for all forms but the exact one: a half of
// 2^29 may be added. TFLite's biases reach 2^30.
constexpr int64_t kMostReach = (int64_t{3} << 29) - 1;

// One channel, and the zero point of its codes.
struct Channel {
  int32_t multiplier, shift, zero_point;
};

// The largest magnitude of an accumulator about its zero point.
int64_t reach(Interval acc) { return std::max(std::llabs(acc.low), std::llabs(acc.high)); }

// Below half a step for all accumulators: such a channel gives its zero point. Dead
// channels of trained networks have shifts that no form has room for.
bool is_dead(Channel c, Rule rule, Interval acc) {
  const __int128 largest = static_cast<__int128>(reach(acc)) * std::llabs(c.multiplier);
  if (c.shift < 33) return false;
  const __int128 half = static_cast<__int128>(1) << (c.shift - 1);
  switch (rule) {
    case Rule::kTfliteDouble:  // Rounded to 31 bits first.
      return (largest + (1 << 30)) >> 31 < half >> 31;
    case Rule::kFloat32:  // Accumulator and product may both grow by a rounding.
      return largest <= half / 2;
    default:
      return largest < half;
  }
}

// The zero point joins the half, so each of three terms must stay below 2^29 or at it;
// the first, of accumulators within `kMostReach`, stays below 2^30.
bool may_be_high_word(Channel c) {
  return 33 <= c.shift && c.shift <= 62 &&
         std::llabs(c.zero_point) <= (int64_t{1} << 29) >> (c.shift - 32);
}

// `kHighWord` computes floor((acc * m + 2^(s - 1)) / 2^s): with s >= 33 the half is a
// multiple of 2^32, so it may join after the low word is gone. That is the rule of
// `kTfliteSingle`, and `kHalfEven` where no accumulator ties: a tie needs
// acc * m = 2^(s - 1) (mod 2^s), so |acc| >= 2^(s - 1 - v2(m)), as acc = 0 is none.
bool is_high_word(Channel c, Rule rule, Interval acc) {
  if (!may_be_high_word(c)) return false;
  if (rule == Rule::kTfliteSingle) return true;
  if (rule != Rule::kHalfEven) return false;
  if (c.multiplier == 0) return true;
  const int least = c.shift - 1 - trailing_zeros(c.multiplier);
  return least >= 0 && reach(acc) < (int64_t{1} << std::min(least, 62));
}

bool is_power(Channel c, Rule rule, Interval acc) {
  if (rule != Rule::kHalfEven || c.multiplier <= 0) return false;
  if (c.multiplier & (c.multiplier - 1)) return false;
  const int shift = c.shift - trailing_zeros(c.multiplier);
  if (shift < 0 || shift > 30) return false;
  const int64_t more = 1 + std::llabs(c.zero_point);
  return reach(acc) + more * (int64_t{1} << shift) <= INT32_MAX;
}

bool is_double(Channel c, Rule rule) {
  if (rule != Rule::kTfliteDouble || c.shift < 31 || c.shift > 61) return false;
  // |high| <= |acc| <= `kMostReach`, and half of the last step is added.
  const int64_t half = (int64_t{1} << (c.shift - 31)) >> 1;
  return half <= (int64_t{1} << 29);
}

bool holds(Form form, Channel c, Rule rule, Interval acc) {
  if (is_dead(c, rule, acc) && form != Form::kPower) {
    return std::llabs(c.zero_point) <= int64_t{1} << 28;
  }
  switch (form) {
    case Form::kHighWord:
      return is_high_word(c, rule, acc);
    case Form::kPower:
      return is_power(c, rule, acc);
    case Form::kDouble:
      return is_double(c, rule);
    default:
      return true;
  }
}

// Numbers of a form: multiplier, half, shift.
void numbers(Form form, Channel c, Rule rule, Interval acc, int32_t* multiplier,
             int32_t* half, int32_t* shift) {
  *multiplier = c.multiplier;
  *half = 0;
  *shift = c.shift;
  if (is_dead(c, rule, acc) && (form == Form::kHighWord || form == Form::kDouble)) {
    *multiplier = 0;
    *shift = form == Form::kHighWord ? 1 : 0;
    *half = form == Form::kHighWord ? 1 + 2 * c.zero_point : 0;
  } else if (form == Form::kHighWord) {
    *shift = c.shift - 32;
    *half = (int32_t{1} << (*shift - 1)) + c.zero_point * (int32_t{1} << *shift);
  } else if (form == Form::kPower) {
    *shift = c.shift - trailing_zeros(c.multiplier);
    *half = *shift ? (int32_t{1} << (*shift - 1)) - 1 : 0;
    *half += c.zero_point * (int32_t{1} << *shift);
    *multiplier = *shift ? 1 : 0;
  } else if (form == Form::kDouble) {
    *shift = c.shift - 31;
    *half = (int32_t{1} << *shift) >> 1;
  }
}

// Whether `kHighWord` gives the codes of a rule that it is not: both grow with the
// accumulator, so they are equal if they are on both sides of each of the rule's steps.
bool is_certified(Channel c, Rule rule, Interval acc, int32_t low, int32_t high) {
  if (!may_be_high_word(c) || c.multiplier < 0) return false;
  const auto code = [&](int64_t x) {
    return coded(rescaled(x, c.multiplier, c.shift, rule), c.zero_point, low, high);
  };
  const auto other = [&](int64_t x) {
    const int64_t half = int64_t{1} << (c.shift - 1);
    return coded((x * c.multiplier + half) >> c.shift, c.zero_point, low, high);
  };
  const int32_t first = code(acc.low), last = code(acc.high);
  constexpr int kMostSteps = 1024;
  if (last - first > kMostSteps) return false;
  if (other(acc.low) != first || other(acc.high) != last) return false;
  int64_t from = acc.low;
  for (int32_t step = first + 1; step <= last; ++step) {
    int64_t below = from, at = acc.high;  // code(below) < step <= code(at)
    while (at - below > 1) {
      const int64_t middle = below + (at - below) / 2;
      (code(middle) < step ? below : at) = middle;
    }
    if (other(below) >= step || other(at) < step) return false;
    from = below;
  }
  return true;
}

}  // namespace

const char* name_of(Form form) {
  switch (form) {
    case Form::kNone:
      return "accumulators";
    case Form::kExact:
      return "64 bits";
    case Form::kHighWord:
      return "high word";
    case Form::kPower:
      return "power of two";
    case Form::kDouble:
      return "double rounding";
  }
  return "";
}

void check_fits(Dtype dtype, int64_t low, int64_t high) {
  with_type(dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    check(low >= std::numeric_limits<T>::min() && high <= std::numeric_limits<T>::max(),
          "codes do not fit the type of their buffer");
  });
}

Requantizer::Requantizer(Words& words, int64_t channels, Interval acc)
    : channels_(channels) {
  multiplier_ = words.size();
  shift_ = words.size();
  input_zero_point_ = words.int32();
  zero_point_ = words.int32();
  low_ = words.int32();
  high_ = words.int32();
  check(low_ <= high_, "`low` must not be above `high`");
  rule_ = static_cast<Rule>(words.next(0, 3, "an unknown rule of rounding"));
  check(acc.low <= acc.high && acc.low >= INT32_MIN && acc.high <= INT32_MAX,
        "accumulators must fit 32 bits");
  acc_ = {acc.low - input_zero_point_, acc.high - input_zero_point_};
}

void Requantizer::check_type(Dtype dtype) const {
  if (is_none()) {
    check(dtype == Dtype::kInt32, "accumulators must be written as int32");
  } else {
    check_fits(dtype, low_, high_);
  }
}

void Requantizer::reserve(const Maker& maker, int64_t width) {
  width_ = width;
  place_ = maker.layout.reserve(
      static_cast<int64_t>(sizeof(PackedRequantizer)) + 12 * width);
}

void Requantizer::pack(const Constants& constants, uint8_t* packed,
                       const std::vector<int64_t>& order, bool is_exact) const {
  auto& head = *reinterpret_cast<PackedRequantizer*>(packed + place_);
  head = {Form::kNone, rule_,  input_zero_point_, zero_point_, low_, high_,
          static_cast<int32_t>(width_), channels_ == 1, 0};
  if (is_none()) return;
  const int32_t* multiplier = constants.at<int32_t>(multiplier_, channels_);
  const int32_t* shift = constants.at<int32_t>(shift_, channels_);
  head.form = Form::kExact;
  head.is_narrow = acc_.low >= -(int64_t{1} << 30) && acc_.high < (1 << 30) &&
                   std::llabs(zero_point_) < (1 << 30);
  // The steps must leave room for the zero point of codes.
  const bool has_room = reach(acc_) <= kMostReach && std::llabs(zero_point_) <= 1 << 29;
  for (int64_t c = 0; c < channels_; ++c) {
    check(0 <= shift[c] && shift[c] <= 62, "a shift must lie in 0 to 62");
  }
  if (has_room && !is_exact) {
    for (Form form : {Form::kHighWord, Form::kPower, Form::kDouble}) {
      bool all = true;
      std::set<std::pair<int32_t, int32_t>> known;
      for (int64_t c = 0; c < channels_ && all; ++c) {
        const Channel channel{multiplier[c], shift[c], zero_point_};
        if (holds(form, channel, rule_, acc_)) continue;
        // About .1 ms a channel; others than the first thousand take the exact form.
        const bool is_new = known.insert({multiplier[c], shift[c]}).second;
        all = form == Form::kHighWord && known.size() <= kMostCertified &&
              (!is_new || is_certified(channel, rule_, acc_, low_, high_));
      }
      if (all) {
        head.form = form;
        break;
      }
    }
  }
  if (head.form == Form::kHighWord || head.form == Form::kPower) head.zero_point = 0;
  auto* numbers_at = const_cast<int32_t*>(head.multiplier());
  for (int64_t i = 0; i < width_; ++i) {
    const int64_t c = order[static_cast<size_t>(i)];
    if (c < 0) {  // A place of no channel: any numbers that are no trouble.
      numbers_at[i] = numbers_at[i + width_] = numbers_at[i + 2 * width_] = 0;
      continue;
    }
    int32_t* const at = numbers_at + i;
    numbers(head.form, {multiplier[c], shift[c], zero_point_}, rule_, acc_, at,
            at + width_, at + 2 * width_);
  }
}

int32_t Requantizer::take_input_zero_point(uint8_t* packed) const {
  auto& head = *reinterpret_cast<PackedRequantizer*>(packed + place_);
  if (head.form == Form::kNone || head.form == Form::kExact) return 0;
  return std::exchange(head.input_zero_point, 0);
}

}  // namespace qjax
