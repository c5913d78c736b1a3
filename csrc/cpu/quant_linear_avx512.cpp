// Packed weights for AVX-512.
#include "isa_avx512.h"
// The loops need the lanes above, and each other in this order.
#include "fake_quant_loops.h"
//
#include "decode.h"
//
#include "activation_loops.h"
//
#include "gemv_loops.h"
//
#include "block_loops.h"
//
#include "gemm_loops.h"

namespace dqw {
const LinearKernels linear_avx512 = kLinearKernels;
}
