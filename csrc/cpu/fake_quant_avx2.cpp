// Fake quantization for AVX2.
#include "isa_avx2.h"
// The loops need the lanes above.
#include "fake_quant_loops.h"
#include "fake_quant_table.h"

namespace dqw {
const FakeQuantKernels fake_quant_avx2 = kFakeQuantKernels;
}
