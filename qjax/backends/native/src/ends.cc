#include "ends.h"

namespace qjax {
namespace {

// Kernels round steps from the zero point that are below 2^22.
constexpr int64_t kMostSteps = int64_t{1} << 21;

float float_of(int64_t bits) {
  const uint32_t own = static_cast<uint32_t>(bits);
  float found;
  std::memcpy(&found, &own, sizeof(found));
  return found;
}

}  // namespace

End::End(const Plan& plan, Buffer::Kind kind, int64_t place)
    : code_bytes_(plan.bytes_of(kind, place)) {}

End::End(Words& words, const Plan& plan, Buffer::Kind kind, int64_t place)
    : End(plan, kind, place) {
  is_real_ = words.flag();
  reals_.zero_point = words.int32();
  reals_.low = words.int32();
  reals_.high = words.int32();
  reals_.scale = float_of(words.next(0, UINT32_MAX, "a scale must have 32 bits"));
  reals_.inverse = float_of(words.next(0, UINT32_MAX, "a scale must have 32 bits"));
  if (!is_real_ || !code_bytes_) return;
  const int64_t zero_point = reals_.zero_point;
  const int64_t low = reals_.low - zero_point, high = reals_.high - zero_point;
  check(kind != Buffer::kInput ||
            (-kMostSteps <= low && low <= high && high <= kMostSteps),
        "codes of real values must lie near their zero point");
  const Dtype dtype = plan.end(kind, place).dtype;
  reals_.dtype = static_cast<int64_t>(dtype);
  reals_.n = code_bytes_ / size_of(dtype);
}

void End::quantize(const Kernels& set, const void* real, void* codes) const {
  Reals own = reals_;
  own.real = static_cast<float*>(const_cast<void*>(real));  // Kernels only read it.
  own.codes = codes;
  set.quantize(own);
}

void End::dequantize(const Kernels& set, const void* codes, void* real) const {
  Reals own = reals_;
  own.real = static_cast<float*>(real);
  own.codes = const_cast<void*>(codes);
  set.dequantize(own);
}

std::vector<End> ends_of(Words& words, const Plan& plan, Buffer::Kind kind) {
  const int64_t count = kind == Buffer::kInput ? plan.inputs() : plan.outputs();
  const bool has_words = words.left() > 0;
  std::vector<End> found;
  for (int64_t i = 0; i < count; ++i) {
    found.push_back(has_words ? End(words, plan, kind, i) : End(plan, kind, i));
  }
  return found;
}

}  // namespace qjax
