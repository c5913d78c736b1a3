// Products of bfloat16 (bf16.h): W decoded, x and y converted, and the product of one term by one
// by vdpbf16ps, which adds two products of bfloat16 to each float32 sum.
#include "bf16.h"
#include "isa_avx512.h"
// The loops need the lanes above, and each other in this order.
#include "bf16_pairs.h"
//
#include "decode.h"
//
#include "tile_loops.h"

namespace dqw {
namespace {

using bf16 = __m512bh;

// Scales of a strip's 32 rows, of the groups [first, last]: (groups, 32).
void scales_of_strip(const Packed& w, int64_t n, int64_t first, int64_t last, float* out) {
    for (int64_t g = first; g <= last; g += W) {
        const int64_t some = last + 1 - g < W ? last + 1 - g : W;
        for (int t = 0; t < 2; t++) {
            i32 v[W];
            for (int r = 0; r < W; r++) {
                const int64_t row = n + t * W + r < w.rows ? n + t * W + r : w.rows - 1;
                const int64_t i = row * w.scale_stride + g;
                v[r] = bits_of(scales_at(w, i, some));
            }
            transpose(v);
            for (int64_t i = 0; i < some; i++) {
                store_int(out + (g - first + i) * kTileRows + t * W, v[i]);
            }
        }
    }
}

// What fill_tile asks of a table, for codes as they are; those of 4 bits keep their upper bits,
// which the lookup of floats does not mind.
struct Codes {
    Bytes operator()(Bytes c) const { return c; }
    i32 packed_low(i32 x) const { return x; }
    i32 packed_high(i32 x) const { return _mm512_srli_epi16(x, 4); }
};

// What is left of two registers of floats behind `pairs`, their bfloat16.
DQW_INLINE void take_off(i32 pairs, f32& a, f32& b) {
    a = sub(a, as_floats(_mm512_slli_epi32(pairs, 16)));
    b = sub(b, as_floats(_mm512_and_si512(pairs, all_int(0xffff0000))));
}

template <int B, bool Wide, bool Scaled, int Terms>
void decode(const Packed& whole, int64_t strip, int64_t begin, int64_t end, float* scales,
            uint16_t* out) {
    Packed w = whole;
    w.data += begin * 8 * B;
    w.blocks = end - begin;
    const int64_t n = strip * kTileRows;
    const GroupOf group_of(w.group);
    const int64_t most = w.cols > 0 ? w.cols - 1 : 0;
    const auto group_at = [&](int64_t column) { return group_of(column < most ? column : most); };
    const int64_t first = group_at(begin * 64);
    if (Scaled) scales_of_strip(w, n, first, group_at(end * 64 - 1), scales);
    const bool split = w.group % 4 != 0;  // a scale may change inside 4 columns
    const FloatTable<B> low(w.low), high(w.high);
    fill_tile<B>(w, n, Codes(), [&](int64_t unit, int t, i32 v) DQW_INLINED {
        const auto scale_at = [&](int j) DQW_INLINED {
            const int64_t g = group_at(begin * 64 + unit * 4 + j) - first;
            return load(scales + g * kTileRows + t * W);
        };
        f32 s = Scaled ? scale_at(0) : zero(), x[4];
        const i32 l = B <= 5 ? v : low.bytes.look_up(v), h = B <= 5 ? v : high.bytes.look_up(v);
        unroll<4>([&](auto j) DQW_INLINED {
            f32 level = low.template part<j.value>(l);
            if (Wide) level = fma(high.template part<j.value>(h), all(256.0f), level);
            if (Scaled && split) s = scale_at(j.value);
            x[j.value] = Scaled ? mul(level, s) : level;
        });
        uint16_t* to = out + (unit / 8 * 2 * Terms + t) * 512 + unit % 8 * 64;
        unroll<Terms>([&](auto term) DQW_INLINED {
            const i32 a = bf16_pairs(x[0], x[1]), b = bf16_pairs(x[2], x[3]);
            store_int(to + term.value * 1024, a);
            store_int(to + term.value * 1024 + 32, b);
            if (term.value + 1 < Terms) take_off(a, x[0], x[1]), take_off(b, x[2], x[3]);
        });
    });
}

template <int B>
void decode_bytes(const Packed& whole, int64_t strip, int64_t begin, int64_t end, uint16_t* out) {
    Packed w = whole;
    w.data += begin * 8 * B;
    w.blocks = end - begin;
    fill_tile<B>(w, strip * kTileRows, Table<B>(w.low, 0),
                 [&](int64_t unit, int t, i32 v) DQW_INLINED {
                     store_int(out + (unit / 16 * 2 + t) * 512 + unit % 16 * 32, v);
                 });
}

// f(32 columns of row r as two registers, where they go) for rows of T; `step`: from 32 columns to
// the next.
template <Type T, class F>
DQW_INLINE void each_32(const Bf16Rows& a, int64_t row_begin, int64_t row_end, int64_t step,
                        const F& f) {
    for (int64_t r = row_begin; r < row_end; r++) {
        uint16_t* to = a.out + r / 16 * 512 + r % 16 * 32;
        const int64_t row = r * a.cols;
        int64_t i = a.begin * 64;
        for (; i < a.end * 64 && i + 32 <= a.cols; i += 32, to += step) {
            f(read<T>(a.x, row + i), read<T>(a.x, row + i + W), to);
        }
        for (; i < a.end * 64; i += 32, to += step) {
            const auto some = [&](int64_t at) {
                const int64_t left = a.cols - at;
                return left > 0 ? read<T>(a.x, row + at, left < W ? left : W) : zero();
            };
            f(some(i), some(i + W), to);
        }
    }
}

template <Type T>
void convert(const Bf16Rows& a, int64_t row_begin, int64_t row_end) {
    each_32<T>(a, row_begin, row_end, 1024, [](f32 x, f32 y, uint16_t* to) DQW_INLINED {
        store_int(to, (i32)_mm512_cvtne2ps_pbh(y, x));
    });
}

// The upper 8 bits of the mantissa, and what they leave; nothing behind NaN and infinity. Not
// rounded: the largest floats would become infinite.
DQW_INLINE f32 upper_bits(f32 x, f32& rest) {
    constexpr int kNotFinite = 0x99;
    const f32 upper = as_floats(_mm512_and_si512(bits_of(x), all_int(0xffff0000)));
    const __mmask16 odd = _mm512_fpclass_ps_mask(x, kNotFinite);
    rest = _mm512_maskz_sub_ps((__mmask16)~odd, x, upper);
    return _mm512_mask_mov_ps(upper, odd, x);
}

template <Type T, int Terms>
void convert_terms(const Bf16Rows& a, int64_t row_begin, int64_t row_end) {
    each_32<T>(a, row_begin, row_end, Terms * 1024, [](f32 x, f32 y, uint16_t* to) DQW_INLINED {
        unroll<Terms>([&](auto term) DQW_INLINED {
            f32 x_rest, y_rest;
            const f32 x_upper = upper_bits(x, x_rest), y_upper = upper_bits(y, y_rest);
            store_int(to + term.value * 1024, (i32)_mm512_cvtne2ps_pbh(y_upper, x_upper));
            x = x_rest, y = y_rest;
        });
    });
}

// int8 as it is, or as bfloat16, which holds it.
void convert_codes(const Bf16Rows& a, int64_t row_begin, int64_t row_end) {
    for (int64_t r = row_begin; r < row_end; r++) {
        const int8_t* x = (const int8_t*)a.x + r * a.cols;
        uint16_t* to = a.out + r / 16 * 512 + r % 16 * 32;
        for (int64_t i = a.begin * 64; i < a.end * 64; i += 64) {
            const i32 v = load_int(x + i);
            if (a.factors.bytes) {
                store_int(to, v);
                to += 1024;
                continue;
            }
            unroll<2>([&](auto half) DQW_INLINED {
                const f32 lower =
                    to_float(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(v, half.value * 2)));
                const f32 upper = to_float(
                    _mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(v, half.value * 2 + 1)));
                store_int(to, (i32)_mm512_cvtne2ps_pbh(upper, lower));
                to += 1024;
            });
        }
    }
}

// Eight rows of x by a strip: 16 sums hide the instruction's latency, one of the eight numbers of x
// comes from memory with each.
constexpr int kRows = 8;
DQW_INLINE void multiply_rows(const Bf16Block& b, int64_t row, int64_t strip) {
    const uint16_t* x = b.x + row / 16 * 512 + row % 16 * 32;
    const uint16_t* w = b.strips + strip * b.blocks * 2048;
    f32 sum[kRows][2];
    float* to = b.sums + row * b.stride + strip * b.strip_stride;
    const int64_t left = b.width - strip * 32;
    const int64_t widths[2] = {left < W ? left : W, left < W ? 0 : left - W < W ? left - W : W};
    unroll<kRows * 2>([&](auto i) DQW_INLINED {
        constexpr int r = i.value / 2, t = i.value % 2;
        sum[r][t] = b.bias ? load(b.bias + strip * 32 + t * W) : zero();
        if (b.more && row + r < b.rows) {
            sum[r][t] = read<Type::f32>(to, r * b.stride + t * W, widths[t]);
        }
    });
    for (int64_t k = 0; k < b.blocks * 2; k++) {
        for (int64_t p = 0; p < 16; p++) {
            const i32 left_half = load_int(w + p * 32), right_half = load_int(w + 512 + p * 32);
            unroll<kRows>([&](auto r) DQW_INLINED {
                int32_t two;
                __builtin_memcpy(&two, x + r.value * 32 + p * 2, 4);
                const bf16 v = (bf16)all_int(two);
                sum[r.value][0] = _mm512_dpbf16_ps(sum[r.value][0], (bf16)left_half, v);
                sum[r.value][1] = _mm512_dpbf16_ps(sum[r.value][1], (bf16)right_half, v);
            });
        }
        x += 1024;
        w += 1024;
    }
    unroll<kRows * 2>([&](auto i) DQW_INLINED {
        constexpr int r = i.value / 2, t = i.value % 2;
        if (row + r < b.rows) write<Type::f32>(to, r * b.stride + t * W, sum[r][t], widths[t]);
    });
}

}  // namespace

void decode_bf16(const Packed& w, const Factors& f, int64_t strip, int64_t begin, int64_t end,
                 float* scales, uint16_t* out) {
    with_bits(w.bits, [&](auto bits) {
        constexpr int B = bits.value;
        if (f.bytes) return decode_bytes<B>(w, strip, begin, end, out);
        const auto run = !f.scaled
                             ? (f.w == 1 ? decode<B, false, false, 1> : decode<B, true, false, 2>)
                         : f.w == 2 ? decode<B, false, true, 2>
                         : w.wide   ? decode<B, true, true, 1>
                                    : decode<B, false, true, 1>;
        run(w, strip, begin, end, scales, out);
    });
}

void convert_bf16(const Bf16Rows& a, int64_t row_begin, int64_t row_end) {
    const Factors& f = a.factors;
    const auto run = f.codes                ? convert_codes
                     : f.x == 3             ? convert_terms<Type::f32, 3>
                     : f.x == 2             ? convert_terms<Type::f16, 2>
                     : f.type == Type::bf16 ? convert<Type::bf16>
                                            : convert<Type::f32>;
    run(a, row_begin, row_end);
}

void finish_bf16(const Bf16Block& b, int64_t strip) {
    const int64_t n = strip * 32, left = b.width - n;
    for (int64_t r = 0; r < b.rows; r++) {
        for (int64_t i = 0; i < 32 && i < left; i += W) {
            const float* from = b.sums + r * b.stride + strip * b.strip_stride + i;
            const int64_t count = left - i < W ? left - i : W;
            f32 y = read<Type::f32>(from, 0, count);
            if (b.scale) {
                if (b.factors.bytes) y = to_float(bits_of(y));
                y = mul(y, mul(all(b.row_scale[r]), load(b.scale + n + i)));
                if (b.bias) y = add(y, load(b.bias + n + i));
            }
            const int64_t at = r * b.y_stride + n + i;
            if (b.y_type == Type::f32) {
                write<Type::f32>(b.y, at, y, count);
            } else if (b.y_type == Type::f16) {
                write<Type::f16>(b.y, at, y, count);
            } else {
                write<Type::bf16>(b.y, at, y, count);
            }
        }
    }
}

void multiply_avx512_bf16(const Bf16Block& b) {
    for (int64_t strip = 0; strip * 32 < b.width; strip++) {
        for (int64_t row = 0; row < b.rows; row += kRows) multiply_rows(b, row, strip);
        if (b.y) finish_bf16(b, strip);
    }
    if (b.next) convert_bf16(*b.next, 0, b.next->rows);
}

}  // namespace dqw
