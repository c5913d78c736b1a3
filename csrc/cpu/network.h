// A packed Whisper encoder or decoder as plain pointers, made once from the model's tensors, and
// its matrix products by the threads of a team.
#pragma once

#include <vector>

#include "product_bf16.h"
#include "team.h"
#include "whisper.h"

namespace dqw {

struct Weight {
    Packed w;
    const float* bias;  // or null
    bool int8;          // activations
};

// Memory is the model's own: `kept` keeps it alive.
struct Network {
    int64_t heads, layers, width;
    std::vector<const float*> floats;
    std::vector<int64_t> sizes;  // of `floats`, in numbers
    std::vector<Weight> weights;
    std::vector<Tensor> kept;

    int64_t head_dim() const { return width / heads; }
};

inline void check_heads(int64_t width, int64_t heads) {
    DQW_CHECK(heads > 0 && width % heads == 0 && width / heads % 16 == 0 && width / heads <= 256,
              "heads must be multiples of 16, at most 256 wide");
}

// The network that network_new returned as a number. Throws for one that is gone.
std::shared_ptr<const Network> network(int64_t handle);

// Memory of one call: a part that all threads share, and one for each.
struct Area {
    char* shared;
    char* own;
    size_t own_bytes;
};

// Bytes that `own` needs for products of m rows with w, and `shared` for their activations.
size_t product_own_bytes(const Weight& w, int64_t m, const LinearKernels& k);
size_t product_shared_bytes(const Weight& w, int64_t m, const LinearKernels& k);

constexpr int64_t kFinishBlocks = 4;  // register blocks of many rows, see product()

// y (m, rows) = x (m, cols) W^T + bias, x and y float32; many rows may be multiplied in bfloat16
// (takes_bf16; see tier(bool)). Every thread of the team calls it with the same arguments; x must
// be written by all (a barrier) before, y is after the next barrier, except that finish(row begin,
// row end, column begin, column end) runs on the thread that has just written these of y.
template <class F>
void product(Member& me, const Weight& weight, const LinearKernels& k, const Area& area,
             const float* x, int64_t m, float* y, const F& finish);

constexpr float kEpsilon = 1e-5f;  // of every norm

// ---- implementation ----

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Cuts one block of memory into aligned pieces; with no block it only counts.
struct Pieces {
    char* base;
    size_t used = 0;
    template <class T>
    T* take(int64_t count) {
        T* p = reinterpret_cast<T*>(base + used);
        used += round_up(std::max<int64_t>(count, 1) * sizeof(T), 64);
        return p;
    }
};

inline int64_t group_count(const Packed& w) {
    return w.group ? (w.cols + w.group - 1) / w.group : 1;
}

// Rows of bytes that stand for each of m rows of x: 1 with int8 activations, 3 where float ones run
// as the digits of integers (LinearKernels::takes_planes), 0 where they stay floats. Digits are for
// one row at a time (whisper-base's decoder on AVX2: 2.8 instead of 3.3 ms a token); for 1500 rows
// they took AVX2 1.6 times as long as floats.
inline int byte_rows(const Weight& w, int64_t m, const LinearKernels& k) {
    if (w.int8) return 1;
    return 3 * m <= k.int8_gemv_limit && k.takes_planes(w.w) ? 3 : 0;
}

// Many rows. In tiles whatever the activations are: int8 ones are rounded less so. Two cores of a
// Zen 4 multiply int8 at 530 to 760 GOP/s, with groups or without, and bfloat16 at 380
// (docs/results.md).
inline bool takes_bf16(const Weight& w, int64_t m, const LinearKernels& k) {
    return k.bf16 && m > k.bf16->few && (k.bf16->tiles || !w.int8);
}

inline bool takes_gemm(const Weight& w, int64_t m, const LinearKernels& k) {
    const int bytes = byte_rows(w, m, k);
    return k.gemm_int8 && (bytes ? m * bytes > k.int8_gemv_limit : m > k.float_gemv_limit);
}

// Rows of x that a gemv takes at a time.
inline int64_t gemv_step(const Weight& w, int64_t m, const LinearKernels& k) {
    return k.gemv_rows / std::max(byte_rows(w, m, k), 1);
}

inline size_t activation_bytes(const Weight& w, int64_t m, int bytes) {
    const int64_t padded = w.w.blocks * 64, rows = m * bytes;
    if (rows == 0) return round_up((m * padded + 64) * 4, 64);
    return 2 * round_up(rows * padded, 64) + round_up((rows * group_count(w.w) + m) * 4, 64) + 64;
}

inline size_t product_own_bytes(const Weight& w, int64_t m, const LinearKernels& k) {
    const int bytes = byte_rows(w, m, k);
    if (takes_bf16(w, m, k)) return scratch_bytes(*k.bf16, w.w, Type::f32, m);
    if (!takes_gemm(w, m, k)) return activation_bytes(w, std::min(m, gemv_step(w, m, k)), bytes);
    return w.w.blocks * 64 * k.tile_rows * (bytes ? (w.w.wide ? 2 : 1) : 4) +
           group_count(w.w) * k.tile_rows * sizeof(float) + 64;
}

inline size_t product_shared_bytes(const Weight& w, int64_t m, const LinearKernels& k) {
    if (takes_bf16(w, m, k)) return 0;
    return takes_gemm(w, m, k) ? activation_bytes(w, m, byte_rows(w, m, k)) : 0;
}

inline Linear linear_of(const Weight& w, int64_t m, int bytes, char* p, float* y) {
    Linear a{};
    a.w = w.w;
    a.m = m;
    a.bias = w.bias;
    a.y = y;
    a.type = Type::f32;
    a.planes = bytes;
    if (a.planes == 0) {
        a.x = reinterpret_cast<float*>(p);
        return a;
    }
    const int64_t rows = m * a.planes, q = round_up(rows * w.w.blocks * 64, 64);
    a.q = reinterpret_cast<int8_t*>(p);
    a.lane_start = reinterpret_cast<int32_t*>(p + q);
    a.row_start = reinterpret_cast<int32_t*>(p + 2 * q);
    a.row_scale = reinterpret_cast<float*>(a.row_start + rows * group_count(w.w));
    return a;
}

template <class F>
void product(Member& me, const Weight& weight, const LinearKernels& k, const Area& area,
             const float* x, int64_t m, float* y, const F& finish) {
    const int bytes = byte_rows(weight, m, k);
    const int64_t rows = weight.w.rows;
    if (takes_bf16(weight, m, k)) {
        const Factors rounded{.type = Type::f32};
        const Bf16Product p{*k.bf16, weight.w, weight.bias, x, rounded, m, y, Type::f32};
        const Parts parts = parts_of(p.k, p.w, m, me.slots());
        me.share(parts.rows * parts.strips, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) product_bf16(p, parts, i, area.own, finish);
        });
        return;
    }
    if (!takes_gemm(weight, m, k)) {
        // Every thread prepares all of the few rows for itself: cheaper than a barrier.
        const int64_t step = gemv_step(weight, m, k);
        for (int64_t done = 0; done < m; done += step) {
            const int64_t some = std::min(m - done, step);
            const Linear a = linear_of(weight, some, bytes, area.own, y + done * rows);
            (bytes ? k.prepare_int8 : k.prepare_float)(a, x + done * weight.w.cols, 0, some);
            me.share((rows + 15) / 16, [&](int64_t begin, int64_t end) {
                (bytes ? k.gemv_int8 : k.gemv_float)(a, begin * 16, std::min(end * 16, rows));
            });
        }
        me.share((rows + 15) / 16, [&](int64_t begin, int64_t end) {
            finish(0, m, begin * 16, std::min(end * 16, rows));
        });
        return;
    }
    Linear a = linear_of(weight, m, bytes, area.shared, y);
    const int64_t block = rows_of_block(a, bytes > 0, k);
    a.block_rows = block * std::max(bytes, 1);
    me.share((m + block - 1) / block, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; b++) {
            const int64_t last = std::min((b + 1) * block, m);
            (bytes ? k.block_int8 : k.block_float)(a, x, b * block, last);
        }
    });
    me.barrier();
    me.share((rows + k.tile_rows - 1) / k.tile_rows, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; tile++) {
            const int64_t n = tile * k.tile_rows;
            (bytes ? k.fill_int8 : k.fill_float)(weight.w, n, area.own);
            // What is finished is still in the second cache. All rows of a tile, an output's
            // stride apart, fall on so few of its sets that most would come from the third.
            for (int64_t m0 = 0; m0 < m; m0 += kFinishBlocks * block) {
                const int64_t m1 = std::min(m0 + kFinishBlocks * block, m);
                (bytes ? k.gemm_int8 : k.gemm_float)(a, n, m0, m1, area.own);
                finish(m0, m1, n, std::min(n + k.tile_rows, rows));
            }
        }
    });
    me.barrier();  // the activations' memory is free for the next product
}

}  // namespace dqw
