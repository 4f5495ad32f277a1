// Inputs and outputs of a plan that are real values, on one grid for a whole array.
#pragma once

#include "kernels.h"
#include "plan.h"

namespace qjax {

// One input or output. Kernels read and write codes; those of real values are made for
// each example beside its arena, where they stay in the cache.
class End {
 public:
  // Words: whether it is real; zero point, least and largest code, and the bits of the
  // scale and of its inverse, float32.
  End(Words& words, const Plan& plan, Buffer::Kind kind, int64_t place);
  // Codes.
  End(const Plan& plan, Buffer::Kind kind, int64_t place);

  bool is_real() const { return is_real_; }
  // What a caller has of one example.
  int64_t bytes() const {
    return is_real_ ? reals_.n * static_cast<int64_t>(sizeof(float)) : code_bytes_;
  }
  // What the codes of one example take beside the arena.
  int64_t staged_bytes() const {
    return is_real_ ? up(code_bytes_ + kSlack, kAlignment) : 0;
  }
  void quantize(const Kernels& set, const void* real, void* codes) const;
  void dequantize(const Kernels& set, const void* codes, void* real) const;

 private:
  bool is_real_ = false;
  int64_t code_bytes_;
  Reals reals_{};
};

// All of one kind, in order; without words none is real.
std::vector<End> ends_of(Words& words, const Plan& plan, Buffer::Kind kind);

}  // namespace qjax
