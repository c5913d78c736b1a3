// The encoder's attention in bfloat16, for AVX-512 with BF16: factors are bfloat16; sums, scores
// and softmax float32. The file that includes this has a class that multiplies:
//
//   kRows           queries of a block
//   an instance     lives around all products of a block
//   multiply(a, a_stride, b, b_step, chunks, c, c_stride, more)
//                   c (kRows, 32) = or += a (kRows, 32 chunks) b (32 chunks, 32); rows of a and c
//                   have strides; b is two columns of tiles, b_step numbers apart, a tile a chunk
//
// A tile, 1 KiB, is what AMX multiplies by: (16 pairs of rows of b, 16 columns, 2). Keys are tiles
// of (head_dim, positions), values of (positions, head_dim), both filled with zeros up to 32.
//
// Scores never leave the first cache: a block of queries goes through the keys kBlock at a time.
// Probabilities are powers of 2 against a base that each query keeps from its first scores on, not
// against the largest score: as float32 and bfloat16 have the same exponents, a base that is below
// the largest score by up to kHeadroom (in powers of 2) loses nothing, and results are scaled anew
// only beyond.
#pragma once

#include "isa_avx512.h"
#include "whisper.h"
//
#include "bf16_pairs.h"

namespace dqw {
namespace {

constexpr int64_t kBlock = 128;     // positions whose scores are held at a time
constexpr float kHeadroom = 64.0f;  // 1500 products by 2^64 are far below float32's 2^128
constexpr float kNothing = -1e30f;  // the score of a position that is not there
constexpr float kLog2E = 1.44269504f;
constexpr int64_t kTile = 512;  // numbers
// Rows lie a cache line further on than a power of two, which would take few of the cache's sets.
constexpr int64_t kScoreStride = kBlock + 16, kProbabilityStride = kBlock + 32;

using Half = uint16_t;  // a bfloat16

DQW_INLINE int64_t up_to_32(int64_t n) { return (n + 31) / 32 * 32; }
DQW_INLINE Half* values_of(const EncoderHead& h) {
    return (Half*)h.packed + up_to_32(h.positions) * up_to_32(h.head_dim);
}

int64_t run_packed_bytes(int64_t positions, int64_t head_dim) {
    return 2 * up_to_32(positions) * up_to_32(head_dim) * (int64_t)sizeof(Half);
}

// The first n (16, or 32 and more) of 32 floats times `factor`, zeros behind.
DQW_INLINE i32 to_halves(const float* x, int64_t n, f32 factor) {
    const f32 last = _mm512_maskz_loadu_ps(n >= 32 ? 0xffff : 0, x + 16);
    return (i32)_mm512_cvtne2ps_pbh(mul(last, factor), mul(load(x), factor));
}

void run_pack(const EncoderHead& h) {
    const int64_t positions = up_to_32(h.positions), width = up_to_32(h.head_dim);
    Half* to = (Half*)h.packed;
    for (int64_t t = 0; t < positions; t += 16) {
        for (int64_t i = 0; i < width; i += 32, to += kTile) {
            i32 v[W];  // pairs of a position, then positions of a pair
            for (int64_t j = 0; j < W; j++) {
                const float* k = h.k + (t + j) * h.stride + i;
                v[j] = t + j < h.positions ? to_halves(k, h.head_dim - i, all(1.0f)) : all_int(0);
            }
            transpose(v);
            for (int64_t j = 0; j < W; j++) store_int(to + j * 32, v[j]);
        }
    }
    // Numbers of two positions, one after the other, become pairs.
    for (int64_t t = 0; t < positions; t += 2) {
        for (int64_t i = 0; i < width; i += 16) {
            const float* v = h.v + t * h.stride + i;
            const bool there = i < h.head_dim;
            const f32 a = there && t < h.positions ? load(v) : zero();
            const f32 b = there && t + 1 < h.positions ? load(v + h.stride) : zero();
            store_int(to + i * positions + t * 16, bf16_pairs(a, b));
        }
    }
}

// 2^x, |error| below 9e-5 of it, 1 / 40 of what rounding to bfloat16 may add; 2^0 is 1.
DQW_INLINE f32 power_of_2(f32 x) {
    const f32 r = _mm512_reduce_ps(x, 1);  // x - floor(x)
    f32 p = all(0.07706704f);
    p = fma(p, r, all(0.22764500f));
    p = fma(p, r, all(0.69511679f));
    return _mm512_scalef_ps(fma(p, r, all(1.0f)), x);
}

// What a block of queries knows between blocks of positions.
template <int64_t kRows>
struct Block {
    Half q[kRows * 256];                 // (kRows, width)
    float sums[kRows * 256];             // (kRows, width): of probability times value
    float totals[kRows * W];             // of probabilities, by lanes
    float base[kRows];                   // see above
    float scores[kRows * kScoreStride];  // of kBlock positions
    Half probabilities[kRows * kProbabilityStride];
};

// Probabilities of row r from its n scores, against `base`; adds them up and gives, lane by lane,
// the largest score, or base if that is larger. A NaN becomes a NaN.
template <int64_t kRows>
DQW_INLINE f32 to_probabilities(Block<kRows>& b, int64_t r, int64_t n, f32 base, f32& total) {
    const float* scores = b.scores + r * kScoreStride;
    Half* to = b.probabilities + r * kProbabilityStride;
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    f32 top = base;
#pragma GCC unroll 2
    for (int64_t i = 0; i < n; i += 32) {
        const f32 x = load(scores + i), y = load(scores + i + 16);
        top = max(max(x, y), top);
        const __m512bh p = _mm512_cvtne2ps_pbh(power_of_2(sub(y, base)), power_of_2(sub(x, base)));
        total = _mm512_dpbf16_ps(total, p, ones);  // of what is multiplied, not of what was rounded
        store_int(to + i, (i32)p);
    }
    return top;
}

// The same for all rows of a block of positions; `first`: the first one.
template <int64_t kRows>
DQW_INLINE void softmax_block(Block<kRows>& b, int64_t n, int64_t width, bool first) {
    for (int64_t r = 0; r < kRows; r++) {
        const float* scores = b.scores + r * kScoreStride;
        const float start = first ? largest(max(load(scores), load(scores + 16))) : b.base[r];
        f32 base = max(all(start), all(kNothing));
        const f32 before = first ? zero() : load(b.totals + r * W);
        f32 total = before;
        const f32 top = to_probabilities(b, r, n, base, total);
        if (_mm512_cmp_ps_mask(top, add(base, all(kHeadroom)), _CMP_GT_OQ)) {
            const f32 higher = all(largest(top)), factor = power_of_2(sub(base, higher));
            total = mul(before, factor);
            for (int64_t i = 0; i < width && !first; i += W) {
                float* sum = b.sums + r * width + i;
                store(sum, mul(load(sum), factor));
            }
            base = higher;
            to_probabilities(b, r, n, base, total);
        }
        store(b.totals + r * W, total);
        b.base[r] = _mm512_cvtss_f32(base);
    }
}

template <class Multiplier>
void run_attend(const EncoderHead& h, int64_t begin, int64_t end, char* scratch, float* out) {
    constexpr int64_t kRows = Multiplier::kRows;
    Block<kRows>& b = *(Block<kRows>*)scratch;
    const int64_t positions = up_to_32(h.positions), width = up_to_32(h.head_dim);
    const Half *keys = (Half*)h.packed, *values = values_of(h);
    for (int64_t r = 0; r < kRows; r++) {
        for (int64_t i = 0; i < width; i += 32) {
            const float* q = h.q + (begin + r) * h.stride + i;
            const bool there = begin + r < end;
            store_int(b.q + r * width + i,
                      there ? to_halves(q, h.head_dim - i, all(kLog2E)) : all_int(0));
        }
    }
    {
        [[maybe_unused]] Multiplier lives;
        for (int64_t t = 0; t < positions; t += kBlock) {
            const int64_t n = positions - t < kBlock ? positions - t : kBlock;
            for (int64_t i = 0; i < n; i += 32) {
                Multiplier::multiply(b.q, width, keys + (t + i) * width, 16 * width, width / 32,
                                     b.scores + i, kScoreStride, false);
            }
            for (int64_t i = h.positions - t; i < n; i++) {
                for (int64_t r = 0; r < kRows; r++) b.scores[r * kScoreStride + i] = kNothing;
            }
            softmax_block(b, n, width, t == 0);
            for (int64_t i = 0; i < width; i += 32) {
                Multiplier::multiply(b.probabilities, kProbabilityStride,
                                     values + i * positions + t * 16, 16 * positions, n / 32,
                                     b.sums + i, width, t > 0);
            }
        }
    }
    for (int64_t r = 0; r < end - begin; r++) {
        const f32 factor = all(1.0f / sum(load(b.totals + r * W)));
        for (int64_t i = 0; i < h.head_dim; i += W) {
            store(out + (begin + r) * h.stride + i, mul(load(b.sums + r * width + i), factor));
        }
    }
}

template <class Multiplier>
constexpr EncoderAttention kEncoderAttention = {
    .rows = Multiplier::kRows,
    .packed_bytes = run_packed_bytes,
    .scratch_bytes = [](int64_t, int64_t) { return (int64_t)sizeof(Block<Multiplier::kRows>); },
    .pack = run_pack,
    .attend = run_attend<Multiplier>,
};

}  // namespace
}  // namespace dqw
