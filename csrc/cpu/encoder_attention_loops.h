// The encoder's attention: a block of queries at a time, whose scores never leave the cache.
#pragma once

#include "softmax_loops.h"

namespace dqw {
namespace {

constexpr int kQueryRows = W == 16 ? 12 : 6;  // register block: so many queries, two registers
constexpr int64_t kAttentionRows = 24;

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
DQW_INLINE int64_t padded(const EncoderHead& h) { return (h.positions + 31) / 32 * 32; }
DQW_INLINE float* keys_of(const EncoderHead& h) { return (float*)h.packed; }
DQW_INLINE float* values_of(const EncoderHead& h) { return keys_of(h) + padded(h) * h.head_dim; }

int64_t run_packed_bytes(int64_t positions, int64_t head_dim) {
    return (positions + 31) / 32 * 32 * head_dim * 2 * 4;
}
int64_t run_scratch_bytes(int64_t positions, int64_t) {
    return kAttentionRows * ((positions + 31) / 32 * 32) * 4;
}

void run_pack(const EncoderHead& h) {
    const int64_t end = padded(h);
    for (int64_t t = 0; t < end; t++) {
        float* key = keys_of(h) + t / (2 * W) * 2 * W * h.head_dim + t % (2 * W);
        const float* from = h.k + t * h.stride;
        for (int64_t i = 0; i < h.head_dim; i++) {
            key[i * 2 * W] = t < h.positions ? from[i] : 0.0f;
        }
    }
    const int64_t strip = value_strip(h.head_dim);
    for (int64_t i = 0; i < h.head_dim; i += W) {
        float* to = values_of(h) + i / strip * strip * end + i % strip;
        for (int64_t t = 0; t < end; t++) {
            store(to + t * strip, t < h.positions ? load(h.v + t * h.stride + i) : zero());
        }
    }
}

void run_attend(const EncoderHead& h, int64_t begin, int64_t end, char* scratch, float* out) {
    float* scores = (float*)scratch;
    const int64_t depth = padded(h);
    const int64_t rows = end - begin, width = h.head_dim;
    // Queries and results side by side: at the model's width, a power of two, a block's rows would
    // fall on two or three of the cache's sets and throw each other out.
    alignas(64) float q[kAttentionRows * 256], sums[kAttentionRows * 256];
    for (int64_t r = 0; r < rows; r++) {
        const float* from = h.q + (begin + r) * h.stride;
        for (int64_t i = 0; i < width; i += W) store(q + r * width + i, load(from + i));
    }
    for (int64_t t = 0; t < depth; t += 2 * W) {
        multiply_rows<2>(q, width, keys_of(h) + t * width, width, scores + t, depth, false, rows);
    }
    float factor[kAttentionRows];
    for (int64_t r = 0; r < rows; r++) {
        float* row = scores + r * depth;
        factor[r] = 1.0f / softmax(row, h.positions);
        for (int64_t t = round_up_to_16(h.positions); t < depth; t++) row[t] = 0.0f;
    }
    const int64_t strip = value_strip(width), chunk = 128;
    for (int64_t i = 0; i < width; i += strip) {
        const float* values = values_of(h) + i * depth;
        for (int64_t t = 0; t < depth; t += chunk) {
            const int64_t some = depth - t < chunk ? depth - t : chunk;
            const auto part = strip == W ? multiply_rows<1> : multiply_rows<2>;
            part(scores + t, depth, values + t * strip, some, sums + i, width, t > 0, rows);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        float* to = out + (begin + r) * h.stride;
        for (int64_t i = 0; i < width; i += W) {
            store(to + i, mul(load(sums + r * width + i), all(factor[r])));
        }
    }
}

constexpr EncoderAttention kEncoderAttention = {
    .rows = kAttentionRows,
    .packed_bytes = run_packed_bytes,
    .scratch_bytes = run_scratch_bytes,
    .pack = run_pack,
    .attend = run_attend,
};

}  // namespace
}  // namespace dqw
