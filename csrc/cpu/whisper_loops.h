// Layer norm, GELU, softmax and attention over the lanes of isa_*.h. The file that includes this
// names CrossDot and kByteOffset.
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

DQW_INLINE int64_t round_up_to_16(int64_t n) { return (n + 15) / 16 * 16; }

// scores[0:n] to e^(score - largest), zeros up to a multiple of 16; returns their sum.
DQW_INLINE float softmax(float* scores, int64_t n) {
    const int64_t end = round_up_to_16(n);
    for (int64_t i = n; i < end; i++) scores[i] = -__FLT_MAX__;
    f32 top = all(-__FLT_MAX__);
    for (int64_t i = 0; i < end; i += W) top = max(top, load(scores + i));
    const f32 shift = all(largest(top));
    f32 total = zero();
    for (int64_t i = 0; i < end; i += W) {
        const f32 e = exponential(sub(load(scores + i), shift));
        store(scores + i, e);
        total = add(total, e);
    }
    return sum(total);  // what the padding adds, e^-87 each, is below float32's step
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

// ---- cross-attention ----

// acc + the four products of bytes in each lane; w with the tier's offset, q signed.
DQW_INLINE i32 dot(i32 acc, i32 w, i32 q) { return CrossDot::dot(acc, w, q); }

// A row of n floats to bytes with a scale; unsigned with the tier's offset. Returns the scale.
DQW_INLINE float quantize_row(const float* x, int64_t n, int8_t* q) {
    const RowRange range = row_range<Type::f32>(x, 0, n);
    for (int64_t i = 0; i < n; i += W) {
        const f32 v = round_activation(load(x + i), range.inv);
        int8_t part[W];
        store_bytes(part, truncate(v));
        for (int j = 0; j < W; j++) q[i + j] = (int8_t)(part[j] + kByteOffset);
    }
    return range.scale;
}

void pack_cross_int8(const CrossHead& h, const float* keys, const float* values, int64_t stride) {
    uint8_t* k = h.data;
    uint8_t* v = k + h.padded * h.head_dim;
    float* scales = (float*)(v + h.padded * h.head_dim);
    int8_t row[256];
    for (int64_t t = 0; t < h.padded; t++) {
        uint8_t* block = k + t / W * W * h.head_dim + t % W * 4;
        uint8_t* quad = v + t / 4 * 4 * h.head_dim + t % 4;
        const bool there = t < h.positions;
        scales[t] = there ? quantize_row(keys + t * stride, h.head_dim, row) : 0.0f;
        for (int64_t i = 0; i < h.head_dim; i += 4) {
            for (int j = 0; j < 4; j++) {
                block[i * W + j] = there ? (uint8_t)row[i + j] : (uint8_t)kByteOffset;
            }
        }
        scales[h.padded + t] = there ? quantize_row(values + t * stride, h.head_dim, row) : 0.0f;
        for (int64_t i = 0; i < h.head_dim; i++) {
            quad[i * 4] = there ? (uint8_t)row[i] : (uint8_t)kByteOffset;
        }
    }
}

template <Type T>
void pack_cross_float(const CrossHead& h, const float* keys, const float* values, int64_t stride) {
    constexpr int64_t size = T == Type::f32 ? 4 : 2;
    uint8_t* v = h.data + h.padded * h.head_dim * size;
    for (int64_t t = 0; t < h.padded; t += W) {
        for (int64_t i = 0; i < h.head_dim; i++) {
            float lane[W];
            for (int64_t j = 0; j < W; j++) {
                lane[j] = t + j < h.positions ? keys[(t + j) * stride + i] : 0.0f;
            }
            write<T>(h.data, (t * h.head_dim + i * W), load(lane));
        }
    }
    for (int64_t t = 0; t < h.padded; t++) {
        for (int64_t i = 0; i < h.head_dim; i += W) {
            const f32 x = t < h.positions ? load(values + t * stride + i) : zero();
            write<T>(v, t * h.head_dim + i, x);
        }
    }
}

void run_pack_cross(const CrossHead& h, const float* keys, const float* values, int64_t stride) {
    if (h.type == CrossType::int8) return pack_cross_int8(h, keys, values, stride);
    if (h.type == CrossType::bf16) return pack_cross_float<Type::bf16>(h, keys, values, stride);
    pack_cross_float<Type::f32>(h, keys, values, stride);
}

// n floats in two bytes each: x = scale * (128 * high + low), high in -127…127, low in -64…63 (in
// 0…127 for x >= 0 throughout, where high is 0…127, too). Their error is 1 / 32512 of the largest.
struct TwoPlanes {
    float scale;
    int32_t high_sum, low_sum;
};
DQW_INLINE TwoPlanes two_planes(const float* x, int64_t n, int8_t* high, int8_t* low) {
    f32 top = zero();
    for (int64_t i = 0; i < n; i += W) top = max(top, absolute(load(x + i)));
    const float most = largest(top);
    const f32 inv = all(most > 1e-30f ? 16256.0f / most : 0.0f);
    i32 high_sum = all_int(0), low_sum = all_int(0);
    for (int64_t i = 0; i < n; i += W) {
        const f32 whole = round_even(mul(load(x + i), inv));
        const f32 h = round_even(mul(whole, all(1.0f / 128.0f)));
        const i32 upper = truncate(h), lower = truncate(fma(h, all(-128.0f), whole));
        store_bytes(high + i, upper);
        store_bytes(low + i, lower);
        high_sum = add_int(high_sum, upper);
        low_sum = add_int(low_sum, lower);
    }
    return {most / 16256.0f, sum_int(high_sum), sum_int(low_sum)};
}
DQW_INLINE i32 unit(const int8_t* q) {
    int32_t four;
    __builtin_memcpy(&four, q, 4);
    return all_int(four);
}
DQW_INLINE f32 join(i32 high, i32 low) { return fma(to_float(high), all(128.0f), to_float(low)); }

// out[i0 … i0 + N W] of the sum over positions of probability times value.
template <int N>
DQW_INLINE void sum_values_int8(const CrossHead& h, const uint8_t* values, const int8_t* high,
                                const int8_t* low, const TwoPlanes& p, int64_t i0, float factor,
                                float* out) {
    i32 upper[N], lower[N];
    unroll<N>([&](auto j) {
        upper[j.value] = all_int(-kByteOffset * p.high_sum);
        lower[j.value] = all_int(-kByteOffset * p.low_sum);
    });
    for (int64_t t = 0; t < h.padded; t += 4) {
        const i32 a = unit(high + t), b = unit(low + t);
        const uint8_t* at = values + t * h.head_dim + i0 * 4;
        unroll<N>([&](auto j) {
            const i32 v = load_int(at + j.value * 4 * W);
            upper[j.value] = dot(upper[j.value], v, a);
            lower[j.value] = dot(lower[j.value], v, b);
        });
    }
    unroll<N>([&](auto j) {
        store(out + i0 + j.value * W, mul(join(upper[j.value], lower[j.value]), all(factor)));
    });
}

void cross_attention_int8(const CrossAttention& a) {
    const CrossHead& h = a.head;
    const uint8_t* values = h.data + h.padded * h.head_dim;
    const float* scales = (const float*)(values + h.padded * h.head_dim);
    int8_t* high = a.bytes;
    int8_t* low = a.bytes + h.padded + h.head_dim;
    const TwoPlanes q = two_planes(a.query, h.head_dim, high, low);
    for (int64_t t = 0; t < h.padded; t += W) {
        i32 upper[2] = {all_int(-kByteOffset * q.high_sum), all_int(0)};
        i32 lower[2] = {all_int(-kByteOffset * q.low_sum), all_int(0)};
        const uint8_t* block = h.data + t * h.head_dim;
        for (int64_t i = 0; i < h.head_dim; i += 8) {
            unroll<2>([&](auto j) {
                const int64_t at = i + 4 * j.value;
                const i32 k = load_int(block + at * W);
                upper[j.value] = dot(upper[j.value], k, unit(high + at));
                lower[j.value] = dot(lower[j.value], k, unit(low + at));
            });
        }
        const f32 total = join(add_int(upper[0], upper[1]), add_int(lower[0], lower[1]));
        store(a.scores + t, mul(total, mul(all(q.scale), load(scales + t))));
    }
    const float total = softmax(a.scores, h.positions);
    for (int64_t t = 0; t < h.padded; t += W) {
        store(a.scores + t, mul(load(a.scores + t), load(scales + h.padded + t)));
    }
    const TwoPlanes p = two_planes(a.scores, h.padded, high, low);
    const float factor = p.scale / total;
    int64_t i = 0;
    for (; i + 4 * W <= h.head_dim; i += 4 * W) {
        sum_values_int8<4>(h, values, high, low, p, i, factor, a.out);
    }
    for (; i < h.head_dim; i += W) {
        sum_values_int8<1>(h, values, high, low, p, i, factor, a.out);
    }
}

template <Type T, int N>
DQW_INLINE void sum_values(const CrossHead& h, const uint8_t* values, const float* p, int64_t i0,
                           float factor, float* out) {
    f32 even[N], odd[N];
    unroll<N>([&](auto j) { even[j.value] = odd[j.value] = zero(); });
    for (int64_t t = 0; t < h.padded; t += 2) {
        const f32 a = all(p[t]), b = all(p[t + 1]);
        const int64_t at = t * h.head_dim + i0;
        unroll<N>([&](auto j) {
            const int64_t k = at + j.value * W;
            even[j.value] = fma(a, read<T>(values, k), even[j.value]);
            odd[j.value] = fma(b, read<T>(values, k + h.head_dim), odd[j.value]);
        });
    }
    unroll<N>([&](auto j) {
        store(out + i0 + j.value * W, mul(add(even[j.value], odd[j.value]), all(factor)));
    });
}

template <Type T>
void cross_attention_float(const CrossAttention& a) {
    const CrossHead& h = a.head;
    const uint8_t* values = h.data + h.padded * h.head_dim * (T == Type::f32 ? 4 : 2);
    for (int64_t t = 0; t < h.padded; t += W) {
        f32 part[4] = {zero(), zero(), zero(), zero()};
        for (int64_t i = 0; i < h.head_dim; i += 4) {
            unroll<4>([&](auto j) {
                const f32 k = read<T>(h.data, t * h.head_dim + (i + j.value) * W);
                part[j.value] = fma(k, all(a.query[i + j.value]), part[j.value]);
            });
        }
        store(a.scores + t, add(add(part[0], part[1]), add(part[2], part[3])));
    }
    const float factor = 1.0f / softmax(a.scores, h.positions);
    int64_t i = 0;
    for (; i + 4 * W <= h.head_dim; i += 4 * W) {
        sum_values<T, 4>(h, values, a.scores, i, factor, a.out);
    }
    for (; i < h.head_dim; i += W) sum_values<T, 1>(h, values, a.scores, i, factor, a.out);
}

void run_cross_attention(const CrossAttention& a) {
    if (a.head.type == CrossType::int8) return cross_attention_int8(a);
    if (a.head.type == CrossType::bf16) return cross_attention_float<Type::bf16>(a);
    cross_attention_float<Type::f32>(a);
}

// ---- the encoder's attention ----

constexpr int kQueryRows = W == 16 ? 12 : 6;  // register block: so many queries, two registers

// c (M, N W) = or += a (M, depth) b (depth, N W): rows of a and c have strides, b is dense.
template <int M, int N>
DQW_INLINE void multiply(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c,
                         int64_t c_stride, bool more) {
    f32 acc[M][N];
    unroll<M * N>([&](auto i) {
        constexpr int m = i.value / N, n = i.value % N;
        acc[m][n] = more ? load(c + m * c_stride + n * W) : zero();
    });
    for (int64_t d = 0; d < depth; d++) {
        f32 right[N];
        unroll<N>([&](auto n) { right[n.value] = load(b + d * N * W + n.value * W); });
        unroll<M>([&](auto m) {
            const f32 left = all(a[m.value * a_stride + d]);
            unroll<N>([&](auto n) {
                acc[m.value][n.value] = fma(left, right[n.value], acc[m.value][n.value]);
            });
        });
    }
    unroll<M * N>([&](auto i) {
        constexpr int m = i.value / N, n = i.value % N;
        store(c + m * c_stride + n * W, acc[m][n]);
    });
}

template <int N>
void multiply_rows(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c,
                   int64_t c_stride, bool more, int64_t rows) {
    int64_t r = 0;
    for (; r + kQueryRows <= rows; r += kQueryRows) {
        multiply<kQueryRows, N>(a + r * a_stride, a_stride, b, depth, c + r * c_stride, c_stride,
                                more);
    }
    for (; r < rows; r++) {
        multiply<1, N>(a + r * a_stride, a_stride, b, depth, c + r * c_stride, c_stride, more);
    }
}

// Keys in strips of 2 W positions: (head_dim, 2 W); values in strips of columns: (padded, width).
DQW_INLINE int64_t value_strip(int64_t head_dim) { return head_dim % (2 * W) == 0 ? 2 * W : W; }

void run_pack_head(const EncoderHead& h) {
    for (int64_t t = 0; t < h.padded; t++) {
        float* key = h.keys + t / (2 * W) * 2 * W * h.head_dim + t % (2 * W);
        const float* from = h.k + t * h.stride;
        for (int64_t i = 0; i < h.head_dim; i++) {
            key[i * 2 * W] = t < h.positions ? from[i] : 0.0f;
        }
    }
    const int64_t strip = value_strip(h.head_dim);
    for (int64_t i = 0; i < h.head_dim; i += W) {
        float* to = h.values + i / strip * strip * h.padded + i % strip;
        for (int64_t t = 0; t < h.padded; t++) {
            store(to + t * strip, t < h.positions ? load(h.v + t * h.stride + i) : zero());
        }
    }
}

void run_attend_head(const EncoderHead& h, int64_t begin, int64_t end, float* scores, float* out) {
    const int64_t rows = end - begin, width = h.head_dim;
    // Queries and results side by side: at the model's width, a power of two, a block's rows would
    // fall on two or three of the cache's sets and throw each other out.
    alignas(64) float q[kAttentionRows * 256], sums[kAttentionRows * 256];
    for (int64_t r = 0; r < rows; r++) {
        const float* from = h.q + (begin + r) * h.stride;
        for (int64_t i = 0; i < width; i += W) store(q + r * width + i, load(from + i));
    }
    for (int64_t t = 0; t < h.padded; t += 2 * W) {
        multiply_rows<2>(q, width, h.keys + t * width, width, scores + t, h.padded, false, rows);
    }
    float factor[kAttentionRows];
    for (int64_t r = 0; r < rows; r++) {
        float* row = scores + r * h.padded;
        factor[r] = 1.0f / softmax(row, h.positions);
        for (int64_t t = round_up_to_16(h.positions); t < h.padded; t++) row[t] = 0.0f;
    }
    const int64_t strip = value_strip(width), chunk = 128;
    for (int64_t i = 0; i < width; i += strip) {
        const float* values = h.values + i * h.padded;
        for (int64_t t = 0; t < h.padded; t += chunk) {
            const int64_t depth = h.padded - t < chunk ? h.padded - t : chunk;
            const auto part = strip == W ? multiply_rows<1> : multiply_rows<2>;
            part(scores + t, h.padded, values + t * strip, depth, sums + i, width, t > 0, rows);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        float* to = out + (begin + r) * h.stride;
        for (int64_t i = 0; i < width; i += W) {
            store(to + i, mul(load(sums + r * width + i), all(factor[r])));
        }
    }
}

int64_t run_argmax(const float* x, int64_t begin, int64_t end) {
    f32 top = all(-__FLT_MAX__);
    int64_t i = begin;
    for (; i + W <= end; i += W) top = max(load(x + i), top);
    float most = largest(top);
    for (; i < end; i++) most = x[i] > most ? x[i] : most;
    for (int64_t j = begin; j < end; j++) {
        if (x[j] == most) return j;
    }
    return begin;
}

constexpr WhisperKernels kWhisperKernels = {
    .layer_norm = run_layer_norm,
    .gelu = run_gelu,
    .add = run_add,
    .self_attention = run_self_attention,
    .pack_cross = run_pack_cross,
    .cross_attention = run_cross_attention,
    .pack_head = run_pack_head,
    .attend_head = run_attend_head,
    .argmax = run_argmax,
};

}  // namespace
}  // namespace dqw
