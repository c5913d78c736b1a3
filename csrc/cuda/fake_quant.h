// Fake quantization from the learned clip, in one pass over the weight:
//
//     exact = clip / level_max        scale = exact as it is stored (reference.stored_scale)
//     y     = copysign(level * scale, x),  level = bucket[floor(min(|x| * (2 / scale), 2
//     level_max))] dx    = grad inside the clip, else 0 dclip = factor * sum of grad * sign(x) *
//     (level - |x| / scale inside, level outside)
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

#ifdef DQW_CUDA_ON_HOST
#include "shim.h"
#else
#include "device.h"
#endif

namespace dqw {

constexpr int kChunks = 2;      // of a thread, whose loads are in flight together
constexpr int kTeamWarps = 16;  // of a block at most
constexpr int kTable = 256;     // entries of a bucket table that a block keeps in shared memory
constexpr float kSmallestScale = 1.0f / (1 << 20);  // dqw/packing.py
constexpr int kDroppedBits = 19;                    // of a float's mantissa, by a group's scale

struct FakeQuant {
    const void *x, *grad;  // (rows, cols), contiguous
    void* out;             // y, or dx
    const float* clip;     // (rows, groups), or one
    const float* window;   // the smallest and the largest scale of groups, or null
    const int16_t* bucket;
    float* dclip;
    float* sums;                // of the rows, if there is one clip: fake_quant_total adds them up
    int64_t elements;           // rows * cols
    int cols, segment, groups;  // of a row: its columns, a segment's, and its segments
    int count;                  // segments
    int last;                   // 2 * level_max, the table's last index
    int shift;                  // fake_quant_groups: a segment has 2^shift chunks
    int warps, teams;           // fake_quant_teams: of a team, and teams of a block
    float factor;               // from dscale to dclip
    bool per_tensor;
};

// ---- the scale ----

struct Clip {
    float clip, low, high;  // low and high: of the window

    __device__ void read(const FakeQuant& a, int64_t at, bool exists) {
        clip = exists ? a.clip[at] : 1.0f;
        if (a.window) low = a.window[0], high = a.window[1];
    }
};
struct Scale {
    float exact, stored, inverse;  // inverse: 2 / stored
};

__device__ inline Scale scale_of(const FakeQuant& a, Clip c) {
    const float exact = __fdiv_rn(c.clip, 0.5f * a.last);
    float stored = exact < kSmallestScale ? kSmallestScale : exact;  // NaN stays
    if (a.window) {
        stored = exact >= c.low ? exact : c.low;
        stored = stored <= c.high ? stored : c.high;
        const uint32_t up = __float_as_uint(stored) + (1u << (kDroppedBits - 1));
        stored = __uint_as_float(up & ~((1u << kDroppedBits) - 1));
        stored = __fadd_rn(stored, __fmul_rn(exact, 0.0f));  // NaN stays, and infinity becomes it
    }
    return {exact, stored, __fdiv_rn(2.0f, stored)};
}

// No gradient flows where the smallest scale stands in.
__device__ inline float clip_gradient(const FakeQuant& a, float exact, float total) {
    return exact < kSmallestScale ? 0.0f : __fmul_rn(total, a.factor);
}

// ---- chunks ----

template <typename T>
__device__ inline float widen(uint32_t word, int half);
template <>
__device__ inline float widen<float>(uint32_t word, int) {
    return __uint_as_float(word);
}
template <>
__device__ inline float widen<__half>(uint32_t word, int half) {
    return half_to_float((uint16_t)(half ? word >> 16 : word));
}
template <>
__device__ inline float widen<__nv_bfloat16>(uint32_t word, int half) {
    return __uint_as_float(half ? word & 0xffff0000u : word << 16);
}
template <typename T>
__device__ inline uint32_t narrow(float v) {
    return bits_of(from_float<T>(v));
}
template <>
__device__ inline uint32_t narrow<float>(float v) {
    return __float_as_uint(v);
}

// V elements of type T as they lie in memory.
template <int BYTES>
struct alignas(BYTES) Raw {
    uint32_t word[BYTES / 4];
};
template <>
struct Raw<2> {
    uint16_t word[1];
};
template <typename T, int V>
struct Vector {
    using Bytes = Raw<V * sizeof(T)>;
    static constexpr int kPerWord = V == 1 ? 1 : 4 / sizeof(T);
    Bytes raw;

    __device__ void read(const void* p, int64_t at) {
        raw = load(reinterpret_cast<const Bytes*>(static_cast<const T*>(p) + at));
    }
    __device__ float operator[](int i) const {
        return widen<T>(raw.word[i / kPerWord], i % kPerWord);
    }
    __device__ static void write(void* p, int64_t at, const float (&v)[V]) {
        Bytes out;
#pragma unroll
        for (int i = 0; i < V; i += kPerWord) {
            if constexpr (kPerWord == 2) {
                out.word[i / 2] = narrow_pair<T>(v[i], v[i + 1]);
            } else {
                out.word[i] = narrow<T>(v[i]);
            }
        }
        store(reinterpret_cast<Bytes*>(static_cast<T*>(p) + at), out);
    }
};

// The level nearest to an x of t = |x| * (2 / scale); a t of NaN counts as 0. t + 2^23, rounded
// down, is an integer with floor(t) in its lowest bits: a conversion would be a slow instruction,
// and for a level that comes from the whole table a second one.
__device__ inline float level_of(float t, const FakeQuant& a, const float* table) {
    const float clipped = fminf(fmaxf(t, 0.0f), (float)a.last);
    const uint32_t k = __float_as_uint(__fadd_rz(clipped, 8388608.0f)) & 0xffffu;
    if (a.last < kTable) return table[k];
    const uint32_t level = static_cast<uint16_t>(a.bucket[k]);
    return __uint_as_float(0x4b000000u | level) - 8388608.0f;
}
__device__ inline uint32_t sign_of(float v) { return __float_as_uint(v) & 0x80000000u; }

template <typename X, typename Y, int V>
struct Forward {
    static constexpr int kColumns = V;
    static constexpr bool kSums = false;
    Vector<X, V> x;

    __device__ void read(const FakeQuant& a, int64_t at) { x.read(a.x, at); }
    __device__ float finish(const FakeQuant& a, int64_t at, float scale, float inverse,
                            const float* table) const {
        float y[V];
#pragma unroll
        for (int i = 0; i < V; i++) {
            const float v = x[i];
            const float level = level_of(__fmul_rn(fabsf(v), inverse), a, table);
            const uint32_t bits = __float_as_uint(__fmul_rn(level, scale)) | sign_of(v);
            y[i] = v == v ? __uint_as_float(bits) : v;
        }
        Vector<Y, V>::write(a.out, at, y);
        return 0.0f;
    }
};

template <typename X, typename Y, int V>
struct Backward {
    static constexpr int kColumns = V;
    static constexpr bool kSums = true;
    Vector<X, V> x;
    Vector<Y, V> grad;

    __device__ void read(const FakeQuant& a, int64_t at) {
        x.read(a.x, at);
        grad.read(a.grad, at);
    }
    // → this chunk's part of dscale
    __device__ float finish(const FakeQuant& a, int64_t at, float, float inverse,
                            const float* table) const {
        float dx[V], total = 0.0f;
        const float last = (float)a.last;
#pragma unroll
        for (int i = 0; i < V; i++) {
            const float v = x[i], g = grad[i], t = __fmul_rn(fabsf(v), inverse);
            const bool inside = t <= last, number = v == v;
            // t / 2 is |x| / scale. The sign of x goes to the gradient.
            const float beyond = __fmaf_rn(-0.5f, inside ? t : 0.0f, level_of(t, a, table));
            const float turned = __uint_as_float(__float_as_uint(g) ^ sign_of(v));
            total = __fmaf_rn(number ? beyond : v, turned, total);
            dx[i] = inside || !number ? g : 0.0f;
        }
        Vector<X, V>::write(a.out, at, dx);
        return total;
    }
};

// ---- kernels ----

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

template <typename Chunk>
__global__ void __launch_bounds__(128, 8) fake_quant_groups(const FakeQuant a) {
    DQW_SHARED(float, table, kTable);
    constexpr int V = Chunk::kColumns, TILE = 32 * kChunks;
    static_assert(TILE / 2 <= 32, "a lane has one segment at most");
    const int lane = threadIdx.x % 32, mine = (1 << a.shift) - 1;
    const int64_t first = ((int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * TILE;
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

template <typename Chunk>
__global__ void __launch_bounds__(32 * kTeamWarps, 2) fake_quant_teams(const FakeQuant a) {
    DQW_SHARED(float, table, kTable);
    DQW_SHARED(float, parts, kTeamWarps);
    constexpr int V = Chunk::kColumns;
    const int size = 32 * a.warps;  // teams share a block only where they have one warp or two
    const int team = a.teams == 1 ? 0 : threadIdx.x >> (4 + a.warps), t = threadIdx.x - team * size;
    const int number = blockIdx.x * a.teams + team;
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

// The gradient of the one clip from the sums of the rows; one block of kTeamWarps warps.
__global__ void __launch_bounds__(32 * kTeamWarps) fake_quant_total(const FakeQuant a) {
    DQW_SHARED(float, parts, kTeamWarps);
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
