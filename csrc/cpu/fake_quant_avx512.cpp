// Fake quantization for AVX-512.
#include "isa_avx512.h"
// The loops need the lanes above.
#include "fake_quant_loops.h"
#include "fake_quant_table.h"

namespace dqw {
const FakeQuantKernels fake_quant_avx512 = kFakeQuantKernels;
}
