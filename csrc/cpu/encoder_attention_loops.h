// The encoder's attention: a block of queries at a time, whose scores never leave the cache.
#pragma once

#include "softmax_loops.h"

namespace dqw {
namespace {

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

}  // namespace
}  // namespace dqw
