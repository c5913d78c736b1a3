// The decoder's kernel: y = x W^T (+ bias, GELU) for up to 8 rows of x, W packed at 2 to 8 bits.
//
// A block of threads has 8 rows of W; its warps share the columns (split-K inside the block, no
// atomics, one order of summation). In a warp, lane 4 r + t holds row r and a quarter t of a
// stretch of columns, decodes its codes into registers and multiplies them on tensor cores:
//
//     mma.m16n8k16   A = W: lane 4 r + t has row r     B = x^T: lane 4 r + t has row r of x
//
// Both operands want from a lane pairs of neighbouring columns, and in which order the columns
// come does not matter to the sum as long as both agree: so the codes that a lane loads are the
// ones it multiplies, beside the same columns of x, and nothing is shuffled or staged. Sums are
// float32 and up to 8 rows of x cost what one costs. Rows 8 to 15 of A are zero: 8 rows of W make
// twice the blocks, and Whisper's matrices are small (512 rows: 64 blocks).
//
// One scale a row: a lane loads 16 bytes, four lanes 128 columns. Groups of 16 to 128: a lane loads
// 8 bytes, four lanes a block of 64, whose sums are scaled before the next. Groups of 32: each half
// of a block has its sums. Of 16: a half is multiplied twice, with x zero in two lanes of the four;
// tensor cores have the time, and loads stay as wide. No torch here: tests run this file on CPU
// threads (tests/cuda_host/shim.h).
#pragma once

#include "decode.h"

namespace dqw {

constexpr int kRows = 8;      // of W, a block of threads
constexpr int kMost = 8;      // rows of x
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
    bool gelu;
};

template <int WORDS>
struct Words {
    uint32_t at[WORDS];
};

// WORDS × 4 bytes by one load; where BITS is odd a block is aligned to 8 bytes only.
template <int WORDS, int BITS>
__device__ inline Words<WORDS> load_words(const uint8_t* p, bool exists) {
    Words<WORDS> w;
    if (WORDS == 4 && BITS % 2 == 0) {
        const uint4 v = load_once(reinterpret_cast<const uint4*>(p), exists);
        w.at[0] = v.x, w.at[1] = v.y, w.at[WORDS - 2] = v.z, w.at[WORDS - 1] = v.w;
    } else {
        for (int i = 0; i < WORDS; i += 2) {
            const uint2 v = load_once(reinterpret_cast<const uint2*>(p + 4 * i), exists);
            w.at[i] = v.x, w.at[i + 1] = v.y;
        }
    }
    return w;
}

// The same columns of a row of x as pairs: first[q] columns 4 q …, second[q] those 32 on; zero
// beyond the end and for rows that do not exist.
template <int WORDS>
struct Columns {
    uint2 first[WORDS], second[WORDS];

    __device__ void load(const uint16_t* row, int column, const Gemv& a, bool exists) {
#pragma unroll
        for (int q = 0; q < WORDS; q += 2) {
            const int c = column + 4 * q;
            uint4 v = {0, 0, 0, 0}, w = {0, 0, 0, 0};
            if (exists && c < a.cols) v = load_again(reinterpret_cast<const uint4*>(row + c));
            if (exists && c + 32 < a.cols) {
                w = load_again(reinterpret_cast<const uint4*>(row + c + 32));
            }
            first[q] = {v.x, v.y}, first[q + 1] = {v.z, v.w};
            second[q] = {w.x, w.y}, second[q + 1] = {w.z, w.w};
        }
    }
};

// One row's codes j … j + 4 WORDS - 1 and those 32 columns on, of one block.
template <int BITS, int WORDS>
struct Share {
    Words<WORDS> four, two, second;  // second: 8 bits, columns + 32
    uint32_t one_first, one_second;
    int two_shift;

    __device__ void load(const uint8_t* block, int j, bool exists) {
        if (BITS == 8) {
            four = load_words<WORDS, BITS>(block + j, exists);
            second = load_words<WORDS, BITS>(block + 32 + j, exists);
        }
        if (BITS & 4) four = load_words<WORDS, BITS>(block + j, exists);
        if (BITS & 2) {
            two = load_words<WORDS, BITS>(block + 8 * (BITS & 4) + j % 16, exists);
            two_shift = 2 * (j / 16);
        }
        if (BITS & 1 && exists) {
            const uint8_t* p = block + 8 * (BITS & 6) + j / 8;
            one_first = p[0];
            one_second = p[4];
            if (WORDS == 4) {
                one_first |= (uint32_t)p[1] << 8;
                one_second |= (uint32_t)p[5] << 8;
            }
        }
    }

    // Word q: out[0], out[1] columns j + 4 q …, out[2], out[3] those 32 on.
    __device__ void decode(int q, const Pool& pool, const uint16_t* table, uint32_t out[4]) const {
        if (BITS == 4) {
            decode_nibbles(four.at[q], pool, out);
        } else if (BITS == 8) {
            decode_bytes(four.at[q], table, out);
            decode_bytes(second.at[q], table, out + 2);
        } else {
            uint32_t first, last;
            code_bytes<BITS>(BITS & 4 ? four.at[q] : 0, BITS & 2 ? two.at[q] : 0, two_shift,
                             BITS & 1 ? one_first >> 4 * q : 0, BITS & 1 ? one_second >> 4 * q : 0,
                             first, last);
            if (BITS < 4) {
                decode_nibbles(nibbles_of<BITS>(first, last), pool, out);
            } else {
                decode_bytes(first, table, out);
                decode_bytes(last, table, out + 2);
            }
        }
    }
};

__device__ inline float gelu(float v) { return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f)); }

// T: __half or __nv_bfloat16. GROUP: 0, 16, 32, 64 or 128. Launch: (blocks of 8 rows over all
// matrices) × (32 × WARPS threads), two of them on a processor at least: without the 2 ptxas aims
// at 64 registers and spills at 3 bits.
template <typename T, int BITS, int GROUP, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, 2) gemv(const Gemv a) {
    constexpr int WORDS = GROUP ? 2 : 4;
    constexpr int IN_FLIGHT = BITS > 6 ? 2 : 4;  // steps whose loads a lane sends at a time
    constexpr int STEP = WORDS / 2;  // blocks of 64 columns that four lanes take at a time
    __shared__ uint16_t table[BITS > 4 ? 1 << BITS : 8];
    __shared__ float sums[WARPS][kRows * kMost];

    int tile = blockIdx.x, which = 0;
    while (which + 1 < a.matrices && tile >= (a.matrix[which].rows + kRows - 1) / kRows) {
        tile -= (a.matrix[which].rows + kRows - 1) / kRows;
        which++;
    }
    const Matrix& w = a.matrix[which];
    constexpr int kEntries = BITS > 4 ? 1 << BITS : 1 << (BITS - 1);
    static_assert(kEntries <= 32 * WARPS);
    if (threadIdx.x < kEntries) {
        table[threadIdx.x] = bits_of(from_float<T>((float)a.levels[threadIdx.x]));
    }
    __syncthreads();
    Pool pool = {};
    if (BITS <= 4) pool = pool_of(table, 1 << (BITS - 1));

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, t = lane % 4;
    const int row = tile * kRows + r;
    const int safe = row < w.rows ? row : w.rows - 1;  // reads what exists, writes nothing
    const uint8_t* weight = w.weight + (int64_t)safe * a.blocks * 8 * BITS;
    const uint16_t* x = reinterpret_cast<const uint16_t*>(a.x) + (int64_t)r * a.cols;
    const int lane_block = 4 * WORDS * t / 32, j = 4 * WORDS * t % 32;

    float total[2] = {0, 0};
    // A round's loads are all sent before the first is used: few warps must cover the latency.
    for (int round = warp * STEP; round < a.blocks; round += IN_FLIGHT * WARPS * STEP) {
        Share<BITS, WORDS> share[IN_FLIGHT] = {};
#pragma unroll
        for (int u = 0; u < IN_FLIGHT; u++) {
            const int block = round + u * WARPS * STEP + lane_block;
            share[u].load(weight + (int64_t)block * 8 * BITS, j, block < a.blocks);
        }
        __syncwarp();  // keeps the assembler from putting loads off, too
#pragma unroll
        for (int u = 0; u < IN_FLIGHT; u++) {
            const int step = round + u * WARPS * STEP, block = step + lane_block;
            if (step >= a.blocks) break;  // the same for the whole warp
            Columns<WORDS> columns;
            columns.load(x, block * 64 + j, a, r < a.m);
            float part[4][2] = {{0, 0}, {0, 0}, {0, 0}, {0, 0}};  // by quarters of the block
#pragma unroll
            for (int q = 0; q < WORDS; q++) {
                uint32_t v[4];  // beyond the last column x is 0, whatever level code 0 is
                share[u].decode(q, pool, table, v);
                const uint2 first = columns.first[q], second = columns.second[q];
                if (GROUP == 16) {
                    multiply<T>(part[0], v[0], v[1], t < 2 ? first.x : 0, t < 2 ? first.y : 0);
                    multiply<T>(part[1], v[0], v[1], t < 2 ? 0 : first.x, t < 2 ? 0 : first.y);
                    multiply<T>(part[2], v[2], v[3], t < 2 ? second.x : 0, t < 2 ? second.y : 0);
                    multiply<T>(part[3], v[2], v[3], t < 2 ? 0 : second.x, t < 2 ? 0 : second.y);
                } else {
                    float* f = GROUP ? part[0] : total;
                    multiply<T>(f, v[0], v[1], first.x, first.y);
                    multiply<T>(GROUP == 32 ? part[2] : f, v[2], v[3], second.x, second.y);
                }
            }
            if (GROUP) {
                const uint16_t* scale =
                    reinterpret_cast<const uint16_t*>(w.scale) + (int64_t)safe * w.scale_stride;
                constexpr int PART = GROUP == 16 ? 1 : GROUP == 32 ? 2 : 4;  // quarters
#pragma unroll
                for (int i = 0; i < 4; i += PART) {
                    const int column = block * 64 + 16 * i;
                    if (i > 0 && column >= a.cols) break;  // there is no such group
                    const float s = half_to_float(scale[column / (GROUP ? GROUP : 1)]);
                    total[0] += part[i][0] * s;
                    total[1] += part[i][1] * s;
                }
            }
        }
    }
    sums[warp][r * kMost + 2 * t] = total[0];
    sums[warp][r * kMost + 2 * t + 1] = total[1];
    __syncthreads();

    for (int i = threadIdx.x; i < kRows * kMost; i += 32 * WARPS) {
        const int n = tile * kRows + i / kMost, m = i % kMost;
        if (n >= w.rows || m >= a.m) continue;
        float v = 0;
        for (int k = 0; k < WARPS; k++) v += sums[k][i];
        if (!GROUP) v *= reinterpret_cast<const float*>(w.scale)[n * w.scale_stride];
        if (w.bias) v += to_float(reinterpret_cast<const T*>(w.bias)[n]);
        if (a.gelu) v = gelu(v);
        reinterpret_cast<T*>(w.y)[(int64_t)m * w.rows + n] = from_float<T>(v);
    }
}

}  // namespace dqw
