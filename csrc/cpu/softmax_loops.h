// The exponential and the softmax over the lanes of isa_*.h.
#pragma once

#include "whisper.h"

namespace dqw {
namespace {

// e^x, |error| below 2e-7 of it; below -87 what e^-87 is (1e-38, nothing beside a softmax's 1).
DQW_INLINE f32 exponential(f32 x) {
    x = min(max(x, all(-87.0f)), all(88.0f));
    const f32 n = round_even(mul(x, all(1.44269504f)));
    f32 r = fma(n, all(-0.693359375f), x);
    r = fma(n, all(2.12194440e-4f), r);
    f32 p = all(1.9875691500e-4f);
    p = fma(p, r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = add(fma(p, mul(r, r), r), all(1.0f));
    return mul(p, as_floats(shift_left_23(add_int(truncate(n), all_int(127)))));
}

DQW_INLINE int64_t round_up_to_16(int64_t n) { return (n + 15) / 16 * 16; }

// scores[0:n] to e^(score - largest), zeros up to a multiple of 16; returns their sum, NaN where a
// score was: max and exponential forget it.
DQW_INLINE float softmax(float* scores, int64_t n) {
    const int64_t end = round_up_to_16(n);
    for (int64_t i = n; i < end; i++) scores[i] = -__FLT_MAX__;
    f32 top = all(-__FLT_MAX__);
    for (int64_t i = 0; i < end; i += W) top = max(top, load(scores + i));
    const f32 shift = all(largest(top));
    f32 total = zero(), nan = zero();
    for (int64_t i = 0; i < end; i += W) {
        const f32 x = sub(load(scores + i), shift), e = exponential(x);
        store(scores + i, e);
        total = add(total, e);
        nan = add(nan, where_nan(x, x, zero()));
    }
    return sum(add(total, nan));  // what the padding adds, e^-87 each, is below float32's step
}

}  // namespace
}  // namespace dqw
