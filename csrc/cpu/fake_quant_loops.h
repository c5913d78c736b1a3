// The loops of fake quantization over the lanes of isa_*.h, included once by each tier.
//
// Per weight: t = |x| * (2 / scale); k = floor(min(t, 2 level_max)); y = copysign(level[k] * scale,
// x). One read and one write of memory; no temporary but registers.
#pragma once

namespace dqw {
namespace {

// t = |x| * inv clipped to 0 … last. NaN (from x, or 0 * infinity for a scale of zero) becomes 0.
DQW_INLINE f32 clip(f32 t, f32 last) { return min(max(t, zero()), last); }

template <Type T, class F>
DQW_INLINE void each_vector(const void* x, int64_t begin, int64_t end, const F& f) {
    int64_t i = begin;
    for (; i + W <= end; i += W) f(i, read<T>(x, i), (int64_t)W);
    if (i < end) f(i, read<T>(x, i, end - i), end - i);
}

template <Type T>
DQW_INLINE void put(void* y, int64_t i, f32 x, int64_t n) {
    if (n == W) {
        write<T>(y, i, x);
    } else {
        write<T>(y, i, x, n);
    }
}

// f(begin, end, scale, segment) for every run of columns with one scale, in rows [r0, r1).
template <class F>
DQW_INLINE void each_segment(const FakeQuant& a, int64_t r0, int64_t r1, const F& f) {
    const int64_t groups = (a.cols + a.group - 1) / a.group;
    for (int64_t r = r0; r < r1; r++) {
        for (int64_t g = 0; g < groups; g++) {
            const int64_t begin = g * a.group;
            const int64_t end = begin + a.group < a.cols ? begin + a.group : a.cols;
            f(r * a.cols + begin, r * a.cols + end, a.scale[r * a.scale_stride + g],
              r * groups + g);
        }
    }
}

template <Type T, class Lookup>
void forward(const FakeQuant& a, const Lookup& level, int64_t r0, int64_t r1) {
    const f32 last = all((float)(a.grid.size - 1));
    each_segment(a, r0, r1, [&](int64_t begin, int64_t end, float s, int64_t) {
        const f32 scale = all(s), inv = all(2.0f / s);
        each_vector<T>(a.x, begin, end, [&](int64_t i, f32 x, int64_t n) {
            const f32 t = clip(mul(absolute(x), inv), last);
            const f32 y = copy_sign(mul(level(truncate(t)), scale), x);
            put<T>(a.y, i, where_nan(x, x, y), n);
        });
    });
}

// dx = g inside the clip, else 0; dscale = sum of g * sign(x) * (level - |x|/scale inside, level
// outside). |x|/scale is t/2: the same quotient, without a division a weight.
template <Type T, class Lookup>
void backward(const FakeQuant& a, const Lookup& level, int64_t r0, int64_t r1) {
    const f32 last = all((float)(a.grid.size - 1)), half = all(0.5f);
    each_segment(a, r0, r1, [&](int64_t begin, int64_t end, float s, int64_t segment) {
        const f32 inv = all(2.0f / s);
        f32 total = zero();
        each_vector<T>(a.x, begin, end, [&](int64_t i, f32 x, int64_t n) {
            const f32 g = n == W ? read<T>(a.grad, i) : read<T>(a.grad, i, n);
            const f32 t = mul(absolute(x), inv);
            const f32 l = level(truncate(clip(t, last)));
            const f32 inside = where_not_above(t, last, sub(l, mul(t, half)), l);
            total = add(total, mul(g, where_nan(x, x, flip_sign(inside, x))));
            put<T>(a.y, i, where_nan(x, g, where_not_above(t, last, g, zero())), n);
        });
        a.dscale[segment] = sum(total);
    });
}

template <Type T, class Lookup>
void quantize(const FakeQuant& a, const Lookup& level, int64_t r0, int64_t r1) {
    const f32 last = all((float)(a.grid.size - 1));
    int16_t* y = (int16_t*)a.y;
    each_segment(a, r0, r1, [&](int64_t begin, int64_t end, float s, int64_t) {
        const f32 inv = all(2.0f / s);
        each_vector<T>(a.x, begin, end, [&](int64_t i, f32 x, int64_t n) {
            const f32 l = level(truncate(clip(mul(absolute(x), inv), last)));
            const i32 signed_level = truncate(flip_sign(l, x));
            if (n == W) return store_words(y + i, signed_level);
            int16_t few[W];
            store_words(few, signed_level);
            for (int64_t j = 0; j < n; j++) y[i + j] = few[j];
        });
    });
}

// Rows [r0, r1), a register of them at a time; what their columns pass on stays in the first cache.
template <class Lookup>
void round_columns(const Columns& a, const Lookup& level, int64_t r0, int64_t r1) {
    const f32 last = all((float)(a.grid.size - 1));
    for (int64_t r = r0; r < r1; r += W) {
        const int64_t n = r1 - r < W ? r1 - r : W;
        const auto take = [&](const float* p, int64_t i) DQW_INLINED {
            const int64_t at = i * a.rows + r;
            return n == W ? load(p + at) : read<Type::f32>(p, at, n);
        };
        float state[kMostColumns * W];
        for (int64_t i = 0; i < a.cols; i++) store(state + i * W, take(a.state, i));
        for (int64_t i = 0; i < a.cols; i++) {
            f32 x = load(state + i * W), base = zero();
            const f32 divisor = all(a.divisor[i]), scale = take(a.scale, i);
            if (a.base) {
                base = take(a.base, i);
                x = add(base, divide(x, divisor));
            }
            const f32 t = clip(mul(absolute(x), divide(all(2.0f), scale)), last);
            f32 y = copy_sign(mul(level(truncate(t)), scale), x);
            y = where_nan(x, x, y);
            const f32 delta = a.base ? sub(y, base) : divide(sub(x, y), divisor);
            put<Type::f32>(a.rounded, i * a.rows + r, y, n);
            put<Type::f32>(a.delta, i * a.rows + r, delta, n);
            for (int64_t j = i + 1; j < a.cols; j++) {
                const f32 passed = mul(all(a.coefficient[i * a.cols + j]), delta);
                store(state + j * W, sub(load(state + j * W), passed));
            }
        }
    }
}

// A row of activations, to be rounded to 255 levels of its own largest magnitude.
struct RowRange {
    float inv, scale;  // q = round(x * inv), y = q * scale
};
// The largest magnitude, as bits. Magnitudes compare as integers, and NaN and infinity are the
// largest.
template <Type T>
DQW_INLINE uint32_t largest_bits(const void* x, int64_t begin, int64_t end) {
    i32 largest = all_int(0);
    each_vector<T>(x, begin, end, [&](int64_t, f32 v, int64_t) {
        largest = max_int(largest, bits_of(absolute(v)));
    });
    return (uint32_t)largest_int(largest);
}
template <Type T>
DQW_INLINE RowRange row_range(const void* x, int64_t begin, int64_t end) {
    union {
        uint32_t bits;
        float value;
    } amax = {largest_bits<T>(x, begin, end)};
    if (amax.bits >= 0x7f800000) return {0.0f, __builtin_nanf("")};
    const float inv = 1.0f / amax.value * 127.0f;  // in this order, as the reference
    // Zero, or so small (below 4e-37) that 127 / amax overflows: the row is a row of zeros.
    if (!(inv <= __FLT_MAX__)) return {0.0f, amax.value / 127.0f};
    return {inv, amax.value / 127.0f};
}
// x * inv to the nearest integer, ties to even; 0 where x is not finite (inv is 0 then).
DQW_INLINE f32 round_activation(f32 x, float inv) {
    const f32 limit = all(127.0f);
    const f32 q = round_even(min(max(mul(x, all(inv)), all(-127.0f)), limit));
    return inv == 0.0f ? zero() : q;
}

template <Type T>
void activation(const FakeQuant& a, int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; r++) {
        const int64_t begin = r * a.cols, end = begin + a.cols;
        const RowRange range = row_range<T>(a.x, begin, end);
        const f32 scale = all(range.scale);
        each_vector<T>(a.x, begin, end, [&](int64_t i, f32 x, int64_t n) {
            put<T>(a.y, i, mul(round_activation(x, range.inv), scale), n);
        });
    }
}

template <class F>
DQW_INLINE void with_type(Type t, const F& f) {
    if (t == Type::f32) return f.template operator()<Type::f32>();
    if (t == Type::f16) return f.template operator()<Type::f16>();
    f.template operator()<Type::bf16>();
}

}  // namespace
}  // namespace dqw
