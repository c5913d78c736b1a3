// What gemv.h asks of the device, for a GPU. tests/cuda_host/shim.h has the same for CPU threads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace dqw {

__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
template <typename T>
__device__ inline T from_float(float v);
template <>
__device__ inline __half from_float<__half>(float v) {
    return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
    return __float2bfloat16_rn(v);
}
__device__ inline uint16_t bits_of(__half v) { return __half_as_ushort(v); }
__device__ inline uint16_t bits_of(__nv_bfloat16 v) { return __bfloat16_as_ushort(v); }
__device__ inline float half_to_float(uint16_t v) { return __half2float(__ushort_as_half(v)); }

// Four bytes of the eight of b:a by the four nibbles of `selector`. PTX's own instruction: CUDA's
// intrinsic masks its selector once more.
__device__ inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
    return out;
}

// Weights are read once: they should not push x out of L1. Zero, and nothing read, where it does
// not exist. volatile: the compiler must not put a load off to the branch that uses it.
__device__ inline uint2 load_once(const uint2* p, bool exists) {
    uint2 v;
    asm volatile(
        "{.reg .pred q; setp.ne.s32 q, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0;"
        "@q ld.global.cs.v2.u32 {%0, %1}, [%2];}"
        : "=&r"(v.x), "=&r"(v.y)
        : "l"(p), "r"((int)exists));
    return v;
}
__device__ inline uint4 load_once(const uint4* p, bool exists) {
    uint4 v;
    asm volatile(
        "{.reg .pred q; setp.ne.s32 q, %5, 0;"
        "mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
        "@q ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(p), "r"((int)exists));
    return v;
}

template <typename V>
__device__ inline V load_again(const V* p) {
    return __ldg(p);
}

// sum += A B of m16n8k16, float32. a0 a2: of row r of A columns 2t, 2t+1 and 2t+8, 2t+9; b0 b1:
// the same of column r of B; sum: row r, columns 2t and 2t+1. Rows 8 to 15 of A are zero.
// volatile: all threads of a warp must come here together, so no copy of it may go down a branch.
template <typename T>
__device__ inline void multiply(float sum[2], uint32_t a0, uint32_t a2, uint32_t b0, uint32_t b1);

#define DQW_MULTIPLY(T, type)                                                               \
    template <>                                                                             \
    __device__ inline void multiply<T>(float sum[2], uint32_t a0, uint32_t a2, uint32_t b0, \
                                       uint32_t b1) {                                       \
        float unused[2] = {0, 0};                                                           \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
                     ".f32 "                                                                \
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"      \
                     : "+f"(sum[0]), "+f"(sum[1]), "+f"(unused[0]), "+f"(unused[1])         \
                     : "r"(a0), "r"(0), "r"(a2), "r"(0), "r"(b0), "r"(b1));                 \
    }
DQW_MULTIPLY(__half, "f16")
DQW_MULTIPLY(__nv_bfloat16, "bf16")
#undef DQW_MULTIPLY

}  // namespace dqw
