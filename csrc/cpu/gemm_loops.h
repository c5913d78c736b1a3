// y = x W^T over the lanes of isa_*.h: many rows of x (gemm), for tiers that beat torch's matmul.
//
// A tile of W's rows is decoded once into scratch, interleaved so that one register holds the same
// columns of W neighbouring rows (W: the lanes), and meets blocks of x's rows in a register block
// of block_rows x kTileVectors sums.
#pragma once

#include "register_loops.h"

namespace dqw {
namespace {

template <int B>
void fill_int8_tile(const Packed& w, const int8_t* levels, int64_t n, int32_t* tile) {
    const Table<B> table(levels, byte_offset(w));
    fill_tile<B>(w, n, table, [&](int64_t unit, int t, i32 v) DQW_INLINED {
        store_int(tile + unit * kTileRows + t * W, v);
    });
}

// Scales of kTileRows rows from n, by groups: (groups, kTileRows).
DQW_INLINE void fill_scales(const Packed& w, int64_t n, float* scales) {
    const int64_t groups = w.group ? (w.cols + w.group - 1) / w.group : 1;
    for (int64_t t = 0; t < kTileRows; t += W) {
        for (int64_t g = 0; g < groups; g += W) {
            i32 v[W];
            for (int r = 0; r < W; r++) {
                const int64_t i = n + t + r, at = i * w.scale_stride + g, left = groups - g;
                v[r] = bits_of(i < w.rows ? scales_at(w, at, left) : zero());
            }
            transpose(v);
            for (int64_t j = 0; j < W && g + j < groups; j++) {
                store_int(scales + (g + j) * kTileRows + t, v[j]);
            }
        }
    }
}

// level * scale, rounded once, as floats: a row of kTileRows for every column.
template <int B>
void fill_float_tile(const Packed& w, int64_t n, const float* scales, float* tile) {
    const int64_t group = w.group ? w.group : w.blocks * kUnit;
    const int64_t last = w.cols > 0 ? (w.cols - 1) / group : 0;
    const FloatTable<B> low(w.low), high(w.high);
    const auto scale_of = [&](int64_t column, int t) {
        const int64_t g = column / group;
        return load(scales + (g < last ? g : last) * kTileRows + t * W);
    };
    if (!w.wide) {
        fill_tile<B>(w, n, low, [&](int64_t unit, int t, i32 v) DQW_INLINED {
            f32 s = scale_of(unit * 4, t);
            unroll<4>([&](auto j) DQW_INLINED {
                if (group % 4 != 0) s = scale_of(unit * 4 + j.value, t);
                store(tile + (unit * 4 + j.value) * kTileRows + t * W,
                      mul(low.template part<j.value>(v), s));
            });
        });
        return;
    }
    // Two planes: the upper one goes through the tile, exact, before the scale.
    fill_tile<B>(w, n, high, [&](int64_t unit, int t, i32 v) DQW_INLINED {
        unroll<4>([&](auto j) DQW_INLINED {
            store(tile + (unit * 4 + j.value) * kTileRows + t * W,
                  mul(high.template part<j.value>(v), all(256.0f)));
        });
    });
    fill_tile<B>(w, n, low, [&](int64_t unit, int t, i32 v) DQW_INLINED {
        unroll<4>([&](auto j) DQW_INLINED {
            float* at = tile + (unit * 4 + j.value) * kTileRows + t * W;
            const f32 level = add(load(at), low.template part<j.value>(v));
            store(at, mul(level, scale_of(unit * 4 + j.value, t)));
        });
    });
}

// f(first row of a block, its rows) over rows [m0, m1) of x, or of q.
template <class F>
DQW_INLINE void each_block(const Linear& a, int64_t m0, int64_t m1, const F& f) {
    for (int64_t m = m0; m < m1; m += a.block_rows) {
        f(m, m + a.block_rows < m1 ? a.block_rows : m1 - m);
    }
}

// Fetches what a block of rows will write before its products are summed up, so that they need not
// wait for lines of y: 1500 rows of 512 -> 2048, int8, took 1.13 times as long without (Zen 4).
DQW_INLINE void prefetch_tile(const Linear& a, int64_t m, int64_t rows, int64_t n) {
    const int64_t size = a.type == Type::f32 ? 4 : 2;
    const int64_t count = a.w.rows - n < kTileRows ? a.w.rows - n : kTileRows;
    const uintptr_t y = (uintptr_t)a.y;
    for (int64_t i = 0; i < rows; i++) {
        const uintptr_t at = y + ((m + i) * a.w.rows + n) * size, end = at + count * size;
        for (uintptr_t line = at / 64 * 64; line < end; line += 64) {
            prefetch_write((const void*)line);
        }
    }
}

// y = value(i, t) + bias: rows m … m + rows, kTileRows outputs from n.
template <class F>
DQW_INLINE void write_tile(const Linear& a, const TileOutputs& o, int64_t m, int64_t rows,
                           int64_t n, const F& value) {
    const bool whole = n + kTileRows <= a.w.rows;
    with_type(a.type, [&]<Type T>() {
        for (int64_t i = 0; i < rows; i++) {
            unroll<kTileVectors>([&](auto t) DQW_INLINED {
                const int64_t at = n + t.value * W, count = a.w.rows - at;
                if (!whole && count <= 0) return;
                f32 y = value(i, t);
                if (a.bias) y = add(y, o.of[t.value].bias);
                const int64_t to = (m + i) * a.w.rows + at;
                whole || count >= W ? write<T>(a.y, to, y) : write<T>(a.y, to, y, count);
            });
        }
    });
}

void run_fill_float(const Packed& w, int64_t n, void* scratch) {
    float* tile = (float*)scratch;
    float* scales = tile + w.blocks * kUnit * kTileRows;
    fill_scales(w, n, scales);
    with_bits(w.bits, [&](auto bits) { fill_float_tile<bits.value>(w, n, scales, tile); });
}

void run_gemm_float(const Linear& a, int64_t n, int64_t m0, int64_t m1, const void* scratch) {
    const int64_t padded = a.w.blocks * kUnit;
    const float* tile = (const float*)scratch;
    alignas(64) float sums[kFloatBlockRows * kTileRows];
    const TileOutputs outputs(a, n);
    each_block(a, m0, m1, [&](int64_t m, int64_t rows) {
        prefetch_tile(a, m, rows, n);
        with_rows<kFloatBlockRows>(rows, [&](auto r) DQW_INLINED {
            float_product<r.value>(tile, a.x + m * padded, padded, sums);
        });
        write_tile(a, outputs, m, rows, n, [&](int64_t i, auto t) DQW_INLINED {
            return load(sums + i * kTileRows + t.value * W);
        });
    });
}

// A tile: the lower plane of levels, the upper one if there is one, the scales if there are groups.
struct Int8Tile {
    int32_t *low, *high;
    float* scales;
    Int8Tile(const Packed& w, void* scratch) {
        const int64_t size = w.blocks * kUnit / 4 * kTileRows;
        low = (int32_t*)scratch;
        high = low + size;
        scales = (float*)(low + (w.wide ? 2 : 1) * size);
    }
};

void run_fill_int8(const Packed& w, int64_t n, void* scratch) {
    const Int8Tile tile(w, scratch);
    with_bits(w.bits, [&](auto bits) {
        fill_int8_tile<bits.value>(w, w.low, n, tile.low);
        if (w.wide) fill_int8_tile<bits.value>(w, w.high, n, tile.high);
    });
    if (w.group) fill_scales(w, n, tile.scales);
}

void run_gemm_int8(const Linear& a, int64_t n, int64_t m0, int64_t m1, const void* scratch) {
    const Packed& w = a.w;
    const Int8Tile tile(w, (void*)scratch);
    const int64_t padded = w.blocks * kUnit;
    const TileOutputs outputs(a, n);
    const int planes = planes_of(a);
    const int64_t depth = dot_depth(w);
    const bool direct = planes == 1 && !w.wide && a.type == Type::f32 && n + kTileRows <= w.rows;
    alignas(64) int32_t sums[kInt8BlockRows * kTileRows], upper[kInt8BlockRows * kTileRows];
    alignas(64) float group_sums[kGroupBlockRows * kTileRows];
    // Rows of q from here on; a block holds whole rows of x.
    each_block(a, m0 * planes, m1 * planes, [&](int64_t m, int64_t rows) {
        prefetch_tile(a, m / planes, rows / planes, n);
        const int8_t* q = a.q + m * padded;
        with_dot<4>(w, [&](auto kind) {
            using Dot = decltype(kind);
            if (w.group && direct) {
                with_rows<kGroupBlockRows>(rows, [&](auto r) {
                    groups_to_y<r.value, Dot>(a, outputs, tile.low, tile.scales, q, m, n);
                });
            } else if (w.group) {
                with_rows<kGroupBlockRows>(rows, [&](auto r) {
                    groups_to_sums<r.value, Dot, false>(a, tile.low, tile.scales, q, m, group_sums);
                    if (w.wide) {
                        groups_to_sums<r.value, Dot, true>(a, tile.high, tile.scales, q, m,
                                                           group_sums);
                    }
                });
            } else if (direct) {
                with_rows<kInt8BlockRows>(rows, [&](auto r) {
                    int8_to_y<r.value, Dot>(a, outputs, tile.low, q, padded / 4, depth, m, n);
                });
            } else {
                with_rows<kInt8BlockRows>(rows, [&](auto r) {
                    int8_to_sums<r.value, Dot>(tile.low, q, padded / 4, depth, sums);
                    if (w.wide) int8_to_sums<r.value, Dot>(tile.high, q, padded / 4, depth, upper);
                });
            }
        });
        if (direct) return;
        const int64_t row = m / planes, some = rows / planes, step = planes * kTileRows;
        if (w.group) {
            write_tile(a, outputs, row, some, n, [&](int64_t i, auto t) DQW_INLINED {
                const float* at = group_sums + i * step + t.value * W;
                return scaled_groups(a, row + i, at, planes, kTileRows);
            });
        } else {
            write_tile(a, outputs, row, some, n, [&](int64_t i, auto t) DQW_INLINED {
                const int64_t at = i * step + t.value * W;
                return scaled_sums(a, outputs.of[t.value], row + i, sums + at,
                                   w.wide ? upper + at : nullptr, planes, kTileRows);
            });
        }
    });
}

constexpr LinearKernels kLinearKernels = {
    .gemv_rows = kGemvRows,
    .int8_gemv_limit = kInt8GemvLimit,
    .float_gemv_limit = kFloatGemvLimit,
    .prepare_float = run_prepare_float,
    .prepare_int8 = run_prepare_int8,
    .quantize_rows = run_quantize_rows,
    .takes_planes = run_takes_planes,
    .planes_limit = kPlanesLimit,
    .gemv_float = run_gemv_float,
    .gemv_int8 = run_gemv_int8,
    .dequantize = run_dequantize,
    .levels = run_levels,
    .scale = scale_at,
    .int8_block_rows = kInt8BlockRows,
    .float_block_rows = kFloatBlockRows,
    .group_block_rows = kGroupBlockRows,
    .tile_rows = kTileRows,
    .block_float = run_block_float,
    .block_int8 = run_block_int8,
    .fill_float = run_fill_float,
    .fill_int8 = run_fill_int8,
    .gemm_float = run_gemm_float,
    .gemm_int8 = run_gemm_int8,
};

}  // namespace
}  // namespace dqw
