// The peak of vdpbf16ps, which not every AVX-512 processor has: a file and flags of its own.
#include <immintrin.h>

#include "kernels.h"

#define DQW_INLINE static inline __attribute__((always_inline))
#include "ceilings_loops.h"

namespace dqw {

int64_t multiply_bf16_avx512(int64_t rounds, void* sink) {
    const __m512i ones = _mm512_set1_epi32(0x3c003c00);
    chains(
        _mm512_castsi512_ps(ones), _mm512_castsi512_ps(ones),
        [](__m512 acc, __m512 a, __m512 b) {
            return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
        },
        rounds, sink);
    return rounds * kChains * 32 * 2;
}

}  // namespace dqw
