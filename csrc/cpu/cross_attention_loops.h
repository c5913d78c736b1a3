// A token's attention to the encoder's states, whose keys and values are kept as bytes
// (CrossType::int8), bfloat16 or float32. The file that includes this names CrossDot and
// kByteOffset.
#pragma once

#include "softmax_loops.h"

namespace dqw {
namespace {

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

// n floats in two bytes each: x = scale * (128 * high + low), high in -127…127, low in -64…64 (in
// 0…127 for x >= 0 throughout, where high is 0…127, too). Their error is 1 / 32512 of the largest.
// A NaN in x makes the scale NaN: bytes hold none, and max forgets it.
struct TwoPlanes {
    float scale;
    int32_t high_sum, low_sum;
};
DQW_INLINE TwoPlanes two_planes(const float* x, int64_t n, int8_t* high, int8_t* low) {
    f32 top = zero(), nan = zero();
    for (int64_t i = 0; i < n; i += W) {
        const f32 v = load(x + i);
        top = max(top, absolute(v));
        nan = fma(v, zero(), nan);
    }
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
    return {most / 16256.0f + sum(nan), sum_int(high_sum), sum_int(low_sum)};
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

}  // namespace
}  // namespace dqw
