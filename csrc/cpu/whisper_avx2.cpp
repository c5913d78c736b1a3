// Whisper's layers on one instruction set.
#include "isa_avx2.h"
// The loops need the lanes above, and each other in this order.
#include "fake_quant_loops.h"
//
#include "decode.h"

namespace dqw {
namespace {
using CrossDot = Signed;  // of the int8 cross-attention cache, whose bytes carry this offset
constexpr int kByteOffset = 0;
}  // namespace
}  // namespace dqw

#include "whisper_loops.h"

namespace dqw {
const WhisperKernels whisper_avx2 = kWhisperKernels;
const EncoderAttention attention_avx2 = kEncoderAttention;
}  // namespace dqw
