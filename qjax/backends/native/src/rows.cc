#include "rows.h"

namespace qjax {

void load(Dtype dtype, const uint8_t* from, int64_t at, int64_t stride, int64_t n,
          int32_t* to) {
  with_type(dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    const T* in = reinterpret_cast<const T*>(from) + at;
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<int32_t>(in[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<int32_t>(in[i * stride]);
    }
  });
}

void store(Dtype dtype, uint8_t* to, int64_t at, int64_t n, const int32_t* from) {
  with_type(dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    T* out = reinterpret_cast<T*>(to) + at;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(from[i]);
  });
}

}  // namespace qjax
