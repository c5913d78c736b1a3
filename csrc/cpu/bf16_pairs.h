// Two registers of floats as pairs of bfloat16. For files with the flags of AVX512_BF16, behind
// isa_avx512.h.
#pragma once

namespace dqw {
namespace {

// Lane i: a[i], then b[i].
DQW_INLINE i32 bf16_pairs(f32 a, f32 b) {
    const i32 order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                       23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (i32)_mm512_cvtne2ps_pbh(b, a));
}

}  // namespace
}  // namespace dqw
