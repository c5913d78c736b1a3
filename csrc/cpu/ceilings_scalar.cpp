// What plain C++ reaches with the processor's baseline: the ceilings of the scalar tier.
#include "kernels.h"

namespace dqw {
namespace {

constexpr int kLanes = 32;

int64_t multiply_float(int64_t rounds, void* sink) {
    float sum[kLanes] = {}, a = 1e-3f, b = 0.5f;
    for (int64_t r = 0; r < rounds; r++) {
        // Nothing is known about the factors from one round to the next.
        asm volatile("" : "+m"(a), "+m"(b));
        for (int i = 0; i < kLanes; i++) sum[i] = sum[i] * a + b;
    }
    __builtin_memcpy(sink, sum, 64);
    return rounds * kLanes * 2;
}

int64_t multiply_int8(int64_t rounds, void* sink) {
    int32_t sum[kLanes] = {};
    int8_t a[kLanes] = {}, b[kLanes] = {};
    for (int64_t r = 0; r < rounds; r++) {
        asm volatile("" : "+m"(a), "+m"(b));
        for (int i = 0; i < kLanes; i++) sum[i] += a[i] * b[i];
    }
    __builtin_memcpy(sink, sum, 64);
    return rounds * kLanes * 2;
}

void read(const uint8_t* data, int64_t bytes, void* sink) {
    uint64_t sum[8] = {};
    for (int64_t i = 0; i + 64 <= bytes; i += 64) {
        uint64_t words[8];
        __builtin_memcpy(words, data + i, 64);
        for (int j = 0; j < 8; j++) sum[j] ^= words[j];
    }
    __builtin_memcpy(sink, sum, 64);
}

}  // namespace

const CeilingKernels ceilings_scalar = {multiply_float, multiply_int8, read, nullptr};

}  // namespace dqw
