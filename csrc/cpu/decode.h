// Packed codes to levels and floats over the lanes of isa_*.h.
#pragma once

namespace dqw {
namespace {

template <int N>
struct Int {
    static constexpr int value = N;
};

template <class F>
DQW_INLINE void with_bits(int bits, const F& f) {
    switch (bits) {
        case 2:
            return f(Int<2>());
        case 3:
            return f(Int<3>());
        case 4:
            return f(Int<4>());
        case 5:
            return f(Int<5>());
        case 6:
            return f(Int<6>());
        case 7:
            return f(Int<7>());
        default:
            return f(Int<8>());
    }
}

// f(Int<0>()) … f(Int<N - 1>()), unrolled.
template <int N, class F>
DQW_INLINE void unroll(const F& f) {
    if constexpr (N > 0) {
        unroll<N - 1>(f);
        f(Int<N - 1>());
    }
}

constexpr int kVectors = 64 / W;  // registers of 32-bit lanes for a block of codes

template <Type T>
DQW_INLINE f32 read_some(const void* p, int64_t i, int64_t n) {
    return n >= W ? read<T>(p, i) : read<T>(p, i, n);
}

// W scales from the i-th; those behind the next n are any.
DQW_INLINE f32 scales_at(const Packed& w, int64_t i, int64_t n) {
    switch (w.scale_type) {
        case ScaleType::f32:
            return read_some<Type::f32>(w.scale, i, n);
        case ScaleType::f16:
            return read_some<Type::f16>(w.scale, i, n);
        default:
            return read_scales((const uint8_t*)w.scale + i, n < W ? n : W, w.lowest_scale);
    }
}

DQW_INLINE float scale_at(const Packed& w, int64_t row, int64_t group) {
    const int64_t i = row * w.scale_stride + group;
    switch (w.scale_type) {
        case ScaleType::f32:
            return ((const float*)w.scale)[i];
        case ScaleType::f16:
            return half_to_float(((const uint16_t*)w.scale)[i]);
        default:
            const int32_t b = (((const uint8_t*)w.scale)[i] << kScaleShift) + w.lowest_scale;
            float scale;
            __builtin_memcpy(&scale, &b, 4);
            return scale;
    }
}

// The group of a column: a shift where it can be one. Without groups all columns are group 0.
struct GroupOf {
    int64_t group;
    int shift;
    explicit GroupOf(int64_t group)
        : group(group),
          shift(group == 0            ? 62
                : group & (group - 1) ? -1
                                      : __builtin_ctzll(group)) {}
    int64_t operator()(int64_t column) const {
        return shift >= 0 ? column >> shift : column / group;
    }
};

// Scales of block b by quarters, 16 columns each, if groups are multiples of 16 columns.
constexpr int kQuarter = 16;
DQW_INLINE void scales_of_block(const Packed& w, const GroupOf& group_of, int64_t row, int64_t b,
                                float (&scale)[64 / kQuarter]) {
    int64_t before = -1;
    float s = 0;
    for (int i = 0; i < 64 / kQuarter; i++) {
        const int64_t column = b * 64 + i * kQuarter;
        const int64_t g = group_of(column < w.cols ? column : w.cols - 1);
        if (g != before) s = scale_at(w, row, g);
        scale[i] = s;
        before = g;
    }
}

// Levels of a block as integers: low + 256 * high.
template <int B>
struct Levels {
    Table<B> low, high;
    bool wide;
    explicit Levels(const Packed& w) : low(w.low, 0), high(w.high, 0), wide(w.wide) {}
    void operator()(const uint8_t* p, i32 (&out)[kVectors]) const {
        const Bytes c = codes<B>(p), l = low(c);
        unroll<kVectors>([&](auto j) DQW_INLINED { out[j.value] = widen<j.value>(l); });
        if (!wide) return;
        const Bytes h = high(c);
        unroll<kVectors>([&](auto j) DQW_INLINED {
            const i32 x = widen<j.value>(h);
            out[j.value] = add_int(out[j.value], shift_left_8(x));
        });
    }
};

// The weights of one row, a block at a time: float(level) * scale, rounded once.
template <int B>
struct Weights {
    const Packed& w;
    Levels<B> levels;
    GroupOf group_of;
    explicit Weights(const Packed& w) : w(w), levels(w), group_of(w.group) {}
    void operator()(int64_t row, int64_t b, f32 (&out)[kVectors]) const {
        i32 level[kVectors];
        levels(w.data + row * w.row_bytes + b * 8 * B, level);
        if (w.group % kQuarter == 0) {
            float s[64 / kQuarter];
            scales_of_block(w, group_of, row, b, s);
            for (int j = 0; j < kVectors; j++) {
                out[j] = mul(to_float(level[j]), all(s[j * W / kQuarter]));
            }
            return;
        }
        float s[64];  // any other group size: a scale for every column
        for (int64_t i = 0; i < 64; i++) {
            const int64_t column = b * 64 + i;
            s[i] = scale_at(w, row, group_of(column < w.cols ? column : w.cols - 1));
        }
        for (int j = 0; j < kVectors; j++) out[j] = mul(to_float(level[j]), load(s + j * W));
    }
};

[[maybe_unused]] void run_dequantize(const Packed& w, int64_t row, float* out) {
    with_bits(w.bits, [&](auto bits) {
        const Weights<bits.value> weights(w);
        f32 v[kVectors];
        for (int64_t b = 0; b < w.blocks; b++) {
            weights(row, b, v);
            for (int j = 0; j < kVectors; j++) {
                const int64_t i = b * 64 + j * W, n = w.cols - i;
                if (n >= W) {
                    write<Type::f32>(out, i, v[j]);
                } else if (n > 0) {
                    write<Type::f32>(out, i, v[j], n);
                }
            }
        }
    });
}

[[maybe_unused]] void run_levels(const Packed& w, int64_t row,
                                 int16_t* out) {  // padded to whole blocks
    with_bits(w.bits, [&](auto bits) {
        const Levels<bits.value> levels(w);
        i32 v[kVectors];
        for (int64_t b = 0; b < w.blocks; b++) {
            levels(w.data + row * w.row_bytes + b * 8 * bits.value, v);
            for (int j = 0; j < kVectors; j++) store_words(out + b * 64 + j * W, v[j]);
        }
    });
}

}  // namespace
}  // namespace dqw
