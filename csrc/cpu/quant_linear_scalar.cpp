// Packed weights for any processor. Many rows of x are torch's matmul on the unpacked matrix: 1500
// x 512 -> 512 took 14 ms so and 60 ms (float) or 410 ms (int8) with the loops of gemm_loops.h.
#include "isa_scalar.h"
// The loops need the lanes above, and each other in this order.
#include "fake_quant_loops.h"
//
#include "decode.h"
//
#include "activation_loops.h"
//
#include "gemv_loops.h"

namespace dqw {

const LinearKernels linear_scalar = {
    .gemv_rows = kGemvRows,
    .int8_gemv_limit = kInt8GemvLimit,
    .float_gemv_limit = kFloatGemvLimit,
    .prepare_float = run_prepare_float,
    .prepare_int8 = run_prepare_int8,
    .quantize_rows = run_quantize_rows,
    .takes_planes = run_takes_planes,
    .planes_limit = kPlanesLimit,
    .gemv_float = run_gemv_float,
    .gemv_int8 = run_gemv_int8,
    .dequantize = run_dequantize,
    .levels = run_levels,
    .scale = scale_at,
};

}  // namespace dqw
