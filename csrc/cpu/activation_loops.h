// What few rows of x (gemv) and many (gemm) share over the lanes of isa_*.h: how x is rounded, and
// results on the way out; and x on its way into the gemv (into the gemm: block_loops.h).
//
// Integer sums are exact in int32 (|sum| <= 65536 * 255 * 128 < 2^31, which is why the operator
// sends longer rows elsewhere). Tables with |level| > 127 are two planes of bytes, each run as a
// matrix of its own and put together as low + 256 * high in 64 bits. Float activations may be
// planes too, three rows of q: digits to base 256, put together as floats.
#pragma once

namespace dqw {
namespace {

constexpr int64_t kUnit = 64;  // columns of a block

DQW_INLINE int planes_of(const Linear& a) { return a.planes > 1 ? a.planes : 1; }

// f(Int<rows>()) for rows = 1 … Max.
template <int Max, class F>
DQW_INLINE void with_rows(int64_t rows, const F& f) {
    if constexpr (Max > 1) {
        if (rows < Max) return with_rows<Max - 1>(rows, f);
    }
    f(Int<Max>());
}

// Scales of W rows from n as floats, one for every Span columns of [begin, end); → the step from
// row to row. Groups are multiples of Span columns. Where whole rows need no copy of any scale they
// lie side by side, as they do in memory.
constexpr int64_t kScaleColumns = 2048;  // at most, for the room of `out`
constexpr int64_t kMostScales = kScaleColumns / kQuarter;
template <int Span>
DQW_INLINE int64_t load_scales(const Packed& w, int64_t n, int64_t begin, int64_t end, float* out) {
    const GroupOf group_of(w.group);
    const int64_t groups = (w.cols + w.group - 1) / w.group, spans = (end - begin) / Span;
    const int64_t rows = w.rows - n < W ? w.rows - n : W;
    const auto convert = [&](int64_t from, int64_t count, float* to) {
        for (int64_t i = 0; i < count; i += W) store(to + i, scales_at(w, from + i, count - i));
    };
    const int64_t each = w.group / Span;
    if (spans == groups * each) {
        float scale[W * kMostScales / 2 + W];
        float* own = each == 1 ? out : scale;
        convert(n * groups, rows * groups, own);
        for (int64_t i = 0; each == 2 && i < rows * groups; i++)
            out[2 * i] = out[2 * i + 1] = own[i];
        for (int64_t i = 0; each > 2 && i < rows * groups; i++) {
            for (int64_t j = 0; j < each; j++) out[i * each + j] = own[i];
        }
        return spans;
    }
    const int64_t g0 = group_of(begin), own = group_of(end - 1) + 1;
    const int64_t g1 = own < groups ? own : groups;
    for (int64_t r = 0; r < rows; r++) {
        float scale[kMostScales + W], *to = out + r * kMostScales;
        if (each == 1 && begin % w.group == 0) {
            convert((n + r) * groups + g0, g1 - g0, to);
            for (int64_t i = g1 - g0; i < spans; i++) to[i] = to[i - 1];
            continue;
        }
        convert((n + r) * groups + g0, g1 - g0, scale);
        int64_t i = 0;
        for (int64_t g = g0; g < g1; g++) {
            // Up to the next group, and a little too far; the last one fills the row up.
            const int64_t stop = g + 1 < g1 ? ((g + 1) * w.group - begin) / Span : spans;
            for (int64_t j = i; j < stop; j += W) store(to + j, all(scale[g - g0]));
            i = stop;
        }
    }
    return kMostScales;
}

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
        const int64_t some = count < W ? count : W;
        if (w.group) {
            scale = all(1.0f);
        } else if (w.scale_stride == 0) {
            scale = all(scale_at(w, 0, 0));
        } else if (some <= 0) {
            scale = zero();
        } else {
            scale = scales_at(w, n, some);
        }
        bias = zero();
        if (b && some > 0) bias = some == W ? load(b + n) : read<Type::f32>(b, n, some);
    }
};

// y = `v` + bias: W outputs from n of row `m`.
DQW_INLINE void finish(const Linear& a, const Outputs& o, int64_t m, int64_t n, f32 v) {
    write_y(a, m, n, a.bias ? add(v, o.bias) : v, a.w.rows - n);
}

// Of integer sums of row `m`: float(sum) * (row_scale * scale). `high` only for wide tables; the
// sums of x's planes are `stride` apart.
DQW_INLINE f32 scaled_sums(const Linear& a, const Outputs& o, int64_t m, const int32_t* low,
                           const int32_t* high, int planes, int64_t stride) {
    const int32_t* start = a.row_start + m * planes;
    f32 total;
    if (high == nullptr) {
        total = to_float(add_int(load_int(low), all_int(start[0])));
        for (int p = 1; p < planes; p++) {
            const i32 sum = add_int(load_int(low + p * stride), all_int(start[p]));
            total = fma(total, all(256.0f), to_float(sum));
        }
    } else {
        float t[W];
        for (int i = 0; i < W; i++) {
            const int64_t l = low[i] + start[0], h = high[i] + start[0];
            t[i] = (float)(l + 256 * h);
        }
        total = load(t);
    }
    return mul(total, mul(all(a.row_scale[m]), o.scale));
}

// Of sums over groups, which their scales are in already.
DQW_INLINE f32 scaled_groups(const Linear& a, int64_t m, const float* sums, int planes,
                             int64_t stride) {
    f32 sum = load(sums);
    for (int p = 1; p < planes; p++) sum = fma(sum, all(256.0f), load(sums + p * stride));
    return mul(all(a.row_scale[m]), sum);
}

// ---- activations ----

// Rows [begin, end) of x for the gemv as float32, padded with zeros to whole blocks, in the order
// in which FloatTable gives weights: of each run of 4 W columns first those at 0, 4, 8 …, then 1,
// 5, 9 ….
void run_prepare_float(const Linear& a, const void* source, int64_t begin, int64_t end) {
    const int64_t cols = a.w.cols, padded = a.w.blocks * kUnit;
    with_type(a.type, [&]<Type T>() {
        for (int64_t r = begin; r < end; r++) {
            for (int64_t i = 0; i < padded; i += 4 * W) {
                float x[4 * W];
                for (int64_t j = 0; j < 4 * W; j += W) {
                    const int64_t n = cols - i - j;
                    store(x + j, n > 0 ? read_some<T>(source, r * cols + i + j, n) : zero());
                }
                float* run = a.x + r * padded + i;
                for (int64_t j = 0; j < 4 * W; j++) run[j % 4 * W + j / 4] = x[j];
            }
        }
    });
}

// The power of two that makes a row of x integers of three digits, and back; for a row with NaN or
// infinity as row_range.
template <Type T>
DQW_INLINE RowRange digit_range(const void* x, int64_t begin, int64_t end) {
    union Bits {
        uint32_t bits;
        float value;
    };
    const Bits largest = {largest_bits<T>(x, begin, end)};
    if (largest.bits >= 0x7f800000) return {0.0f, __builtin_nanf("")};
    const int exponent = (int)(largest.bits >> 23);  // with its bias of 127
    // largest * 2^shift lies in 2^22 … 2^23; the smallest numbers need not be scaled beyond 2^119.
    int shift = 22 + 127 - (exponent > 30 ? exponent : 30);
    const Bits inv = {(uint32_t)(shift + 127) << 23};
    if (largest.value * inv.value > 127 * 65793.0f) shift--;  // 127 in every digit
    return {Bits{(uint32_t)(shift + 127) << 23}.value, Bits{(uint32_t)(127 - shift) << 23}.value};
}

template <Type T>
DQW_INLINE RowRange activation_range(const void* x, int64_t begin, int64_t end, int planes) {
    return planes == 1 ? row_range<T>(x, begin, end) : digit_range<T>(x, begin, end);
}

// x as integers of three digits to base 256, and the last of them taken away.
DQW_INLINE i32 scaled_digits(f32 x, float inv) {
    return truncate(round_even(mul(inv == 0.0f ? zero() : x, all(inv))));
}
DQW_INLINE i32 take_digit(i32& rest) {
    const i32 digit = low_byte(rest);
    rest = shift_right_8(sub_int(rest, digit));
    return digit;
}

// Where sums of a gemv with groups start, for one row of q.
void fill_lane_start(const Linear& a, int64_t row) {
    const int64_t padded = a.w.blocks * kUnit, step = kStepBlocks * kUnit;
    const bool split = a.w.group % 64 != 0;
    const int offset = byte_offset(a.w);
    const int8_t* q = a.q + row * padded;
    char* out = (char*)(a.lane_start) + row * padded;
    const auto fill = [&](int64_t i, auto blocks) {
        const i32 q0 = load_part<blocks.value>(q + i, 0), q1 = load_part<blocks.value>(q + i, 1);
        with_dot<4>(a.w, [&](auto dot) {
            if (split) {
                store_part<blocks.value>(out + i, 0, dot.start(q0, all_int(0), offset));
                store_part<blocks.value>(out + i, 1, dot.start(q1, all_int(0), offset));
            } else {
                store_part<blocks.value>(out + i, 0, dot.start(q0, q1, offset));
            }
        });
    };
    int64_t i = 0;
    for (; i + step <= padded; i += step) fill(i, Int<kStepBlocks>());
    if (i < padded) fill(i, Int<1>());
}

// Rows [begin, end) of x for the gemv as int8 with a scale a row, or as digits (Linear::planes),
// padded with zeros to whole blocks. Also what undoes the weights' offset: lane_start with groups,
// else row_start.
template <Type T>
void prepare_rows(const Linear& a, const void* source, int64_t begin, int64_t end) {
    const int planes = planes_of(a);
    const int64_t cols = a.w.cols, padded = a.w.blocks * kUnit;
    for (int64_t r = begin; r < end; r++) {
        const int64_t start = r * cols;
        const RowRange range = activation_range<T>(source, start, start + cols, planes);
        a.row_scale[r] = range.scale;
        i32 sums[3] = {all_int(0), all_int(0), all_int(0)};
        for (int64_t b = 0; b < padded; b += kQuarter) {
            alignas(64) int8_t q[3][kQuarter];
            for (int64_t i = b; i < b + kQuarter; i += W) {
                const int64_t n = cols - i;
                const f32 x = n > 0 ? read_some<T>(source, start + i, n) : zero();
                if (planes == 1) {
                    const i32 rounded = truncate(round_activation(x, range.inv));
                    sums[0] = add_int(sums[0], rounded);
                    store_bytes(q[0] + (i - b), rounded);
                    continue;
                }
                i32 rest = scaled_digits(x, range.inv);
                for (int p = planes - 1; p >= 0; p--) {
                    const i32 digit = take_digit(rest);
                    sums[p] = add_int(sums[p], digit);
                    store_bytes(q[p] + (i - b), digit);
                }
            }
            for (int p = 0; p < planes; p++) {
                int8_t* to = a.q + (r * planes + p) * padded;
                to += 32 * place_of(b / 32, padded / 32) + b % 32;
                __builtin_memcpy(to, q[p], kQuarter);
            }
        }
        for (int p = 0; p < planes; p++) {
            const int64_t row = r * planes + p;
            if (a.w.group == 0) {
                a.row_start[row] = -byte_offset(a.w) * sum_int(sums[p]);
            } else if (byte_offset(a.w) != 0) {
                fill_lane_start(a, row);
            }
        }
    }
}

// The same with a scale a row, in the order of the columns and nothing beside it.
void run_quantize_rows(const Linear& a, const void* source, int64_t begin, int64_t end) {
    const int64_t cols = a.w.cols, padded = a.w.blocks * kUnit;
    with_type(a.type, [&]<Type T>() {
        for (int64_t r = begin; r < end; r++) {
            const int64_t start = r * cols;
            const RowRange range = row_range<T>(source, start, start + cols);
            a.row_scale[r] = range.scale;
            for (int64_t i = 0; i < padded; i += W) {
                const f32 x = i < cols ? read_some<T>(source, start + i, cols - i) : zero();
                store_bytes(a.q + r * padded + i, truncate(round_activation(x, range.inv)));
            }
        }
    });
}

void run_prepare_int8(const Linear& a, const void* source, int64_t begin, int64_t end) {
    with_type(a.type, [&]<Type T>() { prepare_rows<T>(a, source, begin, end); });
}

}  // namespace
}  // namespace dqw
