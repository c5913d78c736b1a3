// Packed codes (dqw/packing.py) to pairs of float16 or bfloat16 levels, in registers.
//
// Works on nibble words: 8 codes in the order that a 4-bit plane has in memory,
//
//     bits   31..28 27..24 23..20 19..16 15..12 11..8  7..4   3..0
//     code   j+3+32 j+3    j+2+32 j+2    j+1+32 j+1    j+32   j        sign in bit 3 of a nibble
//
// 2 to 4 bits: PRMT picks 4 of 8 bytes by 3-bit indices, and 8 is the number of magnitudes that
// such codes have at most. A 16-bit level takes two picks, of its high and its low byte; signs are
// ORed into the high ones. 15 instructions for 8 codes, float16 and bfloat16 alike, exact because
// nothing is computed. It needs level[half + i] = -level[i], which every grid of dqw.grids keeps.
// 5 to 8 bits: arithmetic on a uniform grid, 9 instructions for 4 codes; else a table in shared
// memory, whose up to 64 entries of 2 bytes lie in different banks (7 and 8 bits: two and four to a
// bank).
#pragma once

#include <stdint.h>

#ifdef DQW_CUDA_ON_HOST
#include "shim.h"  // tests/cuda_host
#else
#include "device.h"
#endif

namespace dqw {

// The 8 magnitudes of a grid of up to 4 bits as 16-bit floats: their high and low bytes.
struct Pool {
    uint32_t high[2], low[2];
};

// Each lane brings magnitude lane % count; all lanes of a warp together. zero: hidden_zero.
__device__ inline Pool pool_of(uint16_t magnitude, int lane, int count, uint32_t zero) {
    const int i = lane % 8, shift = 8 * (i % 4);
    const uint32_t high = (uint32_t)(magnitude >> 8) << shift;
    const uint32_t low = (uint32_t)(magnitude & 255) << shift;
    const bool first = i < 4 && i < count, second = i >= 4 && i < count;
    Pool p;
    p.high[0] = or_of_warp(first ? high : 0) | zero;
    p.high[1] = or_of_warp(second ? high : 0) | zero;
    p.low[0] = or_of_warp(first ? low : 0) | zero;
    p.low[1] = or_of_warp(second ? low : 0) | zero;
    return p;
}

// out[0], out[1]: codes j … j+3 as two pairs; out[2], out[3]: codes j+32 … j+35.
__device__ inline void decode_nibbles(uint32_t w, const Pool& p, uint32_t out[4]) {
    const uint32_t left = w << 4;  // brings the signs of even nibbles to a byte's top bit
    const uint32_t index = w & 0x77777777u;
    const uint32_t rest = index >> 16;
    uint32_t a = prmt(p.high[0], p.high[1], index);
    uint32_t b = prmt(p.high[0], p.high[1], rest);
    const uint32_t c = prmt(p.low[0], p.low[1], index);
    const uint32_t d = prmt(p.low[0], p.low[1], rest);
    a |= prmt(left, w, 0x5140) & 0x80808080u;
    b |= prmt(left, w, 0x7362) & 0x80808080u;
    out[0] = prmt(c, a, 0x6240);
    out[1] = prmt(d, b, 0x6240);
    out[2] = prmt(c, a, 0x7351);
    out[3] = prmt(d, b, 0x7351);
}

// Bit i of v, i < 4, to bit 8 i.
__device__ inline uint32_t spread(uint32_t v) { return v * 0x00204081u & 0x01010101u; }

// The word q of a lane's share of a block, as the planes hold it: `four`, `two` and `one` are what
// the lane loaded (see Share). Codes j … j+3 come as bytes in first, codes j+32 … in second.
template <int BITS>
__device__ inline void code_bytes(uint32_t four, uint32_t two, int two_shift, uint32_t one_first,
                                  uint32_t one_second, uint32_t& first, uint32_t& second) {
    first = second = 0;
    if (BITS & 4) {
        first = four & 0x0f0f0f0fu;
        second = four >> 4 & 0x0f0f0f0fu;
    }
    if (BITS & 2) {
        first |= (two >> two_shift & 0x03030303u) << (BITS & 4);
        second |= (two >> (two_shift + 4) & 0x03030303u) << (BITS & 4);
    }
    if (BITS & 1) {
        first |= spread(one_first & 15) << (BITS & 6);
        second |= spread(one_second & 15) << (BITS & 6);
    }
}

// 2 and 3 bits: the same as a nibble word whose sign is in bit 3.
template <int BITS>
__device__ inline uint32_t nibbles_of(uint32_t first, uint32_t second) {
    const uint32_t w = first | second << 4;
    if (BITS == 3) return (w & 0x33333333u) | (w & 0x44444444u) << 1;
    return (w & 0x11111111u) | (w & 0x22222222u) << 2;
}

// 5 to 8 bits: four codes, a byte each, to two pairs.
__device__ inline void decode_bytes(uint32_t codes, const uint16_t* table, uint32_t out[2]) {
    out[0] = table[codes & 255] | (uint32_t)table[codes >> 8 & 255] << 16;
    out[1] = table[codes >> 16 & 255] | (uint32_t)table[codes >> 24] << 16;
}

// The same on a uniform grid, whose level is its index, with no memory in between: 1024 + m has m
// in the lowest bits of a float16, 128 + m in a bfloat16's, and taking the large part off is exact.
template <typename T, int BITS>
__device__ inline void decode_uniform(uint32_t codes, uint32_t out[2]) {
    const uint32_t large = large_of<T>();
    const uint32_t m = codes & (0x01010101u * ((1 << (BITS - 1)) - 1));
    const uint32_t sign = codes << (8 - BITS);  // to a byte's top bit
    const uint32_t first = minus<T>(prmt(m, large, 0x5150), large);
    const uint32_t second = minus<T>(prmt(m, large, 0x5352), large);
    out[0] = first | (prmt(sign, 0, 0x1404) & 0x80008000u);
    out[1] = second | (prmt(sign, 0, 0x3424) & 0x80008000u);
}

}  // namespace dqw
