// Moments of bfloat16 rows (bf16.h) by vdpbf16ps, which adds two products to each float32 sum: a
// pair of rows at a time.
#include "bf16.h"
#include "isa_avx512.h"

namespace dqw {
namespace {

constexpr int M = 8;  // register block: so many columns of y, two registers of columns of x
// Pairs that are added up in a register: long chains of sums lose bits, 512 pairs 1.6e-6 of a
// sum of squares.
constexpr int64_t kChain = 64;

// The first 32 of n columns of a row, zeros behind.
DQW_INLINE i32 load_columns(const uint16_t* x, int64_t n) {
    return _mm512_maskz_loadu_epi16(n >= 32 ? ~0u : (1u << n) - 1, x);
}

DQW_INLINE __mmask16 lanes_below(int64_t n) {
    return n >= W ? 0xffff : (__mmask16)(n > 0 ? (1 << n) - 1 : 0);
}

}  // namespace

void pack_pairs_bf16(const uint16_t* x, int64_t rows, int64_t cols, int64_t column, uint16_t* out) {
    const i32 low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                     39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const i32 high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const int64_t n = cols - column;
    for (int64_t r = 0; r < rows; r += 2, out += 64) {
        const uint16_t* from = x + r * cols + column;
        const i32 a = load_columns(from, n);
        const i32 b = r + 1 < rows ? load_columns(from + cols, n) : all_int(0);
        store_int(out, _mm512_permutex2var_epi16(a, low, b));
        store_int(out + 32, _mm512_permutex2var_epi16(a, high, b));
    }
}

void add_moment_bf16(const uint16_t* y, const uint16_t* x, int64_t pairs, int64_t rows,
                     int64_t columns, float* sum, int64_t stride) {
    const __mmask16 left = lanes_below(columns), right = lanes_below(columns - W);
    for (int64_t first = 0; first < rows; first += M) {
        for (int64_t some = 0; some < pairs; some += kChain) {
            const int64_t end = some + kChain < pairs ? some + kChain : pairs;
            f32 sums[M][2];
#pragma GCC unroll 16
            for (int i = 0; i < 2 * M; i++) sums[i / 2][i % 2] = zero();
            for (int64_t pair = some; pair < end; pair++) {
                const __m512bh a = (__m512bh)load_int(x + pair * 64);
                const __m512bh b = (__m512bh)load_int(x + pair * 64 + 32);
                const uint16_t* row = y + pair * 64 + 2 * first;
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    int32_t both;
                    __builtin_memcpy(&both, row + 2 * m, 4);
                    const __m512bh column = (__m512bh)all_int(both);
                    sums[m][0] = _mm512_dpbf16_ps(sums[m][0], column, a);
                    sums[m][1] = _mm512_dpbf16_ps(sums[m][1], column, b);
                }
            }
            for (int m = 0; m < M && first + m < rows; m++) {
                float* to = sum + (first + m) * stride;
                const f32 a = add(_mm512_maskz_loadu_ps(left, to), sums[m][0]);
                const f32 b = add(_mm512_maskz_loadu_ps(right, to + W), sums[m][1]);
                _mm512_mask_storeu_ps(to, left, a);
                _mm512_mask_storeu_ps(to + W, right, b);
            }
        }
    }
}

void add_columns_bf16(const uint16_t* x, int64_t pairs, int64_t columns, float* sum) {
    const __mmask16 left = lanes_below(columns), right = lanes_below(columns - W);
    const __m512bh one = (__m512bh)all_int(0x3f803f80);
    f32 a = _mm512_maskz_loadu_ps(left, sum), b = _mm512_maskz_loadu_ps(right, sum + W);
    for (int64_t some = 0; some < pairs; some += kChain) {
        const int64_t end = some + kChain < pairs ? some + kChain : pairs;
        f32 c = zero(), d = zero();
        for (int64_t pair = some; pair < end; pair++) {
            c = _mm512_dpbf16_ps(c, one, (__m512bh)load_int(x + pair * 64));
            d = _mm512_dpbf16_ps(d, one, (__m512bh)load_int(x + pair * 64 + 32));
        }
        a = add(a, c), b = add(b, d);
    }
    _mm512_mask_storeu_ps(sum, left, a);
    _mm512_mask_storeu_ps(sum + W, right, b);
}

}  // namespace dqw
