// A GPU for tests: one cluster of blocks of CUDA threads as CPU threads, for csrc/cuda's kernels.
//
// __syncthreads is a barrier of the block; a tensor-core product, which a warp does together, has
// its lanes publish their operands, meet, and each compute its own two sums. PRMT is emulated bit
// for bit, and vector loads check their alignment as a GPU would.
#pragma once

#include <stdint.h>

#include <atomic>
#include <barrier>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __host__
#define __grid_constant__
#define __global__
#define __launch_bounds__(...)

struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
struct Index {
    int x;
};
inline thread_local Index threadIdx, blockIdx, blockDim;
constexpr int kBlocksAtOnce = 8;  // of a cluster
inline thread_local int block_rank;
inline std::unique_ptr<std::barrier<>> cluster_barrier, block_barrier[kBlocksAtOnce];
inline std::vector<std::unique_ptr<std::barrier<>>> warp_barriers[kBlocksAtOnce];
inline std::barrier<>& warp_barrier() { return *warp_barriers[block_rank][threadIdx.x / 32]; }
inline void __syncwarp() { warp_barrier().arrive_and_wait(); }
inline void __syncthreads() { block_barrier[block_rank]->arrive_and_wait(); }

// Shared memory: one array a block.
#define DQW_SHARED(type, name, size)                   \
    static type name##_of_blocks[kBlocksAtOnce][size]; \
    type* name = name##_of_blocks[block_rank]

// A value of another lane. All lanes of a warp come here.
template <typename F>
float of_lane(float v, const F& source) {
    static float of[64 * kBlocksAtOnce][32];  // [warp][lane]
    const int warp = 64 * block_rank + threadIdx.x / 32, lane = threadIdx.x % 32;
    of[warp][lane] = v;
    __syncwarp();
    const float found = of[warp][source(lane)];
    __syncwarp();
    return found;
}
inline float __shfl_sync(uint32_t, float v, int lane) {
    return of_lane(v, [&](int) { return lane & 31; });
}
inline float __shfl_xor_sync(uint32_t, float v, int mask) {
    return of_lane(v, [&](int lane) { return lane ^ mask; });
}
inline uint32_t __float_as_uint(float v) { return std::bit_cast<uint32_t>(v); }
inline float __uint_as_float(uint32_t v) { return std::bit_cast<float>(v); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rz(float a, float b) {  // the double is exact enough to be cut off
    const double exact = (double)a + b;
    const float near = (float)exact;
    return std::fabs(near) > std::fabs(exact) ? std::nextafter(near, 0.0f) : near;
}

struct __half {
    _Float16 v;
};
struct __nv_bfloat16 {
    uint16_t v;
};

namespace dqw {

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t pool = (uint64_t)b << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t pick = selector >> 4 * i & 15;
        uint8_t byte = pool >> 8 * (pick & 7);
        if (pick & 8) byte = byte & 128 ? 255 : 0;
        out |= (uint32_t)byte << 8 * i;
    }
    return out;
}

inline float to_float(__half h) { return (float)h.v; }
inline float to_float(__nv_bfloat16 b) {
    const uint32_t u = (uint32_t)b.v << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
template <typename T>
T from_float(float f);
template <>
inline __half from_float<__half>(float f) {
    return {(_Float16)f};
}
template <>
inline __nv_bfloat16 from_float<__nv_bfloat16>(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    if (f != f) return {0x7fff};
    return {(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline uint16_t bits_of(__half h) {
    uint16_t u;
    std::memcpy(&u, &h.v, 2);
    return u;
}
inline uint16_t bits_of(__nv_bfloat16 b) { return b.v; }
inline float half_to_float(uint16_t u) {
    __half h;
    std::memcpy(&h.v, &u, 2);
    return to_float(h);
}
inline float value(__half, uint32_t bits) { return half_to_float(bits); }
inline float value(__nv_bfloat16, uint32_t bits) { return to_float(__nv_bfloat16{(uint16_t)bits}); }

template <typename T>
uint32_t narrow_pair(float a, float b) {
    return bits_of(from_float<T>(a)) | (uint32_t)bits_of(from_float<T>(b)) << 16;
}

template <typename V>
V* aligned(V* p) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(V) == 0) return p;
    std::fprintf(stderr, "an access of %zu bytes is not aligned\n", sizeof(V));
    std::abort();
}
template <typename V>
V load(const V* p) {
    return *aligned(p);
}
template <typename V>
void store(V* p, const V& v) {
    *aligned(p) = v;
}

template <bool PASS = false, typename V>
V load_once(const V* p, bool exists) {
    V v = {};
    if (!exists) return v;
    std::memcpy(&v, aligned(p), sizeof(V));
    return v;
}

inline thread_local bool waited;  // for the predecessor, which writes x
template <int OFFSET>
uint4 load_x(const uint16_t* p, bool exists) {
    if (!waited) {
        std::fprintf(stderr, "x is read before the kernel that writes it has ended\n");
        std::abort();
    }
    return load_once(reinterpret_cast<const uint4*>(p + OFFSET / 2), exists);
}
inline uint32_t hidden_zero(const void*) { return 0; }

// The first block's counter of bytes that are still to come.
inline std::atomic<int> to_come;
inline thread_local std::unique_ptr<std::barrier<>::arrival_token> arrived;
inline void cluster_begin(uint64_t*, int rank, int bytes) {
    if (rank == 0 && threadIdx.x == 0) to_come = bytes;
    arrived = std::make_unique<std::barrier<>::arrival_token>(cluster_barrier->arrive());
}
inline void cluster_wait() { cluster_barrier->wait(std::move(*arrived)); }
inline void send_to_first(float* parts, int size, int index, float v, uint64_t*) {
    (parts - block_rank * size)[index] = v;
    to_come -= 4;
}
inline void receive(uint64_t*) {
    const auto start = std::chrono::steady_clock::now();
    while (to_come > 0) {
        std::this_thread::yield();
        if (std::chrono::steady_clock::now() - start > std::chrono::minutes(2)) std::abort();
    }
    if (to_come < 0) std::abort();
}
inline void let_next_start() { waited = false; }
inline void wait_for_previous() { waited = true; }

inline uint32_t or_of_warp(uint32_t v) {
    static uint32_t of[64 * kBlocksAtOnce][32];  // [warp][lane]
    const int warp = 64 * block_rank + threadIdx.x / 32, lane = threadIdx.x % 32;
    of[warp][lane] = v;
    warp_barrier().arrive_and_wait();
    uint32_t all = 0;
    for (int i = 0; i < 32; i++) all |= of[warp][i];
    warp_barrier().arrive_and_wait();
    return all;
}

template <typename T>
uint32_t scale_pair(uint16_t scale) {
    const uint32_t one = bits_of(from_float<T>(half_to_float(scale)));
    return one | one << 16;
}
template <typename T>
uint32_t times(uint32_t pair, uint32_t scale) {
    const float s = value(T{}, scale & 0xffff);
    const uint32_t low = bits_of(from_float<T>(value(T{}, pair & 0xffff) * s));
    return low | (uint32_t)bits_of(from_float<T>(value(T{}, pair >> 16) * s)) << 16;
}

template <typename T>
uint32_t large_of() {
    const uint32_t one = bits_of(from_float<T>(std::is_same_v<T, __half> ? 1024.0f : 128.0f));
    return one | one << 16;
}
template <typename T>
uint32_t minus(uint32_t pair, uint32_t other) {
    const uint32_t low =
        bits_of(from_float<T>(value(T{}, pair & 0xffff) - value(T{}, other & 0xffff)));
    return low | (uint32_t)bits_of(from_float<T>(value(T{}, pair >> 16) - value(T{}, other >> 16)))
                     << 16;
}

template <typename T>
void multiply(float sum[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
              uint32_t b1) {
    static uint32_t a[64 * kBlocksAtOnce][32][4], b[64 * kBlocksAtOnce][32][2];  // [warp][lane]
    const int warp = 64 * block_rank + threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4,
              t = lane % 4;
    a[warp][lane][0] = a0, a[warp][lane][1] = a2, a[warp][lane][2] = a1, a[warp][lane][3] = a3;
    b[warp][lane][0] = b0, b[warp][lane][1] = b1;
    warp_barrier().arrive_and_wait();
    for (int n = 0; n < 4; n++) {  // row r + 8 (n / 2) of A, column 2 t + n % 2 of B
        for (int k = 0; k < 4; k++) {
            for (int half = 0; half < 2; half++) {
                const uint32_t u = a[warp][4 * r + k][n / 2 * 2 + half];
                const uint32_t v = b[warp][4 * (2 * t + n % 2) + k][half];
                sum[n] += value(T{}, u & 0xffff) * value(T{}, v & 0xffff);
                sum[n] += value(T{}, u >> 16) * value(T{}, v >> 16);
            }
        }
    }
    warp_barrier().arrive_and_wait();
}

// kernel(arguments) for every cluster of blocks, one after the other.
template <typename Kernel, typename Arguments>
void run_blocks(Kernel kernel, const Arguments& arguments, int clusters, int blocks, int threads) {
    std::barrier<> all(blocks * threads);
    cluster_barrier = std::make_unique<std::barrier<>>(blocks * threads);
    for (int b = 0; b < blocks; b++) {
        block_barrier[b] = std::make_unique<std::barrier<>>(threads);
        warp_barriers[b].clear();
        for (int w = 0; w < threads / 32; w++) {
            warp_barriers[b].push_back(std::make_unique<std::barrier<>>(32));
        }
    }
    std::vector<std::thread> pool;
    for (int i = 0; i < blocks * threads; i++) {
        pool.emplace_back([&, i] {
            threadIdx.x = i % threads;
            blockDim.x = threads;
            block_rank = i / threads;
            for (int cluster = 0; cluster < clusters; cluster++) {
                blockIdx.x = cluster * blocks + block_rank;
                kernel(arguments);
                all.arrive_and_wait();
            }
        });
    }
    for (auto& thread : pool) thread.join();
}

}  // namespace dqw
