// A GPU for tests: one block of CUDA threads as CPU threads, for csrc/cuda/gemv.h.
//
// __syncthreads is a barrier of the block; a tensor-core product, which a warp does together, has
// its lanes publish their operands, meet, and each compute its own two sums. PRMT is emulated bit
// for bit, and vector loads check their alignment as a GPU would.
#pragma once

#include <stdint.h>

#include <barrier>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
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
inline thread_local Index threadIdx, blockIdx;
inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
inline void __syncwarp() { warp_barriers[threadIdx.x / 32]->arrive_and_wait(); }
inline void __syncthreads() { block_barrier->arrive_and_wait(); }

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

template <typename V>
V load_once(const V* p, bool exists) {
    V v = {};
    if (!exists) return v;
    if (reinterpret_cast<uintptr_t>(p) % sizeof(V)) {
        std::fprintf(stderr, "a load of %zu bytes is not aligned\n", sizeof(V));
        std::abort();
    }
    std::memcpy(&v, p, sizeof(V));
    return v;
}

template <typename V>
V load_again(const V* p) {
    return load_once(p, true);
}

template <typename T>
void multiply(float sum[2], uint32_t a0, uint32_t a2, uint32_t b0, uint32_t b1) {
    static uint32_t a[32][32][2], b[32][32][2];  // [warp][lane]
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, t = lane % 4;
    a[warp][lane][0] = a0, a[warp][lane][1] = a2;
    b[warp][lane][0] = b0, b[warp][lane][1] = b1;
    warp_barriers[warp]->arrive_and_wait();
    for (int n = 0; n < 2; n++) {  // column 2 t + n of B: row 2 t + n of x
        for (int k = 0; k < 4; k++) {
            for (int half = 0; half < 2; half++) {
                const uint32_t u = a[warp][4 * r + k][half], v = b[warp][4 * (2 * t + n) + k][half];
                sum[n] += value(T{}, u & 0xffff) * value(T{}, v & 0xffff);
                sum[n] += value(T{}, u >> 16) * value(T{}, v >> 16);
            }
        }
    }
    warp_barriers[warp]->arrive_and_wait();
}

// kernel(arguments) for every block, one after the other.
template <typename Kernel, typename Arguments>
void run_blocks(Kernel kernel, const Arguments& arguments, int blocks, int threads) {
    block_barrier = std::make_unique<std::barrier<>>(threads);
    warp_barriers.clear();
    for (int w = 0; w < threads / 32; w++) {
        warp_barriers.push_back(std::make_unique<std::barrier<>>(32));
    }
    std::vector<std::thread> pool;
    for (int i = 0; i < threads; i++) {
        pool.emplace_back([&, i] {
            threadIdx.x = i;
            for (int block = 0; block < blocks; block++) {
                blockIdx.x = block;
                kernel(arguments);
                block_barrier->arrive_and_wait();
            }
        });
    }
    for (auto& thread : pool) thread.join();
}

}  // namespace dqw
