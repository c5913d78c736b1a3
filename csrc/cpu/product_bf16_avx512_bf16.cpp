// Products of bfloat16 (bf16.h): W decoded, x and y converted, and the product by
// vdpbf16ps, which adds two products of bfloat16 to each float32 sum.
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

template <int B, bool Wide>
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
    scales_of_strip(w, n, first, group_at(end * 64 - 1), scales);
    const bool split = w.group % 4 != 0;  // a scale may change inside 4 columns
    const FloatTable<B> low(w.low), high(w.high);
    fill_tile<B>(w, n, Codes(), [&](int64_t unit, int t, i32 v) DQW_INLINED {
        const auto scale_at = [&](int j) DQW_INLINED {
            const int64_t g = group_at(begin * 64 + unit * 4 + j) - first;
            return load(scales + g * kTileRows + t * W);
        };
        f32 s = scale_at(0), x[4];
        const i32 l = B <= 5 ? v : low.bytes.look_up(v), h = B <= 5 ? v : high.bytes.look_up(v);
        unroll<4>([&](auto j) DQW_INLINED {
            f32 level = low.template part<j.value>(l);
            if (Wide) level = fma(high.template part<j.value>(h), all(256.0f), level);
            if (split) s = scale_at(j.value);
            x[j.value] = mul(level, s);
        });
        uint16_t* to = out + (unit / 8 * 2 + t) * 512 + unit % 8 * 64;
        store_int(to, bf16_pairs(x[0], x[1]));
        store_int(to + 32, bf16_pairs(x[2], x[3]));
    });
}

template <Type T>
void convert(const Bf16Rows& a, int64_t row_begin, int64_t row_end) {
    for (int64_t r = row_begin; r < row_end; r++) {
        uint16_t* to = a.out + r / 16 * 512 + r % 16 * 32;
        const int64_t row = r * a.cols;
        int64_t i = a.begin * 64;
        for (; i < a.end * 64 && i + 32 <= a.cols; i += 32, to += 1024) {
            if (T == Type::bf16) {
                store_int(to, load_int((const uint16_t*)a.x + row + i));
            } else {
                store_int(to, (i32)_mm512_cvtne2ps_pbh(read<Type::f32>(a.x, row + i + W),
                                                       read<Type::f32>(a.x, row + i)));
            }
        }
        for (; i < a.end * 64; i += 32, to += 1024) {
            const auto some = [&](int64_t at) {
                const int64_t left = a.cols - at;
                return left > 0 ? read<T>(a.x, row + at, left < W ? left : W) : zero();
            };
            store_int(to, (i32)_mm512_cvtne2ps_pbh(some(i + W), some(i)));
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
    float* to = b.sums + row * b.stride + strip * 32;
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

void decode_bf16(const Packed& w, int64_t strip, int64_t begin, int64_t end, float* scales,
                 uint16_t* out) {
    with_bits(w.bits, [&](auto bits) {
        const auto run = w.wide ? decode<bits.value, true> : decode<bits.value, false>;
        run(w, strip, begin, end, scales, out);
    });
}

void convert_bf16(const Bf16Rows& a, int64_t row_begin, int64_t row_end) {
    (a.type == Type::bf16 ? convert<Type::bf16> : convert<Type::f32>)(a, row_begin, row_end);
}

void round_bf16(const Bf16Block& b, int64_t strip) {
    const int64_t n = strip * 32, left = b.width - n;
    const float* from = b.sums + n;
    uint16_t* to = b.y + n;
    for (int64_t r = 0; r < b.rows; r++, from += b.stride, to += b.y_stride) {
        const i32 v = (i32)_mm512_cvtne2ps_pbh(load(from + W), load(from));
        if (left >= 32) {
            store_int(to, v);
        } else {
            _mm512_mask_storeu_epi16(to, (__mmask32)((1u << left) - 1), v);
        }
    }
}

void multiply_avx512_bf16(const Bf16Block& b) {
    for (int64_t strip = 0; strip * 32 < b.width; strip++) {
        for (int64_t row = 0; row < b.rows; row += kRows) multiply_rows(b, row, strip);
        if (b.y) round_bf16(b, strip);
    }
    if (b.next) convert_bf16(*b.next, 0, b.next->rows);
}

}  // namespace dqw
