// The gemm's register blocks: up to M rows of x by kTileRows rows of W, whose tile is decoded.
//
// What becomes of a block's results is the caller's: `end` gets them register by register.
#pragma once

#include "tile_loops.h"

namespace dqw {
namespace {

// Four columns of M rows of x, broadcast; `q` holds M units of 4 bytes a step.
DQW_INLINE i32 broadcast_unit(const int8_t* q) {
    int32_t unit;
    __builtin_memcpy(&unit, q, 4);
    return all_int(unit);
}

// acc += the products of `steps` units of four columns.
template <int M, class Dot>
DQW_INLINE void int8_block(const int32_t* tile, const int8_t* q, int64_t steps, int64_t depth,
                           i32 (&acc)[M][kTileVectors]) {
    const auto run = [&](int64_t n, i32(&part)[M][kTileVectors]) DQW_INLINED {
        for (; n > 0; n--) {
            i32 w[kTileVectors];
            unroll<kTileVectors>([&](auto t)
                                     DQW_INLINED { w[t.value] = load_int(tile + t.value * W); });
            unroll<M>([&](auto m) DQW_INLINED {
                const i32 x = broadcast_unit(q + 4 * m.value);
                unroll<kTileVectors>([&](auto t) DQW_INLINED {
                    i32& sum = part[m.value][t.value];
                    sum = Dot::dot(sum, w[t.value], x);
                });
            });
            tile += kTileRows;
            q += 4 * M;
        }
    };
    if constexpr (Dot::direct) {
        run(steps, acc);
    } else {
        for (; steps > 0; steps -= depth) {
            i32 part[M][kTileVectors];
            unroll<M * kTileVectors>([&](auto i) DQW_INLINED {
                part[i.value / kTileVectors][i.value % kTileVectors] = all_int(0);
            });
            run(steps < depth ? steps : depth, part);
            unroll<M * kTileVectors>([&](auto i) DQW_INLINED {
                constexpr int m = i.value / kTileVectors, t = i.value % kTileVectors;
                acc[m][t] = add_int(acc[m][t], Dot::widen(part[m][t]));
            });
        }
    }
}

// The factors of kTileRows outputs from n.
struct TileOutputs {
    Outputs of[2];
    TileOutputs(const Linear& a, int64_t n)
        : of{{a.w, a.bias, n, a.w.rows - n}, {a.w, a.bias, n + W, a.w.rows - n - W}} {}
};
static_assert(kTileVectors == 2);

// Straight to float32 y, whole tiles, of one plane: 5 % less time at 512 -> 2048 than by way of
// sums (Zen 4).
struct Direct {
    const TileOutputs& o;
    const bool biased;
    const int64_t stride;
    const float* const scale;  // of the rows of x
    float* const y;
    Direct(const Linear& a, const TileOutputs& o, int64_t row, int64_t n)
        : o(o),
          biased(a.bias != nullptr),
          stride(a.w.rows),
          scale(a.row_scale + row),
          y((float*)a.y + row * stride + n) {}
    template <int M, int T>
    DQW_INLINED void put(Int<M>, Int<T>, f32 v) const {
        store(y + M * stride + T * W, biased ? add(v, o.of[T].bias) : v);
    }
};

// end(Int<row>(), Int<register>(), sums) for the sums of M rows of q.
template <int M, class Dot, class End>
DQW_INLINE void int8_product(const int32_t* tile, const int8_t* q, int64_t steps, int64_t depth,
                             const End& end) {
    i32 acc[M][kTileVectors];
    unroll<M * kTileVectors>([&](auto i) DQW_INLINED {
        acc[i.value / kTileVectors][i.value % kTileVectors] = all_int(0);
    });
    int8_block<M, Dot>(tile, q, steps, depth, acc);
    unroll<M * kTileVectors>([&](auto i) DQW_INLINED {
        constexpr int m = i.value / kTileVectors, t = i.value % kTileVectors;
        end(Int<m>(), Int<t>(), acc[m][t]);
    });
}

template <int M, class Dot>
void int8_to_sums(const int32_t* tile, const int8_t* q, int64_t steps, int64_t depth,
                  int32_t* sums) {
    int8_product<M, Dot>(tile, q, steps, depth, [&](auto m, auto t, i32 sum) DQW_INLINED {
        store_int(sums + m.value * kTileRows + t.value * W, sum);
    });
}

template <int M, class Dot>
void int8_to_y(const Linear& a, const TileOutputs& o, const int32_t* tile, const int8_t* q,
               int64_t steps, int64_t depth, int64_t row, int64_t n) {
    const Direct to(a, o, row, n);
    const int32_t* start = a.row_start + row;
    int8_product<M, Dot>(tile, q, steps, depth, [&](auto m, auto t, i32 sum) DQW_INLINED {
        const f32 v = to_float(add_int(sum, all_int(start[m.value])));
        to.put(m, t, mul(v, mul(all(to.scale[m.value]), o.of[t.value].scale)));
    });
}

template <int M>
void float_product(const float* tile, const float* x, int64_t steps, float* sums) {
    f32 acc[M][kTileVectors];
    unroll<M * kTileVectors>(
        [&](auto i) DQW_INLINED { acc[i.value / kTileVectors][i.value % kTileVectors] = zero(); });
    for (int64_t k = 0; k < steps; k++) {
        f32 w[kTileVectors];
        unroll<kTileVectors>([&](auto t) DQW_INLINED { w[t.value] = load(tile + t.value * W); });
        unroll<M>([&](auto m) DQW_INLINED {
            const f32 v = all(x[m.value]);
            unroll<kTileVectors>([&](auto t) DQW_INLINED {
                acc[m.value][t.value] = fma(w[t.value], v, acc[m.value][t.value]);
            });
        });
        tile += kTileRows;
        x += M;
    }
    unroll<M * kTileVectors>([&](auto i) DQW_INLINED {
        store(sums + i.value * W, acc[i.value / kTileVectors][i.value % kTileVectors]);
    });
}

// The same of one plane of a matrix with groups: end(…, before + sum_g float(sum_g) * scale_g), of
// the upper plane 256 times that. before: (M, kTileRows), or null for zeros.
template <int M, class Dot, bool Upper, class End>
DQW_INLINE void group_product(const Linear& a, const int32_t* tile, const float* scales,
                              const int8_t* q, int64_t m0, const float* before, const End& end) {
    const int64_t depth = dot_depth(a.w);
    const int64_t cols = a.w.cols, group = a.w.group, groups = (cols + group - 1) / group;
    const int64_t steps = a.w.blocks * kUnit / 4;
    const int32_t* starts = a.row_start + m0 * groups;
    f32 total[M][kTileVectors];
    unroll<M * kTileVectors>([&](auto i) DQW_INLINED {
        total[i.value / kTileVectors][i.value % kTileVectors] =
            before ? load(before + i.value * W) : zero();
    });
    for (int64_t g = 0; g < groups; g++) {
        i32 acc[M][kTileVectors];
        unroll<M>([&](auto m) DQW_INLINED {
            const i32 start = all_int(starts[m.value * groups + g]);
            unroll<kTileVectors>([&](auto t) DQW_INLINED { acc[m.value][t.value] = start; });
        });
        const int64_t first = g * group / 4;
        const int64_t last = first + group / 4 < steps ? first + group / 4 : steps;
        int8_block<M, Dot>(tile + first * kTileRows, q + first * 4 * M, last - first, depth, acc);
        unroll<kTileVectors>([&](auto t) DQW_INLINED {
            f32 s = load(scales + g * kTileRows + t.value * W);
            if (Upper) s = mul(s, all(256.0f));
            unroll<M>([&](auto m) DQW_INLINED {
                f32& sum = total[m.value][t.value];
                sum = fma(to_float(acc[m.value][t.value]), s, sum);
            });
        });
    }
    unroll<M * kTileVectors>([&](auto i) DQW_INLINED {
        constexpr int m = i.value / kTileVectors, t = i.value % kTileVectors;
        end(Int<m>(), Int<t>(), total[m][t]);
    });
}

template <int M, class Dot, bool Upper>
void groups_to_sums(const Linear& a, const int32_t* tile, const float* scales, const int8_t* q,
                    int64_t m0, float* sums) {
    const float* before = Upper ? sums : nullptr;
    group_product<M, Dot, Upper>(a, tile, scales, q, m0, before,
                                 [&](auto m, auto t, f32 sum) DQW_INLINED {
                                     store(sums + m.value * kTileRows + t.value * W, sum);
                                 });
}

template <int M, class Dot>
void groups_to_y(const Linear& a, const TileOutputs& o, const int32_t* tile, const float* scales,
                 const int8_t* q, int64_t row, int64_t n) {
    const Direct to(a, o, row, n);
    group_product<M, Dot, false>(a, tile, scales, q, row, nullptr,
                                 [&](auto m, auto t, f32 sum) DQW_INLINED {
                                     to.put(m, t, mul(all(to.scale[m.value]), sum));
                                 });
}

}  // namespace
}  // namespace dqw
