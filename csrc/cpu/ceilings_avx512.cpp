// The peaks of AVX-512: float32 FMA, int8 vpdpbusd, and reading memory.
#include <immintrin.h>

#include "kernels.h"

#define DQW_INLINE static inline __attribute__((always_inline))
#include "ceilings_loops.h"

namespace dqw {
namespace {

int64_t multiply_float(int64_t rounds, void* sink) {
    chains(
        _mm512_set1_ps(1e-3f), _mm512_set1_ps(0.5f),
        [](__m512 acc, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, acc); }, rounds, sink);
    return rounds * kChains * 16 * 2;
}

int64_t multiply_int8(int64_t rounds, void* sink) {
    chains(
        _mm512_set1_epi8(1), _mm512_set1_epi8(1),
        [](__m512i acc, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(acc, a, b); }, rounds,
        sink);
    return rounds * kChains * 64 * 2;
}

void read(const uint8_t* data, int64_t bytes, void* sink) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (int64_t i = 0; i + 256 <= bytes; i += 256) {
        a = _mm512_xor_si512(a, _mm512_loadu_si512(data + i));
        b = _mm512_xor_si512(b, _mm512_loadu_si512(data + i + 64));
        c = _mm512_xor_si512(c, _mm512_loadu_si512(data + i + 128));
        d = _mm512_xor_si512(d, _mm512_loadu_si512(data + i + 192));
    }
    a = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
    _mm512_storeu_si512(sink, a);
}

}  // namespace

const CeilingKernels ceilings_avx512 = {multiply_float, multiply_int8, read, nullptr};

}  // namespace dqw
