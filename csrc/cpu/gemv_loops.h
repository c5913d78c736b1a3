// y = x W^T over the lanes of isa_*.h: activations, results, and few rows of x (gemv).
//
// Codes are widened in registers and the packed weight is read once. Integer sums are exact in
// int32
// (|sum| <= 65536 * 255 * 127 < 2^31, which is why the operator sends longer rows elsewhere).
// Tables with |level| > 127 are two planes of bytes, each run as a matrix of its own and put
// together as low + 256 * high in 64 bits.
#pragma once

namespace dqw {
namespace {

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

// f(Int<rows>()) for rows = 1 … Max.
template <int Max, class F>
DQW_INLINE void with_rows(int64_t rows, const F& f) {
    if constexpr (Max > 1) {
        if (rows < Max) return with_rows<Max - 1>(rows, f);
    }
    f(Int<Max>());
}

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

}  // namespace
}  // namespace dqw
