// What a thread of fake_quant.h computes: the scale of a clip, and a chunk of columns that share
// it, there and back.
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

// Matrices of one launch, MOST at most: each has the blocks from its first on. Those of a
// transformer layer share a launch, since a training step waits for its host; a matrix alone has a
// kernel with less to hand over.
constexpr int kTogether = 16;
template <int MOST>
struct FakeQuants {
    FakeQuant each[MOST];
    int first[MOST];  // beyond every block where there is no matrix
};

// The matrix of this block, whose number among that matrix' is left in block.
template <int MOST>
__device__ inline int matrix_of(const FakeQuants<MOST>& all, int& block) {
    int found = 0;
#pragma unroll
    for (int i = 1; i < MOST; i++) found += (int)blockIdx.x >= all.first[i];
    block = MOST == 1 ? blockIdx.x : blockIdx.x - all.first[found];
    return found;
}

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

}  // namespace dqw
