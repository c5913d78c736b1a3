// y = x W^T over the lanes of isa_*.h, included once by each tier.
//
// gemv_*: few rows of x. Codes are widened in registers and the packed weight is read once.
// gemm_*: many rows. A tile of W's rows is decoded once into scratch, interleaved so that one
// register holds the same columns of `W` neighbouring rows, and meets blocks of x's rows in a
// register block: block_rows x kTileVectors accumulators.
//
// Int8: with integer sums exact in int32 (|sum| <= 65536 * 255 * 127 < 2^31, which is why the
// operator sends longer rows elsewhere). Tables with |level| > 127 are two planes of bytes, each
// run as a matrix of its own and put together as low + 256 * high in 64 bits.
#pragma once

namespace dqw {
namespace {

constexpr int kTileRows = kTileVectors * W;
constexpr int64_t kUnit = 64;  // columns of a block

// ---- results ----

DQW_INLINE void write_y(const Linear& a, int64_t row, int64_t n, f32 y, int64_t count) {
    const int64_t i = row * a.w.rows + n;
    if (a.type == Type::f32) {
        count >= W ? write<Type::f32>(a.y, i, y) : write<Type::f32>(a.y, i, y, count);
    } else if (a.type == Type::f16) {
        count >= W ? write<Type::f16>(a.y, i, y) : write<Type::f16>(a.y, i, y, count);
    } else {
        count >= W ? write<Type::bf16>(a.y, i, y) : write<Type::bf16>(a.y, i, y, count);
    }
}

// Per-output factors of a run of outputs [n, n + count): scales (1 if grouped) and bias.
struct Outputs {
    f32 scale, bias;
    Outputs(const Packed& w, const float* b, int64_t n, int64_t count) {
        float s[W] = {}, c[W] = {};
        for (int64_t i = 0; i < count && i < W; i++) {
            s[i] = w.group ? 1.0f : scale_at(w, n + i, 0);
            if (b) c[i] = b[n + i];
        }
        scale = load(s);
        bias = load(c);
    }
};

// Float sums of row `m`, W outputs from n: y = sum * scale + bias.
DQW_INLINE void finish_float(const Linear& a, const Outputs& o, int64_t m, int64_t n, f32 sum) {
    f32 y = mul(sum, o.scale);
    if (a.bias) y = add(y, o.bias);
    write_y(a, m, n, y, a.w.rows - n);
}

// Integer sums: y = float(sum) * (row_scale * scale) + bias. `high` only for wide tables.
DQW_INLINE void finish_int8(const Linear& a, const Outputs& o, int64_t m, int64_t n,
                            const int32_t* low, const int32_t* high) {
    const int32_t offset = kByteOffset * a.row_sum[m];
    f32 total;
    if (high == nullptr) {
        total = to_float(sub_int(load_int(low), all_int(offset)));
    } else {
        float t[W];
        for (int i = 0; i < W; i++) {
            t[i] = (float)((int64_t)(low[i] - offset) + 256 * (int64_t)(high[i] - offset));
        }
        total = load(t);
    }
    f32 y = mul(total, mul(all(a.row_scale[m]), o.scale));
    if (a.bias) y = add(y, o.bias);
    write_y(a, m, n, y, a.w.rows - n);
}

// Sums over groups, scaled already: y = row_scale * sum + bias.
DQW_INLINE void finish_groups(const Linear& a, const Outputs& o, int64_t m, int64_t n, f32 sum) {
    f32 y = mul(all(a.row_scale[m]), sum);
    if (a.bias) y = add(y, o.bias);
    write_y(a, m, n, y, a.w.rows - n);
}

// ---- activations ----

template <Type T>
DQW_INLINE f32 read_some(const void* p, int64_t i, int64_t n) {
    return n >= W ? read<T>(p, i) : read<T>(p, i, n);
}

// Rows [begin, end) of x as float32, padded with zeros to whole blocks. For the gemm, `begin` is
// the first row of a register block, stored column by column. For the gemv, in the order in which
// FloatTable gives weights: of each run of 4 W columns first those at 0, 4, 8 …, then 1, 5, 9 ….
void run_prepare_float(const Linear& a, const void* source, int64_t begin, int64_t end, bool gemm) {
    const int64_t cols = a.w.cols, padded = a.w.blocks * kUnit, rows = end - begin;
    float* out = a.x + begin * padded;
    with_type(a.type, [&]<Type T>() {
        for (int64_t i = 0; i < padded; i += 4 * W) {
            for (int64_t r = 0; r < rows; r++) {
                float x[4 * W];
                for (int64_t j = 0; j < 4 * W; j += W) {
                    const int64_t n = cols - i - j;
                    store(x + j,
                          n > 0 ? read_some<T>(source, (begin + r) * cols + i + j, n) : zero());
                }
                if (gemm) {
                    for (int64_t j = 0; j < 4 * W; j++) out[(i + j) * rows + r] = x[j];
                } else {
                    float* run = out + r * padded + i;
                    for (int64_t j = 0; j < 4 * W; j++) run[j % 4 * W + j / 4] = x[j];
                }
            }
        }
    });
}

// Rows [begin, end) of x as int8 with a scale a row, padded with zeros to whole blocks; for the
// gemm interleaved by fours of columns. Also the sums that undo kByteOffset.
void run_prepare_int8(const Linear& a, const void* source, int64_t begin, int64_t end, bool gemm) {
    const int64_t cols = a.w.cols, padded = a.w.blocks * kUnit, rows = end - begin;
    const int64_t group = a.w.group ? a.w.group : cols;
    const int64_t groups = a.w.group ? (cols + group - 1) / group : 1;
    int8_t* out = a.q + begin * padded;
    with_type(a.type, [&]<Type T>() {
        for (int64_t r = 0; r < rows; r++) {
            const int64_t start = (begin + r) * cols;
            const RowRange range = row_range<T>(source, start, start + cols);
            a.row_scale[begin + r] = range.scale;
            for (int64_t g = 0; g < groups; g++) a.row_sum[(begin + r) * groups + g] = 0;
            for (int64_t b = 0; b < padded; b += 32) {  // a group never ends inside 32 columns
                alignas(64) int8_t q[32];
                i32 sums = all_int(0);
                for (int64_t i = b; i < b + 32; i += W) {
                    const int64_t n = cols - i;
                    const f32 x = n > 0 ? read_some<T>(source, start + i, n) : zero();
                    const i32 rounded = truncate(round_activation(x, range.inv));
                    sums = add_int(sums, rounded);
                    store_bytes(q + (i - b), rounded);
                }
                if (b < cols) {
                    a.row_sum[(begin + r) * groups + (a.w.group ? b / group : 0)] += sum_int(sums);
                }
                if (gemm) {
                    for (int64_t i = 0; i < 32; i += 4) {
                        __builtin_memcpy(out + (b + i) * rows + r * 4, q + i, 4);
                    }
                    continue;
                }
                __builtin_memcpy(out + r * padded + b, q, 32);
                if (a.lane_start && kByteOffset) {
                    int32_t* lane = a.lane_start + ((begin + r) * padded + b) / 4;
                    for (int64_t i = 0; i < 8; i++) {
                        lane[i] =
                            -kByteOffset * (q[4 * i] + q[4 * i + 1] + q[4 * i + 2] + q[4 * i + 3]);
                    }
                }
            }
        }
    });
}

// ---- few rows of x ----

// f(first output, pointers to R rows of codes) for outputs [begin, end), R at a time; rows behind
// the end repeat the last one and their results are dropped.
template <int R>
struct RowPointers {
    const uint8_t* p[R];
    RowPointers(const Packed& w, int64_t n) {
        for (int r = 0; r < R; r++) {
            p[r] = w.data + (n + r < w.rows ? n + r : w.rows - 1) * w.row_bytes;
        }
    }
};

template <int B, int M>
void float_rows(const Linear& a, int64_t m0, int64_t begin, int64_t end) {
    constexpr int R = kGemvOutputs;
    const Packed& w = a.w;
    const FloatTable<B> table(w.low);
    const int64_t padded = w.blocks * kUnit;
    const float* x = a.x + m0 * padded;
    float sums[M][W];
    for (int64_t n = begin; n < end; n += W) {
        for (int64_t r0 = 0; r0 < W && n + r0 < end; r0 += R) {
            const RowPointers<R> rows(w, n + r0);
            f32 acc[R][M];
            unroll<R * M>([&](auto i) { acc[i.value / M][i.value % M] = zero(); });
            for (int64_t b = 0; b < w.blocks; b++) {
                unroll<R>([&](auto r) {
                    const Bytes v = table(codes<B>(rows.p[r.value] + b * 8 * B));
                    // Groups: the sum of a part is scaled once; without them, at the end.
                    f32 part[kParts][M];
                    unroll<kParts * 4>([&](auto i) {
                        constexpr int p = i.value / 4, j = i.value % 4;
                        const f32 level = table.template part<j>(v.part[p]);
                        const float* at = x + b * kUnit + i.value * W;
                        unroll<M>([&](auto m) {
                            const f32 value = load(at + m.value * padded);
                            f32& sum = w.group ? part[p][m.value] : acc[r.value][m.value];
                            sum = w.group && j == 0 ? mul(level, value) : fma(level, value, sum);
                        });
                    });
                    if (w.group == 0) return;
                    float first, second;
                    const int64_t row = n + r0 + r.value;
                    scales_of_block(w, row < w.rows ? row : w.rows - 1, b, first, second);
                    unroll<kParts * M>([&](auto i) {
                        constexpr int p = i.value / M, m = i.value % M;
                        acc[r.value][m] =
                            fma(part[p][m], halves<p>(first, second), acc[r.value][m]);
                    });
                });
            }
            unroll<R * M>([&](auto i) {
                sums[i.value % M][r0 + i.value / M] = sum(acc[i.value / M][i.value % M]);
            });
        }
        const Outputs o(w, a.bias, n, end - n);
        for (int m = 0; m < M; m++) finish_float(a, o, m0 + m, n, load(sums[m]));
    }
}

// Integer sums of one plane: totals[m][i] for outputs n + i.
template <int B, int M>
DQW_INLINE void int8_sums(const Linear& a, const Table<B>& table, int64_t m0, int64_t n,
                          int64_t end, int32_t (&totals)[M][W]) {
    constexpr int R = kGemvOutputs;
    const Packed& w = a.w;
    const int64_t padded = w.blocks * kUnit;
    const int8_t* q = a.q + m0 * padded;
    for (int64_t r0 = 0; r0 < W && n + r0 < end; r0 += R) {
        const RowPointers<R> rows(w, n + r0);
        i32 acc[R][M];
        unroll<R * M>([&](auto i) { acc[i.value / M][i.value % M] = all_int(0); });
        for (int64_t b = 0; b < w.blocks; b++) {
            unroll<R>([&](auto r) {
                const Bytes v = table(codes<B>(rows.p[r.value] + b * 8 * B));
                unroll<M * kParts>([&](auto i) {
                    constexpr int m = i.value / kParts, p = i.value % kParts;
                    const i32 x = load_int(q + m * padded + b * kUnit + p * 4 * W);
                    acc[r.value][m] = dot(acc[r.value][m], v.part[p], x);
                });
            });
        }
        unroll<R * M>([&](auto i) {
            totals[i.value % M][r0 + i.value / M] = sum_int(acc[i.value / M][i.value % M]);
        });
    }
}

template <int B, int M>
void int8_rows(const Linear& a, int64_t m0, int64_t begin, int64_t end) {
    const Table<B> low(a.w.low, kByteOffset), high(a.w.high, kByteOffset);
    int32_t totals[M][W], upper[M][W];
    for (int64_t n = begin; n < end; n += W) {
        int8_sums<B, M>(a, low, m0, n, end, totals);
        if (a.w.wide) int8_sums<B, M>(a, high, m0, n, end, upper);
        const Outputs o(a.w, a.bias, n, end - n);
        for (int m = 0; m < M; m++) {
            finish_int8(a, o, m0 + m, n, totals[m], a.w.wide ? upper[m] : nullptr);
        }
    }
}

// With groups: the lanes of a block are exact integers, scaled as floats into the total.
template <int B, int M>
void int8_group_rows(const Linear& a, int64_t m0, int64_t begin, int64_t end) {
    constexpr int R = kGemvOutputs;
    const Packed& w = a.w;
    const Table<B> low(w.low, kByteOffset), high(w.high, kByteOffset);
    const int64_t padded = w.blocks * kUnit;
    const int8_t* q = a.q + m0 * padded;
    const int32_t* lane_start = kByteOffset ? a.lane_start + m0 * padded / 4 : nullptr;
    float sums[M][W];
    for (int64_t n = begin; n < end; n += W) {
        for (int64_t r0 = 0; r0 < W && n + r0 < end; r0 += R) {
            const RowPointers<R> rows(w, n + r0);
            f32 acc[R][M];
            unroll<R * M>([&](auto i) { acc[i.value / M][i.value % M] = zero(); });
            for (int64_t b = 0; b < w.blocks; b++) {
                unroll<R>([&](auto r) {
                    float first, second;
                    const int64_t row = n + r0 + r.value;
                    scales_of_block(w, row < w.rows ? row : w.rows - 1, b, first, second);
                    const Bytes c = codes<B>(rows.p[r.value] + b * 8 * B);
                    for (int plane = 0; plane < (w.wide ? 2 : 1); plane++) {
                        const Bytes v = plane ? high(c) : low(c);
                        const float unit = plane ? 256.0f : 1.0f;
                        unroll<M * kParts>([&](auto i) {
                            constexpr int m = i.value / kParts, p = i.value % kParts;
                            const int64_t k = m * padded + b * kUnit + p * 4 * W;
                            const i32 start =
                                kByteOffset ? load_int(lane_start + k / 4) : all_int(0);
                            const i32 exact = dot(start, v.part[p], load_int(q + k));
                            acc[r.value][m] =
                                fma(to_float(exact), halves<p>(first * unit, second * unit),
                                    acc[r.value][m]);
                        });
                    }
                });
            }
            unroll<R * M>([&](auto i) {
                sums[i.value % M][r0 + i.value / M] = sum(acc[i.value / M][i.value % M]);
            });
        }
        const Outputs o(w, a.bias, n, end - n);
        for (int m = 0; m < M; m++) finish_groups(a, o, m0 + m, n, load(sums[m]));
    }
}

// ---- many rows of x ----

// Decode rows n … n + kTileRows: for every 4 columns, a register with a lane of 4 bytes for each of
// W rows. `level` turns the codes of a block into bytes; `put(unit, t, bytes)` gets columns
// 4 unit … 4 unit + 3 of rows n + t W …
template <int B, class Level, class Put>
DQW_INLINE void fill_tile(const Packed& w, int64_t n, const Level& level, const Put& put) {
    for (int t = 0; t < kTileVectors; t++) {
        for (int64_t b = 0; b < w.blocks; b++) {
            i32 rows[kParts][W];
            for (int r = 0; r < W; r++) {
                const int64_t row = n + t * W + r < w.rows ? n + t * W + r : w.rows - 1;
                const Bytes v = level(codes<B>(w.data + row * w.row_bytes + b * 8 * B));
                for (int p = 0; p < kParts; p++) rows[p][r] = v.part[p];
            }
            for (int p = 0; p < kParts; p++) {
                transpose(rows[p]);
                for (int i = 0; i < W; i++) put((b * kParts + p) * W + i, t, rows[p][i]);
            }
        }
    }
}

template <int B>
void fill_int8_tile(const Packed& w, const int8_t* levels, int64_t n, int32_t* tile) {
    const Table<B> table(levels, kByteOffset);
    fill_tile<B>(w, n, table, [&](int64_t unit, int t, i32 v) {
        store_int(tile + unit * kTileRows + t * W, v);
    });
}

// Scales of kTileRows rows from n, by groups: (groups, kTileRows).
DQW_INLINE void fill_scales(const Packed& w, int64_t n, float* scales) {
    const int64_t groups = w.group ? (w.cols + w.group - 1) / w.group : 1;
    for (int64_t g = 0; g < groups; g++) {
        for (int64_t i = 0; i < kTileRows; i++) {
            scales[g * kTileRows + i] = n + i < w.rows ? scale_at(w, n + i, g) : 0.0f;
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
        fill_tile<B>(w, n, low, [&](int64_t unit, int t, i32 v) {
            f32 s = scale_of(unit * 4, t);
            unroll<4>([&](auto j) {
                if (group % 4 != 0) s = scale_of(unit * 4 + j.value, t);
                store(tile + (unit * 4 + j.value) * kTileRows + t * W,
                      mul(low.template part<j.value>(v), s));
            });
        });
        return;
    }
    // Two planes: the upper one goes through the tile, exact, before the scale.
    fill_tile<B>(w, n, high, [&](int64_t unit, int t, i32 v) {
        unroll<4>([&](auto j) {
            store(tile + (unit * 4 + j.value) * kTileRows + t * W,
                  mul(high.template part<j.value>(v), all(256.0f)));
        });
    });
    fill_tile<B>(w, n, low, [&](int64_t unit, int t, i32 v) {
        unroll<4>([&](auto j) {
            float* at = tile + (unit * 4 + j.value) * kTileRows + t * W;
            const f32 level = add(load(at), low.template part<j.value>(v));
            store(at, mul(level, scale_of(unit * 4 + j.value, t)));
        });
    });
}

// f(Int<rows>()) for rows = 1 … Max.
template <int Max, class F>
DQW_INLINE void with_rows(int64_t rows, const F& f) {
    if constexpr (Max > 1) {
        if (rows < Max) return with_rows<Max - 1>(rows, f);
    }
    f(Int<Max>());
}

// Four columns of M rows of x, broadcast; `q` holds M units of 4 bytes a step.
DQW_INLINE i32 broadcast_unit(const int8_t* q) {
    int32_t unit;
    __builtin_memcpy(&unit, q, 4);
    return all_int(unit);
}

template <int M>
DQW_INLINE void int8_block(const int32_t* tile, const int8_t* q, int64_t steps,
                           i32 (&acc)[M][kTileVectors]) {
    for (int64_t k = 0; k < steps; k++) {
        i32 w[kTileVectors];
        unroll<kTileVectors>([&](auto t) { w[t.value] = load_int(tile + t.value * W); });
        unroll<M>([&](auto m) {
            const i32 x = broadcast_unit(q + 4 * m.value);
            unroll<kTileVectors>(
                [&](auto t) { acc[m.value][t.value] = dot(acc[m.value][t.value], w[t.value], x); });
        });
        tile += kTileRows;
        q += 4 * M;
    }
}

template <int M>
void int8_product(const int32_t* tile, const int8_t* q, int64_t steps, int32_t* sums) {
    i32 acc[M][kTileVectors];
    unroll<M * kTileVectors>(
        [&](auto i) { acc[i.value / kTileVectors][i.value % kTileVectors] = all_int(0); });
    int8_block<M>(tile, q, steps, acc);
    unroll<M * kTileVectors>([&](auto i) {
        store_int(sums + i.value * W, acc[i.value / kTileVectors][i.value % kTileVectors]);
    });
}

template <int M>
void float_product(const float* tile, const float* x, int64_t steps, float* sums) {
    f32 acc[M][kTileVectors];
    unroll<M * kTileVectors>(
        [&](auto i) { acc[i.value / kTileVectors][i.value % kTileVectors] = zero(); });
    for (int64_t k = 0; k < steps; k++) {
        f32 w[kTileVectors];
        unroll<kTileVectors>([&](auto t) { w[t.value] = load(tile + t.value * W); });
        unroll<M>([&](auto m) {
            const f32 v = all(x[m.value]);
            unroll<kTileVectors>(
                [&](auto t) { acc[m.value][t.value] = fma(w[t.value], v, acc[m.value][t.value]); });
        });
        tile += kTileRows;
        x += M;
    }
    unroll<M * kTileVectors>([&](auto i) {
        store(sums + i.value * W, acc[i.value / kTileVectors][i.value % kTileVectors]);
    });
}

// One plane of a matrix with groups: sums[m][output] += unit * sum_g float(sum_g) * scale_g.
template <int M>
void group_product(const Linear& a, const int32_t* tile, const float* scales, const int8_t* q,
                   int64_t m0, float unit, float* sums) {
    const int64_t cols = a.w.cols, group = a.w.group, groups = (cols + group - 1) / group;
    const int64_t steps = a.w.blocks * kUnit / 4;
    f32 total[M][kTileVectors];
    unroll<M * kTileVectors>([&](auto i) {
        total[i.value / kTileVectors][i.value % kTileVectors] = load(sums + i.value * W);
    });
    for (int64_t g = 0; g < groups; g++) {
        i32 acc[M][kTileVectors];
        unroll<M>([&](auto m) {
            const int32_t start = -kByteOffset * a.row_sum[(m0 + m.value) * groups + g];
            unroll<kTileVectors>([&](auto t) { acc[m.value][t.value] = all_int(start); });
        });
        const int64_t begin = g * group / 4;
        const int64_t end = begin + group / 4 < steps ? begin + group / 4 : steps;
        int8_block<M>(tile + begin * kTileRows, q + begin * 4 * M, end - begin, acc);
        unroll<kTileVectors>([&](auto t) {
            const f32 s = mul(load(scales + g * kTileRows + t.value * W), all(unit));
            unroll<M>([&](auto m) {
                f32& sum = total[m.value][t.value];
                sum = fma(to_float(acc[m.value][t.value]), s, sum);
            });
        });
    }
    unroll<M * kTileVectors>([&](auto i) {
        store(sums + i.value * W, total[i.value / kTileVectors][i.value % kTileVectors]);
    });
}

// f(first row of a block, its rows) over rows [m0, m1).
template <class F>
DQW_INLINE void each_block(const Linear& a, int64_t m0, int64_t m1, const F& f) {
    for (int64_t m = m0; m < m1; m += a.block_rows) {
        f(m, m + a.block_rows < m1 ? a.block_rows : m1 - m);
    }
}

void run_gemm_float(const Linear& a, int64_t n, int64_t m0, int64_t m1, void* scratch) {
    const Packed& w = a.w;
    const int64_t padded = w.blocks * kUnit;
    float* tile = (float*)scratch;
    float* scales = tile + padded * kTileRows;
    fill_scales(w, n, scales);
    with_bits(w.bits, [&](auto bits) { fill_float_tile<bits.value>(w, n, scales, tile); });
    alignas(64) float sums[kFloatBlockRows * kTileRows];
    float bias[kTileRows] = {};
    for (int64_t i = 0; a.bias && i < kTileRows && n + i < w.rows; i++) bias[i] = a.bias[n + i];
    each_block(a, m0, m1, [&](int64_t m, int64_t rows) {
        with_rows<kFloatBlockRows>(
            rows, [&](auto r) { float_product<r.value>(tile, a.x + m * padded, padded, sums); });
        for (int64_t i = 0; i < rows; i++) {
            for (int t = 0; t < kTileVectors && n + t * W < w.rows; t++) {
                f32 y = load(sums + i * kTileRows + t * W);
                if (a.bias) y = add(y, load(bias + t * W));
                write_y(a, m + i, n + t * W, y, w.rows - n - t * W);
            }
        }
    });
}

void run_gemm_int8(const Linear& a, int64_t n, int64_t m0, int64_t m1, void* scratch) {
    const Packed& w = a.w;
    const int64_t padded = w.blocks * kUnit, tile_size = padded / 4 * kTileRows;
    int32_t* low = (int32_t*)scratch;
    int32_t* high = low + tile_size;
    float* scales = (float*)(low + (w.wide ? 2 : 1) * tile_size);
    with_bits(w.bits, [&](auto bits) {
        fill_int8_tile<bits.value>(w, w.low, n, low);
        if (w.wide) fill_int8_tile<bits.value>(w, w.high, n, high);
    });
    const Outputs outputs[2] = {
        Outputs(w, a.bias, n, w.rows - n),
        Outputs(w, a.bias, n + (kTileVectors - 1) * W, w.rows - n - (kTileVectors - 1) * W)};
    static_assert(kTileVectors <= 2);

    if (w.group) {
        fill_scales(w, n, scales);
        alignas(64) float sums[kGroupBlockRows * kTileRows];
        each_block(a, m0, m1, [&](int64_t m, int64_t rows) {
            const int8_t* q = a.q + m * padded;
            for (int i = 0; i < kGroupBlockRows * kTileRows; i++) sums[i] = 0;
            with_rows<kGroupBlockRows>(rows, [&](auto r) {
                group_product<r.value>(a, low, scales, q, m, 1.0f, sums);
                if (w.wide) group_product<r.value>(a, high, scales, q, m, 256.0f, sums);
            });
            for (int64_t i = 0; i < rows; i++) {
                for (int t = 0; t < kTileVectors && n + t * W < w.rows; t++) {
                    finish_groups(a, outputs[t], m + i, n + t * W,
                                  load(sums + i * kTileRows + t * W));
                }
            }
        });
        return;
    }

    alignas(64) int32_t sums[kInt8BlockRows * kTileRows], upper[kInt8BlockRows * kTileRows];
    each_block(a, m0, m1, [&](int64_t m, int64_t rows) {
        const int8_t* q = a.q + m * padded;
        with_rows<kInt8BlockRows>(rows, [&](auto r) {
            int8_product<r.value>(low, q, padded / 4, sums);
            if (w.wide) int8_product<r.value>(high, q, padded / 4, upper);
        });
        for (int64_t i = 0; i < rows; i++) {
            for (int t = 0; t < kTileVectors && n + t * W < w.rows; t++) {
                const int64_t at = i * kTileRows + t * W;
                finish_int8(a, outputs[t], m + i, n + t * W, sums + at,
                            w.wide ? upper + at : nullptr);
            }
        }
    });
}

// ---- the table of functions ----

void run_gemv_float(const Linear& a, int64_t begin, int64_t end) {
    with_bits(a.w.bits, [&](auto bits) {
        with_rows<kGemvRows>(a.m,
                             [&](auto m) { float_rows<bits.value, m.value>(a, 0, begin, end); });
    });
}

void run_gemv_int8(const Linear& a, int64_t begin, int64_t end) {
    with_bits(a.w.bits, [&](auto bits) {
        with_rows<kGemvRows>(a.m, [&](auto m) {
            if (a.w.group) {
                int8_group_rows<bits.value, m.value>(a, 0, begin, end);
            } else {
                int8_rows<bits.value, m.value>(a, 0, begin, end);
            }
        });
    });
}

constexpr LinearKernels kLinearKernels = {
    kGemvRows,      kInt8BlockRows,    kFloatBlockRows,  kGroupBlockRows, kTileRows,
    kByteOffset,    run_prepare_float, run_prepare_int8, run_gemv_float,  run_gemv_int8,
    run_gemm_float, run_gemm_int8,     run_dequantize,   run_levels};

}  // namespace
}  // namespace dqw
