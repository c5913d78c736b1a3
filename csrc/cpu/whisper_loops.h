// Layer norm, GELU and self-attention over the lanes of isa_*.h, and the table of all that
// Whisper's layers need. The file that includes this names CrossDot and kByteOffset.
#pragma once

#include "cross_attention_loops.h"
#include "encoder_attention_loops.h"

namespace dqw {
namespace {

// x (1 + erf(x / sqrt 2)) / 2 = max(x, 0) - |x| erfc(|x| / sqrt 2) / 2, with erfc by Abramowitz and
// Stegun 7.1.26: |error| below 1.5e-7, and no cancellation where x is far below 0.
DQW_INLINE f32 gelu(f32 x) {
    const f32 z = mul(absolute(x), all(0.70710678f));
    const f32 t = divide(all(1.0f), fma(z, all(0.3275911f), all(1.0f)));
    f32 p = all(1.061405429f);
    p = fma(p, t, all(-1.453152027f));
    p = fma(p, t, all(1.421413741f));
    p = fma(p, t, all(-0.284496736f));
    p = fma(p, t, all(0.254829592f));
    const f32 tail = mul(mul(p, t), exponential(mul(mul(z, z), all(-1.0f))));
    const f32 y = sub(max(x, zero()), mul(mul(absolute(x), all(0.5f)), tail));
    return where_nan(x, x, y);
}

void run_layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                    float* y) {
    f32 total = zero();
    for (int64_t i = 0; i < n; i += W) total = add(total, load(x + i));
    const f32 mean = all(sum(total) / (float)n);
    f32 square = zero();
    for (int64_t i = 0; i < n; i += W) {
        const f32 d = sub(load(x + i), mean);
        square = fma(d, d, square);
    }
    const f32 factor = all(1.0f / __builtin_sqrtf(sum(square) / (float)n + eps));
    for (int64_t i = 0; i < n; i += W) {
        const f32 d = mul(sub(load(x + i), mean), factor);
        store(y + i, fma(d, load(weight + i), load(bias + i)));
    }
}

void run_gelu(float* x, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(x + i, gelu(load(x + i)));
    float rest[W] = {};
    for (int64_t j = i; j < n; j++) rest[j - i] = x[j];
    if (i < n) store(rest, gelu(load(rest)));
    for (int64_t j = i; j < n; j++) x[j] = rest[j - i];
}

void run_add(float* x, const float* y, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(x + i, add(load(x + i), load(y + i)));
    for (; i < n; i++) x[i] += y[i];
}

void run_interleave(const float* a, const float* b, const float* c, int64_t n,
                    float* __restrict out) {
    for (int64_t i = 0; i < n; i++) {
        out[3 * i] = a[i];
        out[3 * i + 1] = b[i];
        out[3 * i + 2] = c[i];
    }
}

void run_self_attention(const SelfAttention& a) {
    for (int64_t t = 0; t < a.count; t++) {
        const float* key = a.keys + a.source[t] * a.row_stride + t * a.token_stride;
        f32 total = zero();
        for (int64_t i = 0; i < a.head_dim; i += W) {
            total = fma(load(a.query + i), load(key + i), total);
        }
        a.scores[t] = sum(total);
    }
    const f32 factor = all(1.0f / softmax(a.scores, a.count));
    for (int64_t i = 0; i < a.head_dim; i += W) {
        f32 even = zero(), odd = zero();
        const auto value = [&](int64_t t) {
            return load(a.values + a.source[t] * a.row_stride + t * a.token_stride + i);
        };
        int64_t t = 0;
        for (; t + 1 < a.count; t += 2) {
            even = fma(all(a.scores[t]), value(t), even);
            odd = fma(all(a.scores[t + 1]), value(t + 1), odd);
        }
        if (t < a.count) even = fma(all(a.scores[t]), value(t), even);
        store(a.out + i, mul(add(even, odd), factor));
    }
}

constexpr WhisperKernels kWhisperKernels = {
    .layer_norm = run_layer_norm,
    .gelu = run_gelu,
    .add = run_add,
    .interleave = run_interleave,
    .self_attention = run_self_attention,
    .pack_cross = run_pack_cross,
    .cross_attention = run_cross_attention,
};

}  // namespace
}  // namespace dqw
