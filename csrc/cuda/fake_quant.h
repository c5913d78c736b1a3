// Fake quantization from the learned clip, in one pass over the weight:
//
//     exact = clip / level_max        scale = exact as it is stored (reference.stored_scale)
//     y     = copysign(level * scale, x),  level = bucket[floor(min(|x| * (2 / scale), last))]
//     dx    = grad inside the clip, else 0
//     dclip = factor * sum of grad * sign(x) * (level - |x| / scale inside, level outside)
//
// y, dx and the scale are those of dqw/reference.py bit for bit; dclip differs by the order of its
// sum, which is the same on every run: no atomics.
//
// A segment is the columns of a row that share a clip, a chunk what a thread loads at once: 16
// bytes of x, or one element where they would not be aligned. fake_quant_groups takes segments of 2
// to 32 chunks, a power of two: the whole matrix is one array of chunks, a lane computes the scale
// of one of its warp's segments, and the others ask it. fake_quant_teams takes all else, a team of
// warps a segment. All loads of a thread, the table's and the clip's too, are sent before the first
// is used: at these sizes a launch is mostly latency. No torch here: tests run this file on CPU
// threads (tests/cuda_host/shim.h).
#pragma once

#include "fake_quant_chunk.h"

namespace dqw {

// A thread's first entry of the table, asked for before all else; later it is written.
struct Entry {
    int16_t level;
    bool exists;

    __device__ void read(const FakeQuant& a) {
        exists = a.last < kTable && (int)threadIdx.x <= a.last;
        level = exists ? a.bucket[threadIdx.x] : 0;
    }
    __device__ void write(const FakeQuant& a, float* table) const {
        if (exists) table[threadIdx.x] = level;
        if (a.last >= kTable) return;
        for (int k = threadIdx.x + blockDim.x; k <= a.last; k += blockDim.x) table[k] = a.bucket[k];
    }
};

// The sum over 2^shift neighbouring lanes, in all of them.
__device__ inline float sum_of_lanes(float v, int shift) {
    for (int other = 1 << shift >> 1; other > 0; other >>= 1) {
        v += __shfl_xor_sync(0xffffffffu, v, other);
    }
    return v;
}

template <typename Chunk, int MOST>
__global__ void __launch_bounds__(128, 8)
    fake_quant_groups(const __grid_constant__ FakeQuants<MOST> all) {
    DQW_SHARED(float, table, kTable);
    int block;
    const FakeQuant& a = all.each[matrix_of(all, block)];
    constexpr int V = Chunk::kColumns, TILE = 32 * kChunks;
    static_assert(TILE / 2 <= 32, "a lane has one segment at most");
    const int lane = threadIdx.x % 32, mine = (1 << a.shift) - 1;
    const int64_t first = ((int64_t)block * (blockDim.x / 32) + threadIdx.x / 32) * TILE;
    const int64_t left = a.elements / V - first;
    const int here = left < TILE ? (left > 0 ? (int)left : 0) : TILE;
    Entry entry;
    entry.read(a);
    Chunk chunk[kChunks];
#pragma unroll
    for (int u = 0; u < kChunks; u++) {
        if (32 * u + lane < here) chunk[u].read(a, (first + 32 * u + lane) * V);
    }
    const int64_t segment = first >> a.shift;
    Clip clip;
    clip.read(a, segment + lane, lane < here >> a.shift);
    entry.write(a, table);
    const Scale own = scale_of(a, clip);
    __syncthreads();
#pragma unroll
    for (int u = 0; u < kChunks; u++) {
        const int s = (32 * u + lane) >> a.shift;
        const bool exists = 32 * u + lane < here;
        const float scale = __shfl_sync(0xffffffffu, own.stored, s);
        const float inverse = __shfl_sync(0xffffffffu, own.inverse, s);
        float total = 0.0f;
        if (exists) {
            total = chunk[u].finish(a, (first + 32 * u + lane) * V, scale, inverse, table);
        }
        if (Chunk::kSums) {
            total = sum_of_lanes(total, a.shift);
            const float exact = __shfl_sync(0xffffffffu, own.exact, s);
            if (exists && !(lane & mine)) a.dclip[segment + s] = clip_gradient(a, exact, total);
        }
    }
}

template <typename Chunk, int MOST>
__global__ void __launch_bounds__(32 * kTeamWarps, 2)
    fake_quant_teams(const __grid_constant__ FakeQuants<MOST> all) {
    DQW_SHARED(float, table, kTable);
    DQW_SHARED(float, parts, kTeamWarps);
    int block;
    const FakeQuant& a = all.each[matrix_of(all, block)];
    constexpr int V = Chunk::kColumns;
    const int size = 32 * a.warps;  // teams share a block only where they have one warp or two
    const int team = a.teams == 1 ? 0 : threadIdx.x >> (4 + a.warps), t = threadIdx.x - team * size;
    const int number = block * a.teams + team;
    const bool exists = number < a.count;
    int row = number, skipped = 0, columns = a.cols;
    if (a.groups > 1) {
        row = number / a.groups;
        skipped = (number - row * a.groups) * a.segment;
        columns = a.cols - skipped < a.segment ? a.cols - skipped : a.segment;
    }
    const int chunks = exists ? columns / V : 0;
    const int64_t begin = (int64_t)row * a.cols + skipped;
    Chunk chunk[kChunks];
    const auto read = [&](int first) {
#pragma unroll
        for (int u = 0; u < kChunks; u++) {
            const int i = first + u * size;
            if (i < chunks) chunk[u].read(a, begin + (int64_t)i * V);
        }
    };
    Entry entry;
    entry.read(a);
    read(t);
    Clip clip;
    clip.read(a, a.per_tensor ? 0 : number, exists);
    entry.write(a, table);
    const Scale own = scale_of(a, clip);
    __syncthreads();
    float total = 0.0f;
    for (int first = t;;) {
#pragma unroll
        for (int u = 0; u < kChunks; u++) {
            const int i = first + u * size;
            if (i >= chunks) continue;
            total += chunk[u].finish(a, begin + (int64_t)i * V, own.stored, own.inverse, table);
        }
        first += kChunks * size;
        if (first >= chunks) break;
        read(first);
    }
    if (!Chunk::kSums) return;
    total = sum_of_lanes(total, 5);
    if (a.warps > 1) {
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = total;
        __syncthreads();
        if (t == 0) {
            total = parts[team * a.warps];
            for (int w = 1; w < a.warps; w++) total += parts[team * a.warps + w];
        }
    }
    if (t != 0 || !exists) return;
    if (a.per_tensor) {
        a.sums[number] = total;
    } else {
        a.dclip[number] = clip_gradient(a, own.exact, total);
    }
}

// The gradient of the one clip from the sums of the rows; a block of kTeamWarps warps a matrix.
template <int MOST>
__global__ void __launch_bounds__(32 * kTeamWarps)
    fake_quant_total(const __grid_constant__ FakeQuants<MOST> all) {
    DQW_SHARED(float, parts, kTeamWarps);
    const FakeQuant& a = all.each[blockIdx.x];
    float total = 0.0f;
    for (int i = threadIdx.x; i < a.count; i += blockDim.x) total += a.sums[i];
    total = sum_of_lanes(total, 5);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < (int)blockDim.x / 32; w++) total += parts[w];
    Clip clip;
    clip.read(a, 0, true);
    a.dclip[0] = clip_gradient(a, scale_of(a, clip).exact, total);
}

}  // namespace dqw
