// Codes of real values, and real values of codes, on one grid for a whole array.
#include "api.h"
#include "plan.h"

namespace qjax {
namespace {

// Adding it rounds numbers below 2^22 to integers, half to even.
constexpr float kRounder = 12582912.0f;
constexpr int64_t kMostSteps = int64_t{1} << 21;

bool has_type(const QjaxNativeGrid& grid) {
  return 0 <= grid.dtype && grid.dtype <= static_cast<int64_t>(Dtype::kInt32);
}

bool is_grid(const QjaxNativeGrid& grid) {
  const int64_t low = grid.low - grid.zero_point, high = grid.high - grid.zero_point;
  return -kMostSteps <= low && low <= high && high <= kMostSteps && has_type(grid);
}

template <class T>
void quantize(const QjaxNativeGrid& grid, const float* x, T* codes) {
  const float inverse = grid.inverse;
  const float low = static_cast<float>(grid.low - grid.zero_point);
  const float high = static_cast<float>(grid.high - grid.zero_point);
  const int32_t zero_point = static_cast<int32_t>(grid.zero_point);
  for (int64_t i = 0; i < grid.count; ++i) {
    float steps = x[i] * inverse;
    steps = steps == steps ? steps : 0.0f;
    // The ends are integers: clipped first, a number rounds to the same.
    steps = steps < low ? low : steps;
    steps = steps > high ? high : steps;
    const float whole = (steps + kRounder) - kRounder;
    codes[i] = static_cast<T>(static_cast<int32_t>(whole) + zero_point);
  }
}

template <class T>
void dequantize(const QjaxNativeGrid& grid, const T* codes, float* x) {
  const float zero = static_cast<float>(grid.zero_point), scale = grid.scale;
  for (int64_t i = 0; i < grid.count; ++i) x[i] = (static_cast<float>(codes[i]) - zero) * scale;
}

}  // namespace
}  // namespace qjax

extern "C" {

int qjax_native_quantize(const QjaxNativeGrid* grid, void** ends) {
  if (!qjax::is_grid(*grid)) return -1;
  qjax::find_data(ends, 2, grid->head);
  qjax::with_type(static_cast<qjax::Dtype>(grid->dtype), [&](auto* type) {
    using T = qjax::Pointee<decltype(type)>;
    qjax::quantize(*grid, static_cast<const float*>(ends[0]), static_cast<T*>(ends[1]));
  });
  return 0;
}

int qjax_native_dequantize(const QjaxNativeGrid* grid, void** ends) {
  if (!qjax::has_type(*grid)) return -1;
  qjax::find_data(ends, 2, grid->head);
  qjax::with_type(static_cast<qjax::Dtype>(grid->dtype), [&](auto* type) {
    using T = qjax::Pointee<decltype(type)>;
    qjax::dequantize(*grid, static_cast<const T*>(ends[0]),
                     static_cast<float*>(ends[1]));
  });
  return 0;
}
}
