// Packed weights for AVX-512.
#include "isa_avx512.h"
// The loops need the lanes above.
#include "decode.h"
#include "fake_quant_loops.h"
#include "quant_linear_loops.h"

namespace dqw {
const LinearKernels linear_avx512 = kLinearKernels;
}
