// The peaks of AVX2: float32 FMA, int8 products by maddubs, and reading memory.
#include <immintrin.h>

#include "kernels.h"

#define DQW_INLINE static inline __attribute__((always_inline))
#include "ceilings_loops.h"

namespace dqw {
namespace {

int64_t multiply_float(int64_t rounds, void* sink) {
    chains(
        _mm256_set1_ps(1e-3f), _mm256_set1_ps(0.5f),
        [](__m256 acc, __m256 a, __m256 b) { return _mm256_fmadd_ps(a, b, acc); }, rounds, sink);
    return rounds * kChains * 8 * 2;
}

// Products added in 16 bits, as the kernels do where levels are small. Assembly: equal
// products would be computed once for all chains, and GCC 12 spills the sums.
int64_t multiply_int8(int64_t rounds, void* sink) {
    chains(
        _mm256_set1_epi8(1), _mm256_set1_epi8(1),
        [](__m256i acc, __m256i a, __m256i b) {
            __m256i pairs;
            asm volatile("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
                         : "+x"(acc), "=&x"(pairs)
                         : "x"(a), "x"(b));
            return acc;
        },
        rounds, sink);
    return rounds * kChains * 32 * 2;
}

void read(const uint8_t* data, int64_t bytes, void* sink) {
    const auto load = [](const uint8_t* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    };
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (int64_t i = 0; i + 128 <= bytes; i += 128) {
        a = _mm256_xor_si256(a, load(data + i));
        b = _mm256_xor_si256(b, load(data + i + 32));
        c = _mm256_xor_si256(c, load(data + i + 64));
        d = _mm256_xor_si256(d, load(data + i + 96));
    }
    a = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sink), a);
}

}  // namespace

const CeilingKernels ceilings_avx2 = {multiply_float, multiply_int8, read, nullptr};

}  // namespace dqw
