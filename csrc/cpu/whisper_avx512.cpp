// Whisper's layers on one instruction set.
#include "isa_avx512.h"
// The loops need the lanes above, and each other in this order.
#include "fake_quant_loops.h"
//
#include "decode.h"

namespace dqw {
namespace {
using CrossDot = Offset128;  // of the int8 cross-attention cache, whose bytes carry this offset
constexpr int kByteOffset = 128;
}  // namespace
}  // namespace dqw

#include "whisper_loops.h"

namespace dqw {
const WhisperKernels whisper_avx512 = kWhisperKernels;
const EncoderAttention attention_avx512 = kEncoderAttention;
}  // namespace dqw
