// Requantizers: the numbers of a node, packed in the cheapest form that is exact.
#pragma once

#include "kernels.h"
#include "plan.h"

namespace qjax {

// The interval of accumulators; forms are proven for it.
struct Interval {
  int64_t low, high;
};

class Requantizer {
 public:
  Requantizer() = default;
  // No rounding: accumulators stay.
  explicit Requantizer(int64_t channels) : channels_(channels) {}
  // Reads multiplier@ shift@ input_zero_point zero_point low high rule.
  Requantizer(Words& words, int64_t channels, Interval acc);

  // Packs; `order` gives the channel of each place, -1 for none. Its size is the width
  // that was asked for. `is_exact`: no form but the exact one will do.
  void pack(const Constants& constants, uint8_t* packed,
            const std::vector<int64_t>& order, bool is_exact = false) const;
  // Takes the zero point of accumulators, for a bias to hold; 0 where it must stay.
  int32_t take_input_zero_point(uint8_t* packed) const;
  const PackedRequantizer& in(const uint8_t* packed) const {
    return *reinterpret_cast<const PackedRequantizer*>(packed + place_);
  }
  const PackedRequantizer& in(const Memory& memory) const { return in(memory.packed); }
  // Makes place for an order of so many places.
  void reserve(const Maker& maker, int64_t width);
  bool is_none() const { return multiplier_ < 0; }
  // Checks that codes fit the type that they are written to.
  void check_type(Dtype dtype) const;

 private:
  int64_t channels_ = 0, place_ = 0, width_ = 0;
  int64_t multiplier_ = -1, shift_ = -1;
  int32_t input_zero_point_ = 0, zero_point_ = 0, low_ = 0, high_ = 0;
  Rule rule_ = Rule::kHalfEven;
  Interval acc_{INT32_MIN, INT32_MAX};
};

const char* name_of(Form form);
void check_fits(Dtype dtype, int64_t low, int64_t high);

}  // namespace qjax
