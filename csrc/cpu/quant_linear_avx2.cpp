// Packed weights for AVX2.
#include "isa_avx2.h"
// The loops need the lanes above.
#include "decode.h"
#include "fake_quant_loops.h"
#include "quant_linear_loops.h"

namespace dqw {
const LinearKernels linear_avx2 = kLinearKernels;
}
