// The decoder's kernel: y = x W^T (+ bias, GELU) for up to 32 rows of x, W packed at 2 to 8 bits.
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
// float32 and up to 8 rows of x cost what one costs; 9 to 16 take a second product, 17 to 32 four.
//
// A quarter of a step is 16 neighbouring columns and the 16 that lie 32 further on: 16 bytes of a
// 4-bit plane, by one load. So groups of 16 and more are whole in it: their scale multiplies the
// decoded pairs, exactly in float16 (levels have up to 5 bits at 4 bits, stored scales 5; learned
// levels have 7 and are rounded as a float16 weight is), rounded as a bfloat16 weight is in
// bfloat16. One scale a row comes after the sum, in float32.
//
// Weights depend on nothing that runs before: they are asked for first, then the kernel waits for
// its predecessor (programmatic dependent launch), then x is read. So what writes weights must be
// waited for, as QuantModule.freeze does. No torch here: tests run this file on CPU threads
// (tests/cuda_host/shim.h).
#pragma once

#include "share.h"

namespace dqw {

constexpr int kTile = 32;        // rows of W
constexpr int kMost = 32;        // rows of x
constexpr int kMostWarps = 10;   // of a block
constexpr int kMostCluster = 8;  // blocks that share a tile
constexpr int kSumStride = 36;   // of a row of x in sums: no two lanes store to one bank

__device__ inline float gelu(float v) { return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f)); }

// Two blocks fit a processor, which leaves a thread 96 or 128 registers, 168 of 6 warps and 255 of
// 4; for sm_80 ptxas would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kAtOnce = 1;
#else
constexpr int kAtOnce = 2;
#endif

// Tiles of 8 rows of x that a kernel for m rows has: 1, 2 or 4.
inline int x_tiles_of(int m) { return m <= 8 ? 1 : m <= 16 ? 2 : 4; }

// Blocks that share a tile at most: what they send must fit beside the warps' sums.
__host__ __device__ constexpr int most_cluster(int x_tiles) {
    return x_tiles == 4 ? kMostCluster / 2 : kMostCluster;
}

// Warps of a block at most, for registers to suffice.
__host__ __device__ constexpr int most_warps(int bits, int x_tiles, bool grouped) {
    if (x_tiles == 4) return 4;
    if (bits == 7 && x_tiles == 2 && grouped) return 6;
    return x_tiles == 2 || bits == 3 || bits == 7 || (bits == 8 && grouped) ? 8 : kMostWarps;
}

// How the columns of a tile are shared: by how many blocks, of how many warps.
struct Plan {
    int cluster_shift, warps;
};

// most: most_warps. From `python -m bench.plans` on an H100, 2026-11-27: a cluster serves where a
// block would have more than 10 steps (8 of those with 4 warps, not timed), until every step has a
// warp or there are 1.5 blocks a processor (5120 -> 1280: 3.3 us for 4.6 without). Steps left over
// go to the first warps once more: 8 and 2 take less than 5 and 5 (16 x 1280 -> 5120: 4.7 us
// for 5.7). Where tiles are many, four warps of several rounds have less to set up and to add than
// ten of one (1280 -> 51866: 14.8 us for 18.9).
inline Plan plan_of(int tiles, int blocks, int most, int processors, int clusters) {
    const int steps = (blocks + 1) / 2;
    Plan p = {0, 1};
    int own = steps;
    const int alone = 2 * most < kMostWarps ? 2 * most : kMostWarps;  // steps of a block without
    while (2 << p.cluster_shift <= clusters && own > (p.cluster_shift ? most : alone) &&
           2 * (tiles << p.cluster_shift) < 3 * processors) {
        p.cluster_shift++;
        own = (steps + (1 << p.cluster_shift) - 1) >> p.cluster_shift;
    }
    const int warps = tiles > 4 * processors ? 4 : most;
    if (own > 0) p.warps = own < warps ? own : warps;
    return p;
}

// T: __half or __nv_bfloat16. X_TILES: of 8 rows of x. Launch: (tiles of all matrices × cluster) ×
// (32 × warps) threads.
template <typename T, int BITS, bool GROUPED, int X_TILES>
__global__ void __launch_bounds__(32 * most_warps(BITS, X_TILES, GROUPED), kAtOnce)
    gemv(const Gemv a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    return;  // code for older cards is for fake quantization: see _is_new_enough in dqw/ops_cuda.py
#endif
    constexpr int TABLE = BITS > 4 ? 1 << BITS : 1;
    constexpr int SUMS = 8 * X_TILES * kSumStride;
    constexpr int PARTS = most_cluster(X_TILES) * 8 * X_TILES * kTile;
    DQW_SHARED(uint16_t, table, TABLE);
    DQW_SHARED(float, sums, most_warps(BITS, X_TILES, GROUPED) * SUMS);  // of the warps
    DQW_SHARED(float, parts, PARTS);                                     // of the cluster's blocks
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
    // Magnitudes rise from 0 or more (a tail without use is 0): where the last is its index, each
    // is.
    constexpr int LAST = (1 << (BITS - 1)) - 1;
    const bool uniform = BITS > 4 && a.levels[LAST] == LAST;
    if (BITS <= 4) {
        pool = pool_of(bits_of(from_float<T>((float)level)), lane, 1 << (BITS - 1),
                       hidden_zero(weight));
    } else if (!uniform) {
        for (int i = threadIdx.x; i < TABLE; i += threads) {
            table[i] = bits_of(from_float<T>((float)a.levels[i]));
        }
        __syncthreads();
    }
    // In the end a lane writes a row of W for some rows of x.
    const int n = tile * kTile + lane;
    float row_scale = 1, bias = 0;
    if (!GROUPED && n < w.rows) {
        row_scale = reinterpret_cast<const float*>(w.scale)[n * w.scale_stride];
    }
    wait_for_previous();  // weights do not depend on it; x does, and a bias that was just cast
    if (w.bias && n < w.rows) bias = to_float(reinterpret_cast<const T*>(w.bias)[n]);

    float total[2][X_TILES][4] = {};
    const uint16_t* x[X_TILES];
    int left[X_TILES];
    for (int i = 0; i < X_TILES; i++) {
        const int64_t start = (int64_t)(r + 8 * i) * a.cols + 64 * (t / 2) + j;
        x[i] = reinterpret_cast<const uint16_t*>(a.x) + start;
        left[i] = r + 8 * i < a.m ? a.cols - 64 * (t / 2) - j : 0;
    }
    const auto work = [&]<bool UNIFORM>() {
        while (step < end) {
            Columns columns[X_TILES];
#pragma unroll
            for (int i = 0; i < X_TILES; i++)
                columns[i].load(x[i] + 128 * step, left[i] - 128 * step);
#pragma unroll
            for (int q = 0; q < 4; q++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    uint32_t v[4], z[4];  // beyond the last column x is 0, whatever level code 0 is
                    share[2 * h].template decode<T, UNIFORM>(q, j, pool, table, v);
                    share[2 * h + 1].template decode<T, UNIFORM>(q, j, pool, table, z);
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
    };
    if (BITS > 4 && uniform) {
        work.template operator()<true>();
    } else {
        work.template operator()<false>();
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
