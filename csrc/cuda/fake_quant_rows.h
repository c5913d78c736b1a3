// fake_quant_activation: each row of x to 255 levels of its own largest magnitude.
//
//     inverse = 1 / largest * 127      y = clamp(round(x * inverse), -127, 127) * (largest / 127)
//
// dqw/reference.py's _quantize_rows bit for bit: a row with NaN or infinity is NaN, one whose
// inverse overflows is zero. A team of warps has a row and holds of it what kHeld chunks a thread
// are, all asked for before the first is used; longer rows are read a second time. No torch here:
// tests run this file on CPU threads.
#pragma once

#include "fake_quant_launch.h"

namespace dqw {

constexpr int kHeld = 4;

struct Activation {
    const void* x;
    void* y;
    int64_t rows;
    int cols;
    int warps, teams;  // of a row, and rows of a block
};

struct RowRange {
    float inverse, scale;  // inverse: 0 where the row is all zeros or NaN
};
__device__ inline RowRange range_of(uint32_t largest) {
    if (largest >= 0x7f800000u) return {0.0f, __uint_as_float(0x7fc00000u)};
    const float value = __uint_as_float(largest), scale = __fdiv_rn(value, 127.0f);
    const float inverse = __fmul_rn(__fdiv_rn(1.0f, value), 127.0f);
    return {__float_as_uint(inverse) < 0x7f800000u ? inverse : 0.0f, scale};
}

template <typename T, int V>
__global__ void __launch_bounds__(32 * kTeamWarps, 2) fake_quant_rows(const Activation a) {
    DQW_SHARED(float, parts, kTeamWarps);
    const int size = 32 * a.warps;  // teams share a block only where they have one warp or two
    const int team = a.teams == 1 ? 0 : threadIdx.x >> (4 + a.warps), t = threadIdx.x - team * size;
    const int64_t row = (int64_t)blockIdx.x * a.teams + team, begin = row * a.cols;
    const int chunks = row < a.rows ? a.cols / V : 0;
    Vector<T, V> held[kHeld];
#pragma unroll
    for (int u = 0; u < kHeld; u++) {
        if (t + u * size < chunks) held[u].read(a.x, begin + (int64_t)(t + u * size) * V);
    }
    // Magnitudes compare as integers; NaN and infinity are the largest.
    uint32_t largest = 0;
    const auto look = [&](const Vector<T, V>& x) {
#pragma unroll
        for (int i = 0; i < V; i++) {
            const uint32_t magnitude = __float_as_uint(x[i]) & 0x7fffffffu;
            largest = magnitude > largest ? magnitude : largest;
        }
    };
#pragma unroll
    for (int u = 0; u < kHeld; u++) {
        if (t + u * size < chunks) look(held[u]);
    }
    for (int i = t + kHeld * size; i < chunks; i += size) {
        Vector<T, V> x;
        x.read(a.x, begin + (int64_t)i * V);
        look(x);
    }
    for (int other = 16; other > 0; other >>= 1) {
        const float found = __shfl_xor_sync(0xffffffffu, __uint_as_float(largest), other);
        largest = __float_as_uint(found) > largest ? __float_as_uint(found) : largest;
    }
    if (a.warps > 1) {
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = __uint_as_float(largest);
        __syncthreads();
        for (int w = 0; w < a.warps; w++) {
            const uint32_t found = __float_as_uint(parts[team * a.warps + w]);
            largest = found > largest ? found : largest;
        }
    }
    const RowRange range = range_of(largest);
    const auto write = [&](const Vector<T, V>& x, int i) {
        float y[V];
#pragma unroll
        for (int k = 0; k < V; k++) {
            const float q = rintf(fminf(fmaxf(__fmul_rn(x[k], range.inverse), -127.0f), 127.0f));
            y[k] = __fmul_rn(range.inverse == 0.0f ? 0.0f : q, range.scale);
        }
        Vector<T, V>::write(a.y, begin + (int64_t)i * V, y);
    };
#pragma unroll
    for (int u = 0; u < kHeld; u++) {
        if (t + u * size < chunks) write(held[u], t + u * size);
    }
    for (int i = t + kHeld * size; i < chunks; i += size) {
        Vector<T, V> x;
        x.read(a.x, begin + (int64_t)i * V);
        write(x, i);
    }
}

// launch(kernel, arguments, blocks, threads); rows and cols are not 0.
template <typename F>
void launch_fake_quant_rows(Activation& a, Float type, F& launch) {
    const auto with = [&]<typename T, int V>() {
        const int chunks = a.cols / V, most = 32 * kHeld;
        a.warps = (chunks + most - 1) / most < kTeamWarps ? (chunks + most - 1) / most : kTeamWarps;
        a.teams = a.warps > 2 ? 1 : 4 / a.warps;
        const int64_t blocks = (a.rows + a.teams - 1) / a.teams;
        launch(fake_quant_rows<T, V>, a, (int)blocks, 32 * a.warps * a.teams);
    };
    const auto of_type = [&]<typename T>() {
        constexpr int V = 16 / sizeof(T);
        const auto fits = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
        if (a.cols % V == 0 && fits(a.x) && fits(a.y)) return with.template operator()<T, V>();
        with.template operator()<T, 1>();
    };
    if (type == Float::kFloat) of_type.template operator()<float>();
    if (type == Float::kHalf) of_type.template operator()<__half>();
    if (type == Float::kBFloat16) of_type.template operator()<__nv_bfloat16>();
}

}  // namespace dqw
