// Many rows of x on their way into the gemm: blocks of up to W rows, a lane each, interleaved so
// that a step of the register block finds what it multiplies side by side.
//
//   float  (padded cols, rows) float32
//   int8   (padded cols / 4, rows, 4): the bytes of four columns are one lane
//
// Rows of a block are W runs of memory; they are turned in registers, as storing 4 bytes at a time
// took 1.6 times as long (Zen 4, 1500 x 512 and 1500 x 2048).
#pragma once

namespace dqw {
namespace {

// Rows [begin, end) of x as float32, padded with zeros to whole blocks of columns.
void run_block_float(const Linear& a, const void* source, int64_t begin, int64_t end) {
    const int64_t cols = a.w.cols, padded = a.w.blocks * kUnit, rows = end - begin;
    float* out = a.x + begin * padded;
    with_type(a.type, [&]<Type T>() {
        for (int64_t i = 0; i < padded; i += W) {
            const int64_t n = cols - i;
            i32 v[W];
            for (int64_t r = 0; r < W; r++) {
                const bool some = r < rows && n > 0;
                v[r] = bits_of(some ? read_some<T>(source, (begin + r) * cols + i, n) : zero());
            }
            transpose(v);
            for (int64_t j = 0; j < W; j++) {
                write<Type::f32>(out, (i + j) * rows, as_floats(v[j]), rows);
            }
        }
    });
}

// What 64 columns from `column` add to the starts of their groups, multiples of 16 columns.
DQW_INLINE void start_by_group(const Linear& a, const GroupOf& group_of, int64_t column,
                               const i32 (&x)[kVectors], int32_t* starts) {
    i32 quarter[kUnit / kQuarter];
    unroll<kUnit / kQuarter>([&](auto i) DQW_INLINED {
        constexpr int each = kQuarter / W;  // registers
        quarter[i.value] = x[i.value * each];
        if (each == 2) quarter[i.value] = add_int(quarter[i.value], x[i.value * each + each - 1]);
    });
    int32_t sums[kUnit / kQuarter];
    store_sums(sums, quarter);
    for (int64_t i = 0; i < kUnit / kQuarter && column + i * kQuarter < a.w.cols; i++) {
        starts[group_of(column + i * kQuarter)] -= byte_offset(a.w) * sums[i];
    }
}

// Rows [begin, end) of x as int8 with a scale a row, or as digits (Linear::planes), padded like the
// floats. Also what undoes the weights' offset.
template <Type T>
void block_int8(const Linear& a, const void* source, int64_t begin, int64_t end) {
    const int planes = planes_of(a);
    const int64_t cols = a.w.cols, padded = a.w.blocks * kUnit;
    const int64_t count = end - begin, rows = count * planes;
    const GroupOf group_of(a.w.group);
    const int64_t groups = a.w.group ? (cols + a.w.group - 1) / a.w.group : 1;
    int8_t* out = a.q + begin * planes * padded;
    int32_t* row_start = a.row_start + begin * planes * groups;
    for (int64_t i = 0; i < rows * groups; i++) row_start[i] = 0;
    constexpr int64_t kSize = T == Type::f32 ? 4 : 2;
    float inv[W];
    i32 sums[W], bytes[kParts][W];
    for (int r = 0; r < W; r++) {
        sums[r] = all_int(0);
        for (int p = 0; p < kParts; p++) bytes[p][r] = all_int(0);
    }
    for (int64_t r = 0; r < count; r++) {
        const int64_t start = (begin + r) * cols;
        const RowRange range = activation_range<T>(source, start, start + cols, planes);
        a.row_scale[begin + r] = range.scale;
        inv[r] = range.inv;
    }
    for (int64_t b = 0; b < padded; b += kUnit) {
        const auto take = [&](int64_t row, const i32(&q)[kVectors]) DQW_INLINED {
            if (a.w.group) {
                start_by_group(a, group_of, b, q, row_start + row * groups);
            } else {
                unroll<kVectors>([&](auto j)
                                     DQW_INLINED { sums[row] = add_int(sums[row], q[j.value]); });
            }
            unroll<kParts>([&](auto p) DQW_INLINED {
                const i32* from = q + 4 * p.value;
                bytes[p.value][row] = pack_bytes(from[0], from[1], from[2], from[3]);
            });
        };
        for (int64_t r = 0; r < count; r++) {
            // The next block's rows, while these are at work: into L2, as this block's are there.
            const char* next = (const char*)source + ((end + r) * cols + b) * kSize;
            for (int64_t i = 0; i < kUnit * kSize; i += 64) __builtin_prefetch(next + i, 0, 2);
            i32 q[kVectors];
            unroll<kVectors>([&](auto j) DQW_INLINED {
                const int64_t i = b + j.value * W, n = cols - i;
                const f32 x = n > 0 ? read_some<T>(source, (begin + r) * cols + i, n) : zero();
                q[j.value] =
                    planes == 1 ? truncate(round_activation(x, inv[r])) : scaled_digits(x, inv[r]);
            });
            if (planes == 1) {
                take(r, q);
                continue;
            }
            for (int p = planes - 1; p >= 0; p--) {
                i32 digit[kVectors];
                unroll<kVectors>([&](auto j)
                                     DQW_INLINED { digit[j.value] = take_digit(q[j.value]); });
                take(r * planes + p, digit);
            }
        }
        for (int p = 0; p < kParts; p++) {
            i32 v[W];
            for (int r = 0; r < W; r++) v[r] = bytes[p][r];
            transpose(v);
            for (int i = 0; i < W; i++) {  // v[i]: the i-th unit of pack_bytes, of every row
                const int64_t unit = b / 4 + p * W + i % 4 * (W / 4) + i / 4;
                write<Type::f32>(out, unit * rows, as_floats(v[i]), rows);
            }
        }
    }
    if (a.w.group) return;
    for (int64_t i = 0; i < rows; i++) row_start[i] = -byte_offset(a.w) * sum_int(sums[i]);
}

void run_block_int8(const Linear& a, const void* source, int64_t begin, int64_t end) {
    with_type(a.type, [&]<Type T>() { block_int8<T>(a, source, begin, end); });
}

}  // namespace
}  // namespace dqw
