// AVX2: two products of 16 bits a lane.
#include "avx2.h"
//
#include "tiles.h"
//
#include "wide.h"

namespace qjax {

const Kernels kAvx2 = {
    "avx2", V::kLanes, 0, 0, Signs::kUnsigned, Shorts::kTaps, V::channel_of,
    nullptr, nullptr, run_shorts, run_narrow, run_depthwise, no_byte_depthwise,
    run_rows, run_stage, run_pair_sum, QJAX_WIDE, run_peak};

}  // namespace qjax
