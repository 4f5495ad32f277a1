// AVX-512 VNNI: four products of bytes a lane, in 512 bits.
#include "avx512.h"
//
#include "tiles.h"
//
#ifndef QJAX_SIMDE
#include "vbmi.h"
#endif
#include "byte_depthwise.h"
//
#include "wide.h"

namespace qjax {

const Kernels kAvx512Vnni = {
    "avx512_vnni", V::kLanes, Bytes::kTaps, 0, Signs::kUnsigned, Shorts::kTaps, V::channel_of,
    run_bytes, nullptr, run_shorts, run_narrow, run_depthwise, byte_depthwise,
    run_rows, run_stage, run_pair_sum, QJAX_WIDE, run_peak};

}  // namespace qjax
