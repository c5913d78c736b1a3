// The decoder's kernel: y = x W^T (+ bias, GELU) for up to 16 rows of x, W packed at 2 to 8 bits.
//
// 32 rows of W are a tile. Its columns, in steps of 128, are shared by the warps of a block and,
// from sm_90 on, by the blocks of a cluster: Whisper's matrices are small, and a processor that has
// all columns of a few rows would read all of x. Sums are added in one order, without atomics. In a
// warp, lane 4 r + t holds rows r, r + 8, r + 16 and r + 24 and a quarter t of a step, decodes its
// codes into registers and multiplies them on tensor cores:
//
//     mma.m16n8k16   A = W: lane 4 r + t has rows r, r + 8   B = x^T: lane 4 r + t has row r of x
//
// Both operands want from a lane pairs of neighbouring columns, and in which order the columns
// come does not matter to the sum as long as both agree: so the codes that a lane loads are the
// ones it multiplies, beside the same columns of x, and nothing is shuffled or staged. Sums are
// float32 and up to 8 rows of x cost what one costs; 9 to 16 take a second product.
//
// A quarter of a step is 16 neighbouring columns and the 16 that lie 32 further on: 16 bytes of a
// 4-bit plane, by one load. So groups of 16 and more are whole in it: their scale multiplies the
// decoded pairs, exactly in float16 (levels have up to 5 bits at 4 bits, stored scales 5), rounded
// as a bfloat16 weight is in bfloat16. One scale a row comes after the sum, in float32.
//
// Weights depend on nothing that runs before: they are asked for first, then the kernel waits for
// its predecessor (programmatic dependent launch), then x is read. No torch here: tests run this
// file on CPU threads (tests/cuda_host/shim.h).
#pragma once

#include "decode.h"

namespace dqw {

constexpr int kTile = 32;        // rows of W
constexpr int kMost = 16;        // rows of x
constexpr int kMostCluster = 8;  // blocks that share a tile
constexpr int kMatrices = 3;     // that share x and one launch: query, key and value
constexpr int kSumStride = 36;   // of a row of x in sums: no two lanes store to one bank

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

    // Word q: out[0], out[1] columns j + 4 q …, out[2], out[3] those 32 on.
    template <typename T>
    __device__ void decode(int q, int j, const Pool& pool, const uint16_t* table,
                           uint32_t out[4]) const {
        if (BITS == 4) {
            decode_nibbles(four.at[q], pool, out);
        } else if (BITS == 8) {
            decode_bytes(four.at[q], table, out);
            decode_bytes(second.at[q], table, out + 2);
        } else {
            uint32_t first, last;
            code_bytes<BITS>(BITS & 4 ? four.at[q] : 0, BITS & 2 ? two.at[q] : 0, j / 8,
                             BITS & 1 ? one.x >> (j + 4 * q) : 0,
                             BITS & 1 ? one.y >> (j + 4 * q) : 0, first, last);
            if (BITS < 4) {
                decode_nibbles(nibbles_of<BITS>(first, last), pool, out);
            } else {
                decode_bytes(first, table, out);
                decode_bytes(last, table, out + 2);
            }
        }
        if (GROUPED) {
            const uint32_t s = scale_pair<T>(scale_first), z = scale_pair<T>(scale_second);
            out[0] = times<T>(out[0], s), out[1] = times<T>(out[1], s);
            out[2] = times<T>(out[2], z), out[3] = times<T>(out[3], z);
        }
    }
};

__device__ inline float gelu(float v) { return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f)); }

// Two blocks fit a processor, which leaves a thread 96 or 128 registers; for sm_80 ptxas would
// spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kAtOnce = 1;
#else
constexpr int kAtOnce = 2;
#endif

// Warps of a block at most.
__host__ __device__ constexpr int most_warps(int bits, int x_tiles) {
    return x_tiles == 2 || bits == 3 || bits == 7 ? 8 : 10;
}

// How the columns of a tile are shared: by how many blocks, of how many warps.
struct Plan {
    int cluster_shift, warps;
};

// most: most_warps. From `python -m bench.plans` on an H100, 2026-11-27: a cluster serves where a
// block would have more than 10 steps, until there are 1.5 blocks a processor (5120 -> 1280: 3.3 us
// for 4.6 without). Where tiles are many, four warps of several rounds have less to set up and to
// add than ten of one (1280 -> 51866: 14.8 us for 18.9).
inline Plan plan_of(int tiles, int blocks, int most, int processors, int clusters) {
    const int steps = (blocks + 1) / 2;
    Plan p = {0, 1};
    int own = steps;
    while (2 << p.cluster_shift <= clusters && own > (p.cluster_shift ? most : 10) &&
           2 * (tiles << p.cluster_shift) < 3 * processors) {
        p.cluster_shift++;
        own = (steps + (1 << p.cluster_shift) - 1) >> p.cluster_shift;
    }
    const int warps = tiles > 4 * processors ? 4 : most, rounds = (own + warps - 1) / warps;
    if (rounds) p.warps = (own + rounds - 1) / rounds;
    return p;
}

// T: __half or __nv_bfloat16. X_TILES: of 8 rows of x. Launch: (tiles of all matrices × cluster) ×
// (32 × warps) threads.
template <typename T, int BITS, bool GROUPED, int X_TILES>
__global__ void __launch_bounds__(32 * most_warps(BITS, X_TILES), kAtOnce) gemv(const Gemv a) {
    constexpr int TABLE = BITS > 4 ? 1 << BITS : 1;
    constexpr int SUMS = 8 * X_TILES * kSumStride;
    constexpr int PARTS = kMostCluster * 8 * X_TILES * kTile;
    DQW_SHARED(uint16_t, table, TABLE);
    DQW_SHARED(float, sums, most_warps(BITS, X_TILES) * SUMS);  // of the warps
    DQW_SHARED(float, parts, PARTS);                            // of the cluster's blocks
    DQW_SHARED(uint64_t, arrival, 1);

    let_next_start();
    const int cluster = 1 << a.cluster_shift, rank = blockIdx.x & (cluster - 1);
    int tile = blockIdx.x >> a.cluster_shift, which = 0;
    if (cluster > 1) cluster_begin(arrival, rank, 4 * kTile * a.m * cluster);
    while (which + 1 < a.matrices && tile >= (a.matrix[which].rows + kTile - 1) / kTile) {
        tile -= (a.matrix[which].rows + kTile - 1) / kTile;
        which++;
    }
    const Matrix& w = a.matrix[which];
    const int threads = blockDim.x, warps = threads / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, t = lane % 4;
    const int j = 16 * (t % 2);
    const int rows = w.rows - tile * kTile - r;  // from the lane's first on: reads what exists
    const int row_bytes = a.blocks * 8 * BITS;
    const uint8_t* weight = w.weight + (int64_t)(tile * kTile + r) * row_bytes;
    const uint16_t* scale =
        reinterpret_cast<const uint16_t*>(w.scale) + (int64_t)(tile * kTile + r) * w.scale_stride;

    // A step's loads are all sent before the first is used: few warps must cover the latency.
    Share<BITS, GROUPED> share[4] = {};
    const auto ask = [&](int step) {
        const int block = 2 * step + t / 2;
        const uint8_t* p = weight + block * 8 * BITS;
#pragma unroll
        for (int h = 0; h < 4; h++) {
            share[h].load(p + h * (8 * row_bytes), j, block < a.blocks && 8 * h < rows);
        }
#pragma unroll
        for (int h = 0; h < 4; h++) {
            share[h].load_scales(scale + h * (8 * w.scale_stride), 64 * block + j, a, 8 * h < rows);
        }
    };
    const int all = (a.blocks + 1) / 2, own = (all + cluster - 1) >> a.cluster_shift;
    const int end = own * (rank + 1) < all ? own * (rank + 1) : all;
    int step = own * rank + warp;
    const int level = BITS <= 4 ? a.levels[lane % (1 << (BITS <= 4 ? BITS - 1 : 0))] : 0;
    if (step < end) ask(step);
    Pool pool = {};
    if (BITS <= 4) {
        pool = pool_of(bits_of(from_float<T>((float)level)), lane, 1 << (BITS - 1),
                       hidden_zero(weight));
    } else {
        for (int i = threadIdx.x; i < TABLE; i += threads) {
            table[i] = bits_of(from_float<T>((float)a.levels[i]));
        }
        __syncthreads();
    }
    // In the end a lane writes a row of W for some rows of x.
    const int n = tile * kTile + lane;
    float row_scale = 1, bias = 0;
    if (n < w.rows) {
        if (!GROUPED) row_scale = reinterpret_cast<const float*>(w.scale)[n * w.scale_stride];
        if (w.bias) bias = to_float(reinterpret_cast<const T*>(w.bias)[n]);
    }
    wait_for_previous();  // weights do not depend on it, x does

    float total[2][X_TILES][4] = {};
    const uint16_t* x[X_TILES];
    int left[X_TILES];
    for (int i = 0; i < X_TILES; i++) {
        const int64_t start = (int64_t)(r + 8 * i) * a.cols + 64 * (t / 2) + j;
        x[i] = reinterpret_cast<const uint16_t*>(a.x) + start;
        left[i] = r + 8 * i < a.m ? a.cols - 64 * (t / 2) - j : 0;
    }
    while (step < end) {
        Columns columns[X_TILES];
#pragma unroll
        for (int i = 0; i < X_TILES; i++) columns[i].load(x[i] + 128 * step, left[i] - 128 * step);
#pragma unroll
        for (int q = 0; q < 4; q++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint32_t v[4], z[4];  // beyond the last column x is 0, whatever level code 0 is
                share[2 * h].template decode<T>(q, j, pool, table, v);
                share[2 * h + 1].template decode<T>(q, j, pool, table, z);
#pragma unroll
                for (int i = 0; i < X_TILES; i++) {
                    const uint2 first = columns[i].first[q], second = columns[i].second[q];
                    multiply<T>(total[h][i], v[0], z[0], v[1], z[1], first.x, first.y);
                    multiply<T>(total[h][i], v[2], z[2], v[3], z[3], second.x, second.y);
                }
            }
        }
        step += warps;
        if (step < end) ask(step);
    }

    for (int h = 0; h < 2; h++) {
        for (int i = 0; i < X_TILES; i++) {
            float* sum = sums + warp * SUMS + (8 * i + 2 * t) * kSumStride + 16 * h + r;
            sum[0] = total[h][i][0], sum[kSumStride] = total[h][i][1];
            sum[8] = total[h][i][2], sum[kSumStride + 8] = total[h][i][3];
        }
    }
    __syncthreads();

    if (cluster > 1) {  // to the first block, which adds and writes
        cluster_wait();
        for (int m = warp; m < a.m; m += warps) {
            float v = 0;
            for (int k = 0; k < warps; k++) v += sums[k * SUMS + m * kSumStride + lane];
            send_to_first(parts, PARTS, (rank * 8 * X_TILES + m) * kTile + lane, v, arrival);
        }
        if (rank > 0) return;
        receive(arrival);
    }
    for (int m = warp; m < a.m; m += warps) {
        float v = 0;
        if (cluster > 1) {
            for (int k = 0; k < cluster; k++) v += parts[(k * 8 * X_TILES + m) * kTile + lane];
        } else {
            for (int k = 0; k < warps; k++) v += sums[k * SUMS + m * kSumStride + lane];
        }
        v = v * row_scale + bias;
        if (a.gelu) v = gelu(v);
        if (n < w.rows) reinterpret_cast<T*>(w.y)[(int64_t)m * w.rows + n] = from_float<T>(v);
    }
}

}  // namespace dqw
