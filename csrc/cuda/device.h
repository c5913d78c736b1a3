// What the kernels ask of the device, for a GPU. tests/cuda_host/shim.h has the same for CPU
// threads.
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

// Two elements of a 16-bit type in a word, the first in its lower half.
template <typename T>
__device__ inline uint32_t narrow_pair(float a, float b);
template <>
__device__ inline uint32_t narrow_pair<__half>(float a, float b) {
    const __half2 v = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
}
template <>
__device__ inline uint32_t narrow_pair<__nv_bfloat16>(float a, float b) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
}

// All of V, which has its words in an array, at once. In assembly, or stores may come one word
// after the other. The host's stand-in checks that V is aligned.
template <typename V>
__device__ inline V load(const V* p) {
    return *p;
}
template <typename V>
__device__ inline void store(V* p, const V& v) {
    if constexpr (sizeof(V) == 16) {
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                     :
                     : "l"(p), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]));
    } else if constexpr (sizeof(V) == 8) {
        asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(p), "r"(v.word[0]), "r"(v.word[1]));
    } else {
        *p = v;
    }
}

// Four bytes of the eight of b:a by the four nibbles of `selector`. PTX's own instruction: CUDA's
// intrinsic masks its selector once more.
__device__ inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
    return out;
}

#define DQW_SHARED(type, name, size) __shared__ type name[size]

// What the blocks of a cluster send to their first one, from sm_90 on. All threads: cluster_begin,
// cluster_wait (the first block's memory is there), send_to_first, and in the first block receive,
// which waits until all `bytes` have come. No fence: the stores themselves are counted.
__device__ inline void cluster_begin(uint64_t* arrival, int rank, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (rank == 0 && threadIdx.x == 0) {
        const uint32_t here = (uint32_t)__cvta_generic_to_shared(arrival);
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" : : "r"(here) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
        asm volatile("{.reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1;}"
                     :
                     : "r"(here), "r"(bytes)
                     : "memory");
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" : : : "memory");
#endif
}
__device__ inline void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" : : : "memory");
#endif
}
// v to parts[index] of the first block. size: of parts, for the host's stand-in.
__device__ inline void send_to_first(float* parts, int size, int index, float v,
                                     uint64_t* arrival) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t there, counter;
    const uint32_t here = (uint32_t)__cvta_generic_to_shared(parts + index);
    const uint32_t own = (uint32_t)__cvta_generic_to_shared(arrival);
    asm("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(there) : "r"(here));
    asm("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(counter) : "r"(own));
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];"
                 :
                 : "r"(there), "f"(v), "r"(counter)
                 : "memory");
#endif
}
__device__ inline void receive(uint64_t* arrival) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const uint32_t here = (uint32_t)__cvta_generic_to_shared(arrival);
    asm volatile(
        "{.reg .pred p; again:"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0;"
        "@!p bra again;}"
        :
        : "r"(here)
        : "memory");
#endif
}

// Bitwise or of all lanes, from sm_80 on.
__device__ inline uint32_t or_of_warp(uint32_t v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return __reduce_or_sync(0xffffffffu, v);
#else
    return v;
#endif
}

// Weights are read once: they should not push x out of L1, where no other load shares their
// sectors (PASS). L2 keeps them: a small Whisper stays there from token to token. Zero, and nothing
// read, where it does not exist. volatile: the compiler must not put a load off to where it is
// used.
template <bool PASS = false>
__device__ inline uint2 load_once(const uint2* p, bool exists) {
    uint2 v;
    asm volatile(
        "{.reg .pred q; setp.ne.s32 q, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0;"
        "@q ld.global.v2.u32 {%0, %1}, [%2];}"
        : "=&r"(v.x), "=&r"(v.y)
        : "l"(p), "r"((int)exists));
    return v;
}
#define DQW_LOAD_16(how)                                              \
    asm volatile(                                                     \
        "{.reg .pred q; setp.ne.s32 q, %5, 0;"                        \
        "mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;" \
        "@q ld.global" how ".v4.u32 {%0, %1, %2, %3}, [%4];}"         \
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)              \
        : "l"(p), "r"((int)exists))
template <bool PASS = false>
__device__ inline uint4 load_once(const uint4* p, bool exists) {
    uint4 v;
    if (PASS) {
        DQW_LOAD_16(".L1::no_allocate");
    } else {
        DQW_LOAD_16("");
    }
    return v;
}
#undef DQW_LOAD_16

// 16 bytes of x, OFFSET bytes on from p; zero where they do not exist. x is written by the kernel
// before, which may still run when this one starts: not by the path for data that nothing writes.
// In assembly, so that one address and one comparison serve all loads of a row.
template <int OFFSET>
__device__ inline uint4 load_x(const uint16_t* p, bool exists) {
    uint4 v;
    asm volatile(
        "{.reg .pred q; setp.ne.s32 q, %5, 0;"
        "mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
        "@q ld.global.v4.u32 {%0, %1, %2, %3}, [%4 + %6];}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(p), "r"((int)exists), "n"(OFFSET));
    return v;
}

// v, zero at run time only: ptxas must not know, or it keeps what is the same in all lanes in
// uniform registers, and PRMT takes one of those at a time.
__device__ inline uint32_t hidden_zero(const void* v) {
    return (uint32_t)(reinterpret_cast<uintptr_t>(v) >> 63);
}

// Programmatic dependent launch, from sm_90 on. let_next_start: the stream's next kernel may start
// once all blocks of this one have come here. wait_for_previous: all that was launched before has
// ended and what it wrote can be seen.
__device__ inline void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ inline void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A group's scale, float16 bits, twice as T; a pair of T by it, rounded once.
template <typename T>
__device__ inline uint32_t scale_pair(uint16_t scale);
template <>
__device__ inline uint32_t scale_pair<__half>(uint16_t scale) {
    return prmt(scale, 0, 0x1010);
}
template <>
__device__ inline uint32_t scale_pair<__nv_bfloat16>(uint16_t scale) {
    return prmt(bits_of(from_float<__nv_bfloat16>(half_to_float(scale))), 0, 0x1010);
}
template <typename T>
__device__ inline uint32_t times(uint32_t pair, uint32_t scale);
template <>
__device__ inline uint32_t times<__half>(uint32_t pair, uint32_t scale) {
    uint32_t out;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(pair), "r"(scale));
    return out;
}
template <>
__device__ inline uint32_t times<__nv_bfloat16>(uint32_t pair, uint32_t scale) {
    uint32_t out;  // - 0 keeps the sign of a product that is zero; sm_80 has no bfloat16 product
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(pair), "r"(scale), "r"(0x80008000u));
    return out;
}

// A pair of the power of two whose lowest bit counts 1; its low byte is 0.
template <typename T>
__device__ inline uint32_t large_of();
template <>
__device__ inline uint32_t large_of<__half>() {
    return 0x64006400u;  // 1024
}
template <>
__device__ inline uint32_t large_of<__nv_bfloat16>() {
    return 0x43004300u;  // 128
}
template <typename T>
__device__ inline uint32_t minus(uint32_t pair, uint32_t other);
template <>
__device__ inline uint32_t minus<__half>(uint32_t pair, uint32_t other) {
    uint32_t out;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(pair), "r"(other));
    return out;
}
template <>
__device__ inline uint32_t minus<__nv_bfloat16>(uint32_t pair, uint32_t other) {
    uint32_t out;  // sm_80 has no bfloat16 difference: pair * 1 - other
    asm("fma.rn.bf16x2 %0, %1, %2, %3;"
        : "=r"(out)
        : "r"(pair), "r"(0x3f803f80u), "r"(other ^ 0x80008000u));
    return out;
}

// sum += A B of m16n8k16, float32. a0 a2: of row r of A columns 2t, 2t+1 and 2t+8, 2t+9, a1 a3: of
// row r + 8; b0 b1: the same of column r of B; sum: row r, columns 2t and 2t+1, then row r + 8.
// volatile: all threads of a warp must come here together, so no copy of it may go down a branch.
template <typename T>
__device__ inline void multiply(float sum[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                uint32_t b0, uint32_t b1);

#define DQW_MULTIPLY(T, type)                                                               \
    template <>                                                                             \
    __device__ inline void multiply<T>(float sum[4], uint32_t a0, uint32_t a1, uint32_t a2, \
                                       uint32_t a3, uint32_t b0, uint32_t b1) {             \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
                     ".f32 "                                                                \
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"      \
                     : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])               \
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));               \
    }
DQW_MULTIPLY(__half, "f16")
DQW_MULTIPLY(__nv_bfloat16, "bf16")
#undef DQW_MULTIPLY

}  // namespace dqw
