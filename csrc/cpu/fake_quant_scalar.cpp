// Fake quantization for any processor.
#include "isa_scalar.h"
// The loops need the lanes above.
#include "fake_quant_loops.h"
#include "fake_quant_table.h"

namespace dqw {
const FakeQuantKernels fake_quant_scalar = kFakeQuantKernels;
}
