// What a lane of gemv.h loads: its share of a step of 128 columns, of a row of W and of a row of x.
#pragma once

#include "decode.h"

namespace dqw {

constexpr int kMatrices = 3;  // that share x and one launch: query, key and value

struct Matrix {
    const uint8_t* weight;
    const void* scale;  // (rows, groups), (rows, 1) or (1, 1), float16 if grouped, else float32
    const void* bias;   // (rows) in x's dtype, or null
    void* y;            // (m, rows)
    int rows;
    int scale_stride;  // from row to row; 0 per tensor
};

struct Gemv {
    Matrix matrix[kMatrices];
    const int16_t* levels;  // shared by the matrices
    const void* x;  // (m, cols), contiguous; cols divides by 8, so that 8 columns are one load
    int matrices, m, cols, blocks;  // blocks of 64 codes a row
    int group_shift;                // groups of 2^group_shift columns, 4 to 7
    int cluster_shift;              // 2^cluster_shift blocks share a tile
    bool gelu;
};

struct Words {
    uint32_t at[4];
};

// 16 bytes; where BITS is odd a block is aligned to 8 bytes only.
template <int BITS>
__device__ inline Words load_words(const uint8_t* p, bool exists) {
    if (BITS % 2 == 0) {
        const uint4 v = load_once<BITS % 4 == 0>(reinterpret_cast<const uint4*>(p), exists);
        return {v.x, v.y, v.z, v.w};
    }
    const uint2 v = load_once(reinterpret_cast<const uint2*>(p), exists);
    const uint2 w = load_once(reinterpret_cast<const uint2*>(p + 8), exists);
    return {v.x, v.y, w.x, w.y};
}

// A lane's columns of a row of x as pairs: first[q] columns 4 q …, second[q] those 32 on; zero
// beyond the end and for rows that do not exist.
struct Columns {
    uint2 first[4], second[4];

    // x: the first of them; left: columns of the row from there on, 0 for a row that is not.
    __device__ void load(const uint16_t* x, int left) {
        const uint4 v = load_x<0>(x, left > 0), w = load_x<16>(x, left > 8);
        const uint4 y = load_x<64>(x, left > 32), z = load_x<80>(x, left > 40);
        first[0] = {v.x, v.y}, first[1] = {v.z, v.w}, first[2] = {w.x, w.y}, first[3] = {w.z, w.w};
        second[0] = {y.x, y.y}, second[1] = {y.z, y.w};
        second[2] = {z.x, z.y}, second[3] = {z.z, z.w};
    }
};

// A lane's codes of one row, of one block: columns j … j + 15 and those 32 on, j 0 or 16.
template <int BITS, bool GROUPED>
struct Share {
    Words four, two, second;  // second: 8 bits, columns + 32
    uint2 one;
    uint16_t scale_first, scale_second;

    __device__ void load(const uint8_t* p, int j, bool exists) {  // p: the block
        if (BITS == 8) {
            four = load_words<BITS>(p + j, exists);
            second = load_words<BITS>(p + 32 + j, exists);
        }
        if (BITS & 4) four = load_words<BITS>(p + j, exists);
        if (BITS & 2) two = load_words<BITS>(p + 8 * (BITS & 4), exists);
        if (BITS & 1) one = load_once(reinterpret_cast<const uint2*>(p + 8 * (BITS & 6)), exists);
    }

    // scale: the row's first group. Columns beyond the last have no group: x is zero there.
    __device__ void load_scales(const uint16_t* scale, int column, const Gemv& a, bool exists) {
        if (!GROUPED) return;
        scale_first = exists && column < a.cols ? scale[column >> a.group_shift] : 0;
        scale_second = exists && column + 32 < a.cols ? scale[(column + 32) >> a.group_shift] : 0;
    }

    // Word q: out[0], out[1] columns j + 4 q …, out[2], out[3] those 32 on. table: of 5 to 8 bits,
    // where the grid is not UNIFORM.
    template <typename T, bool UNIFORM>
    __device__ void decode(int q, int j, const Pool& pool, const uint16_t* table,
                           uint32_t out[4]) const {
        uint32_t first = 0, last = 0;
        if (BITS == 4) {
            decode_nibbles(four.at[q], pool, out);
        } else if (BITS == 8) {
            first = four.at[q], last = second.at[q];
        } else {
            code_bytes<BITS>(BITS & 4 ? four.at[q] : 0, BITS & 2 ? two.at[q] : 0, j / 8,
                             BITS & 1 ? one.x >> (j + 4 * q) : 0,
                             BITS & 1 ? one.y >> (j + 4 * q) : 0, first, last);
            if (BITS < 4) decode_nibbles(nibbles_of<BITS>(first, last), pool, out);
        }
        if (BITS > 4 && UNIFORM) {
            decode_uniform<T, BITS>(first, out);
            decode_uniform<T, BITS>(last, out + 2);
        } else if (BITS > 4) {
            decode_bytes(first, table, out);
            decode_bytes(last, table, out + 2);
        }
        if (GROUPED) {
            const uint32_t s = scale_pair<T>(scale_first), z = scale_pair<T>(scale_second);
            out[0] = times<T>(out[0], s), out[1] = times<T>(out[1], s);
            out[2] = times<T>(out[2], z), out[3] = times<T>(out[3], z);
        }
    }
};

}  // namespace dqw
