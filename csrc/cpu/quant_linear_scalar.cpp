// Packed weights for any processor.
#include "isa_scalar.h"
// The loops need the lanes above.
#include "decode.h"
#include "fake_quant_loops.h"
#include "quant_linear_loops.h"

namespace dqw {
const LinearKernels linear_scalar = kLinearKernels;
}
