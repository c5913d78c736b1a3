// y = x W^T over the lanes of isa_*.h: few rows of x (gemv). Codes are widened in registers and the
// packed weight is read once.
#pragma once

namespace dqw {
namespace {

// Where the codes of R rows from n on begin; rows behind the end repeat the last one, and their
// results are dropped.
template <int R>
struct RowPointers {
    const uint8_t* p[R];
    RowPointers(const Packed& w, int64_t n) {
        for (int r = 0; r < R; r++) {
            p[r] = w.data + (n + r < w.rows ? n + r : w.rows - 1) * w.row_bytes;
        }
    }
};

// Codes ahead of those in work are fetched, as the processor does not look far, and not beyond a
// page: whole blocks of the `together` rows side by side where these are short, for a few bytes
// would land among rows in work. Sapphire Rapids, groups of 16, weights from memory: one row of 768
// -> 51865 takes 1.13 ms with 1 KiB, 0.98 with 2, 0.80 with 4 to 8; a token of small's
// shape 5.2, 3.7 (4) and 3.4 (8); from the cache it makes no difference.
//
// Into L2: Zen 4, a token of base at 8 bits, 51 MB of weights, takes 1.9 to 2.6 ms (70 to 85 % of
// what memory gives), whether 4, 8, 16 or 32 KiB ahead; into L1 3.2 to 3.4 (50 %), and no less with
// every other line (one-off programs). The figures of Sapphire Rapids above are into L1.
constexpr int64_t kAhead = 8192;
DQW_INLINE int64_t ahead_of(const Packed& w, int together) {
    const int64_t block = w.row_bytes * together;
    return block > 4 * kAhead ? kAhead : (kAhead + block - 1) / (block > 0 ? block : 1) * block;
}
// All lines of the next `Bytes`: a step of more than 4 bits is longer than a line.
template <int Bytes>
DQW_INLINE void fetch(const uint8_t* p) {
    for (int i = 0; i < Bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

template <int B, int M>
void float_rows(const Linear& a, int64_t m0, int64_t begin, int64_t end) {
    constexpr int R = kGemvOutputs;
    const Packed& w = a.w;
    const FloatTable<B> table(w.low);
    const int64_t padded = w.blocks * kUnit, ahead = ahead_of(w, R);
    const bool whole = w.group && w.group % kUnit == 0;  // blocks have one scale
    const float* x = a.x + m0 * padded;
    float sums[M][W], scales[W * kMostScales + W];
    for (int64_t n = begin; n < end; n += W) {
        for (int m = 0; m < M; m++) store(sums[m], zero());
        for (int64_t c = 0; c < padded; c += kScaleColumns) {
            const int64_t stop = c + kScaleColumns < padded ? c + kScaleColumns : padded;
            int64_t stride = 0;
            if (whole) {
                stride = load_scales<kUnit>(w, n, c, stop, scales);
            } else if (w.group) {
                stride = load_scales<kQuarter>(w, n, c, stop, scales);
            }
            for (int64_t r0 = 0; r0 < W && n + r0 < end; r0 += R) {
                const RowPointers<R> rows(w, n + r0);
                f32 acc[R][M];
                unroll<R * M>([&](auto i) DQW_INLINED { acc[i.value / M][i.value % M] = zero(); });
                for (int64_t b = c / kUnit; b < stop / kUnit; b++) {
                    unroll<R>([&](auto r) DQW_INLINED {
                        fetch<8 * B>(rows.p[r.value] + b * 8 * B + ahead);
                        const Bytes v = table(codes<B>(rows.p[r.value] + b * 8 * B));
                        // Groups: the sum of a part is scaled once; without them, at the end.
                        f32 part[kParts][M];
                        unroll<kParts * 4>([&](auto i) DQW_INLINED {
                            constexpr int p = i.value / 4, j = i.value % 4;
                            const f32 level = table.template part<j>(v.part[p]);
                            const float* at = x + b * kUnit + i.value * W;
                            unroll<M>([&](auto m) DQW_INLINED {
                                const f32 value = load(at + m.value * padded);
                                f32& sum = w.group ? part[p][m.value] : acc[r.value][m.value];
                                sum =
                                    w.group && j == 0 ? mul(level, value) : fma(level, value, sum);
                            });
                        });
                        if (w.group == 0) return;
                        const int64_t row =
                            n + r0 + r.value < w.rows ? r0 + r.value : w.rows - 1 - n;
                        const float* own =
                            scales + row * stride + (b * kUnit - c) / (whole ? kUnit : kQuarter);
                        unroll<kParts>([&](auto p) DQW_INLINED {
                            const f32 scale = whole ? all(*own) : quarters<p.value>(own);
                            unroll<M>([&](auto m) DQW_INLINED {
                                f32& sum = acc[r.value][m.value];
                                sum = fma(part[p.value][m.value], scale, sum);
                            });
                        });
                    });
                }
                unroll<R * M>([&](auto i) DQW_INLINED {
                    sums[i.value % M][r0 + i.value / M] += sum(acc[i.value / M][i.value % M]);
                });
            }
        }
        const Outputs o(w, a.bias, n, end - n);
        for (int m = 0; m < M; m++) finish(a, o, m0 + m, n, mul(load(sums[m]), o.scale));
    }
}

// Rows of q that meet a matrix with levels as bytes. f(step, Int<blocks of it>) for every step.
template <class F>
DQW_INLINE void each_step(int64_t blocks, int64_t begin, int64_t end, const F& f) {
    int64_t s = begin;
    for (; s < end && (s + 1) * kStepBlocks <= blocks; s++) f(s, Int<kStepBlocks>());
    if constexpr (kStepBlocks > 1) {
        if (s < end) f(s, Int<1>());
    }
}

// Integer sums of one plane: totals[m][i] for outputs n + i.
template <int B, int M, class Dot>
DQW_INLINE void int8_sums(const Linear& a, const Table<B>& table, int64_t n, int64_t end,
                          int32_t (&totals)[M][W]) {
    constexpr int R = kSideBySide<M>;
    const Packed& w = a.w;
    const int64_t padded = w.blocks * kUnit, steps = (w.blocks + kStepBlocks - 1) / kStepBlocks;
    const int64_t ahead = ahead_of(w, R);
    const int64_t depth = dot_depth(w) / 2;  // steps whose two products one part holds
    for (int64_t r0 = 0; r0 < W && n + r0 < end; r0 += R) {
        const RowPointers<R> rows(w, n + r0);
        i32 acc[M][R];
        unroll<R * M>([&](auto i) DQW_INLINED { acc[i.value / R][i.value % R] = all_int(0); });
        const auto run = [&](int64_t from, int64_t to, i32(&part)[M][R]) DQW_INLINED {
            each_step(w.blocks, from, to, [&](int64_t s, auto blocks) DQW_INLINED {
                const int8_t* q = a.q + s * kStepBlocks * kUnit;
                unroll<R>([&](auto r) DQW_INLINED {
                    const uint8_t* p = rows.p[r.value] + s * kStepBlocks * 8 * B;
                    fetch<kStepBlocks * 8 * B>(p + ahead);
                    const auto v = table(step_codes<B, blocks.value>(p));
                    unroll<M * 2>([&](auto i) DQW_INLINED {
                        constexpr int m = i.value / 2, h = i.value % 2;
                        part[m][r.value] = Dot::dot(part[m][r.value], v.part[h],
                                                    load_part<blocks.value>(q + m * padded, h));
                    });
                });
            });
        };
        if constexpr (Dot::direct) {
            run(0, steps, acc);
        } else {
            for (int64_t s = 0; s < steps; s += depth) {
                i32 part[M][R];
                unroll<R * M>([&](auto i)
                                  DQW_INLINED { part[i.value / R][i.value % R] = all_int(0); });
                run(s, s + depth < steps ? s + depth : steps, part);
                unroll<R * M>([&](auto i) DQW_INLINED {
                    i32& sum = acc[i.value / R][i.value % R];
                    sum = add_int(sum, Dot::widen(part[i.value / R][i.value % R]));
                });
            }
        }
        unroll<M>([&](auto m) DQW_INLINED { store_sums(totals[m.value] + r0, acc[m.value]); });
    }
}

template <int B, int M, class Dot>
void int8_rows(const Linear& a, int64_t begin, int64_t end) {
    const int offset = byte_offset(a.w), planes = M % 3 ? 1 : planes_of(a);
    const Table<B> low(a.w.low, offset), high(a.w.high, offset);
    int32_t totals[M][W], upper[M][W];
    for (int64_t n = begin; n < end; n += W) {
        int8_sums<B, M, Dot>(a, low, n, end, totals);
        if (a.w.wide) int8_sums<B, M, Dot>(a, high, n, end, upper);
        const Outputs o(a.w, a.bias, n, end - n);
        for (int m = 0; m * planes < M; m++) {
            const int32_t* more = a.w.wide ? upper[m] : nullptr;
            finish(a, o, m, n, scaled_sums(a, o, m, totals[m * planes], more, planes, W));
        }
    }
}

// With groups, one plane of the matrix: the lanes of a part are exact integers, scaled as floats
// into the total. Span: so many columns of a block always share a scale. Below 64 the halves of a
// block are parts of their own; at 16 the lanes of a part have two scales a block.
template <int B, int M, class Dot, int Span>
DQW_INLINE void group_sums(const Linear& a, const Table<B>& table, int64_t n, int64_t end,
                           float (&sums)[M][W]) {
    constexpr int R = kSideBySide<M>, kParts = Span < 64 ? 2 : 1;
    constexpr int64_t kStep = kStepBlocks * kUnit;
    const Packed& w = a.w;
    const int64_t padded = w.blocks * kUnit, ahead = ahead_of(w, R);
    for (int m = 0; m < M; m++) store(sums[m], zero());
    for (int64_t c = 0; c < padded; c += kScaleColumns) {
        const int64_t stop = c + kScaleColumns < padded ? c + kScaleColumns : padded;
        float scales[W * kMostScales + W];
        const int64_t stride = load_scales<Span>(w, n, c, stop, scales);
        for (int64_t r0 = 0; r0 < W && n + r0 < end; r0 += R) {
            const RowPointers<R> rows(w, n + r0);
            const float* scale_of[R];
            for (int r = 0; r < R; r++) {
                const int64_t row = n + r0 + r < w.rows ? r0 + r : w.rows - 1 - n;
                scale_of[r] = scales + row * stride - c / Span;
            }
            f32 acc[M][R];
            unroll<R * M>([&](auto i) DQW_INLINED { acc[i.value / R][i.value % R] = zero(); });
            const auto step = [&](int64_t s, auto blocks) DQW_INLINED {
                const int8_t* q = a.q + s * kStep;
                const int8_t* start = (const int8_t*)a.lane_start + s * kStep;
                unroll<R>([&](auto r) DQW_INLINED {
                    const uint8_t* p = rows.p[r.value] + s * kStepBlocks * 8 * B;
                    fetch<kStepBlocks * 8 * B>(p + ahead);
                    const auto v = table(step_codes<B, blocks.value>(p));
                    const float* own = scale_of[r.value] + s * (kStep / Span);
                    // Part by part: one scale at a time is in a register.
                    unroll<kParts>([&](auto i) DQW_INLINED {
                        const f32 scale = part_scale<blocks.value, Span>(own, i.value);
                        unroll<M>([&](auto m) DQW_INLINED {
                            const int64_t at = m.value * padded;
                            i32 part = all_int(0);
                            if (Dot::has_offset) {
                                part = load_part<blocks.value>(start + at, i.value);
                            }
                            unroll<2 / kParts>([&](auto j) DQW_INLINED {
                                constexpr int h = i.value + j.value;
                                part =
                                    Dot::dot(part, v.part[h], load_part<blocks.value>(q + at, h));
                            });
                            f32& sum = acc[m.value][r.value];
                            sum = fma(to_float(Dot::widen(part)), scale, sum);
                        });
                    });
                });
            };
            each_step(w.blocks, c / kStep, (stop + kStep - 1) / kStep, step);
            unroll<M>([&](auto m) DQW_INLINED {
                float sum[R];
                store_sums(sum, acc[m.value]);
                for (int r = 0; r < R; r++) sums[m.value][r0 + r] += sum[r];
            });
        }
    }
}

template <int B, int M, class Dot, int Span>
void int8_group_rows(const Linear& a, int64_t begin, int64_t end) {
    const int planes = M % 3 ? 1 : planes_of(a), offset = byte_offset(a.w);
    const Table<B> low(a.w.low, offset), high(a.w.high, offset);
    float sums[M][W], upper[M][W];
    for (int64_t n = begin; n < end; n += W) {
        group_sums<B, M, Dot, Span>(a, low, n, end, sums);
        if (a.w.wide) {
            group_sums<B, M, Dot, Span>(a, high, n, end, upper);
            for (int m = 0; m < M; m++) {
                store(sums[m], fma(load(upper[m]), all(256.0f), load(sums[m])));
            }
        }
        const Outputs o(a.w, a.bias, n, end - n);
        for (int m = 0; m * planes < M; m++) {
            finish(a, o, m, n, scaled_groups(a, m, sums[m * planes], planes, W));
        }
    }
}

void run_gemv_float(const Linear& a, int64_t begin, int64_t end) {
    with_bits(a.w.bits, [&](auto bits) {
        with_rows<kGemvRows>(
            a.m, [&](auto m) DQW_INLINED { float_rows<bits.value, m.value>(a, 0, begin, end); });
    });
}

void run_gemv_int8(const Linear& a, int64_t begin, int64_t end) {
    with_bits(a.w.bits, [&](auto bits) {
        with_rows<kGemvRows>(a.m * planes_of(a), [&](auto m) {
            with_dot<bits.value>(a.w, [&](auto dot) {
                using Dot = decltype(dot);
                if (a.w.group % 32) {
                    int8_group_rows<bits.value, m.value, Dot, 16>(a, begin, end);
                } else if (a.w.group % 64) {
                    int8_group_rows<bits.value, m.value, Dot, 32>(a, begin, end);
                } else if (a.w.group) {
                    int8_group_rows<bits.value, m.value, Dot, 64>(a, begin, end);
                } else {
                    int8_rows<bits.value, m.value, Dot>(a, begin, end);
                }
            });
        });
    });
}

// AVX2, 512 -> 2048, two threads: digits take 31 us of one row, floats 62; but 1.9 ms of 100 rows,
// floats 1.6.
constexpr int kPlanesLimit = 16;
bool run_takes_planes(const Packed& w) { return takes_planes(w); }

}  // namespace
}  // namespace dqw
