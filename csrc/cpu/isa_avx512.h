// AVX-512 (F, BW, VL, DQ, VBMI, VNNI) as the loops want it: Ice Lake, Zen 4 and later.
#pragma once

#include <immintrin.h>

#include "kernels.h"

#define DQW_INLINE static inline __attribute__((always_inline))
#define DQW_INLINED __attribute__((always_inline))  // a lambda, behind its parameters

namespace dqw {
namespace {

constexpr int W = 16;  // 32-bit lanes of a register

constexpr int kGemvRows = 4, kGemvOutputs = 4;
// Zen 4, 4 bits, 512 -> 2048, one thread: int8 with 4 rows is a gemv of 50 us, with 5 rows a gemm
// of 71 us (two gemv: 80); float with 8 rows two gemv of 100 us each, with 16 rows a gemm of 383
// us.
constexpr int kInt8GemvLimit = 4, kFloatGemvLimit = 8;
constexpr int kTileVectors = 2;
constexpr int kInt8BlockRows = 12, kFloatBlockRows = 12, kGroupBlockRows = 6;
// Rows of the packed matrix that the gemv runs side by side, for M rows of q.
template <int M>
constexpr int kSideBySide = 4;

using f32 = __m512;
using i32 = __m512i;

DQW_INLINE __mmask16 lanes(int64_t n) { return (__mmask16)((1u << n) - 1); }

DQW_INLINE f32 zero() { return _mm512_setzero_ps(); }
DQW_INLINE f32 all(float x) { return _mm512_set1_ps(x); }
DQW_INLINE f32 load(const float* p) { return _mm512_loadu_ps(p); }
DQW_INLINE void store(float* p, f32 x) { _mm512_storeu_ps(p, x); }
DQW_INLINE f32 add(f32 a, f32 b) { return _mm512_add_ps(a, b); }
DQW_INLINE f32 sub(f32 a, f32 b) { return _mm512_sub_ps(a, b); }
DQW_INLINE f32 mul(f32 a, f32 b) { return _mm512_mul_ps(a, b); }
DQW_INLINE f32 fma(f32 a, f32 b, f32 c) { return _mm512_fmadd_ps(a, b, c); }
// Of a NaN in `a`, both give `b`.
DQW_INLINE f32 min(f32 a, f32 b) { return _mm512_min_ps(a, b); }
DQW_INLINE f32 max(f32 a, f32 b) { return _mm512_max_ps(a, b); }
DQW_INLINE f32 absolute(f32 x) { return _mm512_abs_ps(x); }
DQW_INLINE f32 round_even(f32 x) { return _mm512_roundscale_ps(x, 0x08); }
DQW_INLINE f32 copy_sign(f32 magnitude, f32 sign) {  // bitwise: top bit from `sign`
    const __m512i top = _mm512_set1_epi32((int)0x80000000);
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(top, _mm512_castps_si512(sign),
                                                         _mm512_castps_si512(magnitude), 0xca));
}
DQW_INLINE f32 flip_sign(f32 x, f32 sign) {  // -x where `sign` is negative
    const __m512i top = _mm512_set1_epi32((int)0x80000000);
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(_mm512_castps_si512(x), top, _mm512_castps_si512(sign), 0x78));
}
DQW_INLINE f32 where_nan(f32 x, f32 then, f32 otherwise) {
    return _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), then);
}
DQW_INLINE f32 where_not_above(f32 x, f32 limit, f32 then, f32 otherwise) {  // false for a NaN
    return _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask(x, limit, _CMP_LE_OQ), then);
}
DQW_INLINE float sum(f32 x) { return _mm512_reduce_add_ps(x); }

// Fetches a line into the cache to be written. No intrinsic without a flag that not all have.
DQW_INLINE void prefetch_write(const void* p) {
    asm volatile("prefetchw %0" : : "m"(*(const char*)p));
}

DQW_INLINE i32 all_int(int32_t x) { return _mm512_set1_epi32(x); }
DQW_INLINE i32 load_int(const void* p) { return _mm512_loadu_si512(p); }
DQW_INLINE void store_int(void* p, i32 x) { _mm512_storeu_si512(p, x); }
DQW_INLINE i32 add_int(i32 a, i32 b) { return _mm512_add_epi32(a, b); }
DQW_INLINE i32 sub_int(i32 a, i32 b) { return _mm512_sub_epi32(a, b); }
DQW_INLINE i32 shift_left_8(i32 x) { return _mm512_slli_epi32(x, 8); }
DQW_INLINE i32 shift_left_23(i32 x) { return _mm512_slli_epi32(x, 23); }
DQW_INLINE f32 as_floats(i32 x) { return _mm512_castsi512_ps(x); }
DQW_INLINE f32 divide(f32 a, f32 b) { return _mm512_div_ps(a, b); }
DQW_INLINE float largest(f32 x) { return _mm512_reduce_max_ps(x); }
DQW_INLINE i32 shift_right_8(i32 x) { return _mm512_srai_epi32(x, 8); }
DQW_INLINE i32 low_byte(i32 x) {
    return _mm512_srai_epi32(_mm512_slli_epi32(x, 24), 24);
}  // signed
DQW_INLINE i32 max_int(i32 a, i32 b) { return _mm512_max_epi32(a, b); }
DQW_INLINE i32 bits_of(f32 x) { return _mm512_castps_si512(x); }
DQW_INLINE i32 truncate(f32 x) { return _mm512_cvttps_epi32(x); }
DQW_INLINE f32 to_float(i32 x) { return _mm512_cvtepi32_ps(x); }
DQW_INLINE int32_t sum_int(i32 x) { return _mm512_reduce_add_epi32(x); }
DQW_INLINE int32_t largest_int(i32 x) { return _mm512_reduce_max_epi32(x); }
DQW_INLINE void store_bytes(int8_t* p, i32 x) {  // lanes -128..127
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x));
}
// Lanes -128..127 of four registers as bytes: lane i has those of columns 4 (i % 4 * (W / 4) + i /
// 4) and the next three, of the 4 W columns in all.
DQW_INLINE i32 pack_bytes(i32 a, i32 b, i32 c, i32 d) {
    return _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
}
DQW_INLINE void store_words(int16_t* p, i32 x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(x));
}

// Dot products of bytes, weights by activations, summed by 32-bit lanes. vpdpbusd takes the weights
// unsigned: they carry an offset.
struct Offset128 {
    static constexpr bool has_offset = true;
    static constexpr bool direct = true;
    DQW_INLINE i32 dot(i32 part, i32 w, i32 q) {
        // Added in place: GCC 12 copies every sum before and after the intrinsic in a loop.
        asm("vpdpbusd %2, %1, %0" : "+v"(part) : "v"(w), "vm"(q));
        return part;
    }
    DQW_INLINE i32 widen(i32 part) { return part; }
    // What a sum starts from to take the offset of all products with q0 and q1 back.
    DQW_INLINE i32 start(i32 q0, i32 q1, int) {
        const i32 by = _mm512_set1_epi8((char)128);
        return sub_int(all_int(0), dot(dot(all_int(0), by, q0), by, q1));
    }
};
constexpr int64_t kDeepest = 1 << 30;
DQW_INLINE int byte_offset(const Packed&) { return 128; }
DQW_INLINE int64_t dot_depth(const Packed&) { return kDeepest; }
DQW_INLINE bool takes_planes(const Packed& w) { return !w.wide; }
template <int B, class F>
DQW_INLINE void with_dot(const Packed&, const F& f) {
    f(Offset128());
}

// ---- float32, float16, bfloat16 in memory ----

DQW_INLINE __m512 from_bf16(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
DQW_INLINE __m256i to_bf16(__m512 x) {  // to nearest even; NaN stays NaN
    const __m512i b = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                              _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}

template <Type T>
DQW_INLINE f32 read(const void* p, int64_t i) {
    if constexpr (T == Type::f32) return _mm512_loadu_ps((const float*)p + i);
    const __m256i x = _mm256_loadu_si256((const __m256i*)((const uint16_t*)p + i));
    return T == Type::f16 ? _mm512_cvtph_ps(x) : from_bf16(x);
}
template <Type T>
DQW_INLINE f32 read(const void* p, int64_t i, int64_t n) {  // the first n lanes, zeros behind
    if constexpr (T == Type::f32) return _mm512_maskz_loadu_ps(lanes(n), (const float*)p + i);
    const __m256i x = _mm256_maskz_loadu_epi16(lanes(n), (const uint16_t*)p + i);
    return T == Type::f16 ? _mm512_cvtph_ps(x) : from_bf16(x);
}
template <Type T>
DQW_INLINE void write(void* p, int64_t i, f32 x) {
    if constexpr (T == Type::f32) return _mm512_storeu_ps((float*)p + i, x);
    const __m256i y = T == Type::f16 ? _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT) : to_bf16(x);
    _mm256_storeu_si256((__m256i*)((uint16_t*)p + i), y);
}
template <Type T>
DQW_INLINE void write(void* p, int64_t i, f32 x, int64_t n) {
    if constexpr (T == Type::f32) return _mm512_mask_storeu_ps((float*)p + i, lanes(n), x);
    const __m256i y = T == Type::f16 ? _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT) : to_bf16(x);
    _mm256_mask_storeu_epi16((uint16_t*)p + i, lanes(n), y);
}
// n floats (of W) that are stored as bytes, see ScaleType.
DQW_INLINE f32 read_scales(const uint8_t* p, int64_t n, int32_t lowest) {
    const i32 code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes(n), p));
    return _mm512_castsi512_ps(add_int(_mm512_slli_epi32(code, kScaleShift), all_int(lowest)));
}
DQW_INLINE float half_to_float(uint16_t x) { return _cvtsh_ss(x); }

// ---- level lookup for fake quantization: k = floor(2|x|/scale) to a level ----

struct Uniform {
    explicit Uniform(const Grid&) {}
    f32 operator()(i32 k) const { return to_float(_mm512_srli_epi32(add_int(k, all_int(1)), 1)); }
};
struct Table32 {  // up to 32 entries: both halves of the table in registers
    f32 low, high;
    explicit Table32(const Grid& g) : low(load(g.levels)), high(load(g.levels + 16)) {}
    f32 operator()(i32 k) const { return _mm512_permutex2var_ps(low, k, high); }
};
// As bytes. The three upper bytes of an index are 0 and fetch level 0, which need not be 0.
DQW_INLINE f32 lowest_byte(i32 x) { return to_float(_mm512_and_si512(x, all_int(255))); }
struct Table128 {
    i32 low, high;
    explicit Table128(const Grid& g) : low(load_int(g.bytes)), high(load_int(g.bytes + 64)) {}
    f32 operator()(i32 k) const { return lowest_byte(_mm512_permutex2var_epi8(low, k, high)); }
};
struct Table256 {
    i32 a, b, c, d;
    explicit Table256(const Grid& g)
        : a(load_int(g.bytes)),
          b(load_int(g.bytes + 64)),
          c(load_int(g.bytes + 128)),
          d(load_int(g.bytes + 192)) {}
    f32 operator()(i32 k) const {
        const i32 first = _mm512_permutex2var_epi8(a, k, b);
        const i32 second = _mm512_permutex2var_epi8(c, k, d);
        return lowest_byte(_mm512_mask_mov_epi8(first, _mm512_movepi8_mask(k), second));
    }
};
struct Gather {
    const float* levels;
    explicit Gather(const Grid& g) : levels(g.levels) {}
    f32 operator()(i32 k) const { return _mm512_i32gather_ps(k, levels, 4); }
};
template <class F>
DQW_INLINE void with_lookup(const Grid& g, const F& f) {
    if (g.uniform) return f(Uniform(g));
    if (g.size <= 32) return f(Table32(g));
    if (g.size <= 128) return f(Table128(g));
    if (g.size <= 256) return f(Table256(g));
    f(Gather(g));
}

// ---- packed codes: a block of 64 codes is one register of bytes ----

constexpr int kParts = 1;  // registers of a block
struct Bytes {
    i32 part[kParts];
};
struct Step {  // of two blocks, see step_codes
    i32 part[2];
};

template <int B>
DQW_INLINE Bytes codes(const uint8_t* p) {
    if constexpr (B == 8) return {{load_int(p)}};
    i32 c = _mm512_setzero_si512();
    if constexpr (B & 4) {
        const __m256i x = _mm256_loadu_si256((const __m256i*)p);
        c = _mm512_inserti64x4(_mm512_castsi256_si512(x), _mm256_srli_epi16(x, 4), 1);
        c = _mm512_and_si512(c, _mm512_set1_epi8(15));
        p += 32;
    }
    if constexpr (B & 2) {
        constexpr int shift = B & 4;  // where the plane's bits go
        const __m512i x = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
        if constexpr (shift == 0) {
            const __m512i by = _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6);
            c = _mm512_and_si512(_mm512_srlv_epi64(x, by), _mm512_set1_epi8(3));
        } else {  // rotate instead: field i lands on bits 4 and 5
            const __m512i by = _mm512_setr_epi64(4, 4, 2, 2, 0, 0, 62, 62);
            c = _mm512_ternarylogic_epi32(c, _mm512_rolv_epi64(x, by), _mm512_set1_epi8(0x30),
                                          0xf8);
        }
        p += 16;
    }
    if constexpr (B & 1) {
        const __mmask64 bit =
            _cvtu64_mask64(*(const uint64_t __attribute__((may_alias, aligned(1)))*)p);
        c = _mm512_mask_add_epi8(c, bit, c, _mm512_set1_epi8((char)(1 << (B - 1))));
    }
    return {{c}};
}

// 2^B bytes by code.
template <int B>
struct Table {
    i32 t[B <= 6 ? 1 : B == 7 ? 2 : 4];
    explicit Table(const int8_t* bytes, int offset) {
        for (int i = 0; i < (int)(sizeof t / sizeof *t); i++) {
            t[i] = _mm512_add_epi8(load_int(bytes + 64 * i), _mm512_set1_epi8((char)offset));
        }
        // The lookup takes 6 bits of a code: a smaller table repeats, whatever the upper ones are.
        const __m128i first = _mm512_castsi512_si128(t[0]);
        if constexpr (B == 2) t[0] = _mm512_broadcastd_epi32(first);
        if constexpr (B == 3) t[0] = _mm512_broadcastq_epi64(first);
        if constexpr (B == 4) t[0] = _mm512_broadcast_i32x4(first);
    }
    Bytes operator()(Bytes c) const { return {{look_up(c.part[0])}}; }
    Step operator()(Step c) const { return {{look_up(c.part[0]), look_up(c.part[1])}}; }
    // 4 bits: of codes that are the lower or the upper halves of bytes.
    i32 packed_low(i32 x) const { return look_up(x); }
    i32 packed_high(i32 x) const { return look_up(_mm512_srli_epi16(x, 4)); }
    i32 look_up(i32 k) const {
        if constexpr (B <= 6) return _mm512_permutexvar_epi8(k, t[0]);
        if constexpr (B == 7) return _mm512_permutex2var_epi8(t[0], k, t[1]);
        if constexpr (B == 8) {
            const i32 first = _mm512_permutex2var_epi8(t[0], k, t[1]);
            const i32 second = _mm512_permutex2var_epi8(t[2], k, t[3]);
            return _mm512_mask_mov_epi8(first, _mm512_movepi8_mask(k), second);
        }
    }
};

// The gemv takes two blocks a and b at a time, as two registers: the first 32 codes of a and b, and
// their last 32. At 4 bits that is a load and a shift, and no code is moved; bits 4 and up of these
// codes are not cleared, which the table does not mind. A last block without a partner leaves the
// upper halves 0, where load_part gives 0 too.
constexpr int kStepBlocks = 2;
DQW_INLINE i32 both(__m256i a, __m256i b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}
template <int B, int Blocks>
DQW_INLINE Step step_codes(const uint8_t* p) {
    constexpr int size = 8 * B;
    const auto load_half = [](const uint8_t* at) { return _mm256_loadu_si256((const __m256i*)at); };
    if constexpr (B == 8) {
        if constexpr (Blocks == 1)
            return {{both(load_half(p), __m256i()), both(load_half(p + 32), __m256i())}};
        return {{both(load_half(p), load_half(p + size)),
                 both(load_half(p + 32), load_half(p + size + 32))}};
    }
    i32 c[2] = {all_int(0), all_int(0)};
    if constexpr (B & 4) {
        i32 x;
        if constexpr (Blocks == 1) {
            x = _mm512_zextsi256_si512(load_half(p));
        } else if constexpr (B == 4) {
            x = load_int(p);
        } else {
            x = both(load_half(p), load_half(p + size));
        }
        c[0] = x;
        c[1] = _mm512_srli_epi16(x, 4);
        if constexpr (B != 4) {
            c[0] = _mm512_and_si512(c[0], _mm512_set1_epi8(15));
            c[1] = _mm512_and_si512(c[1], _mm512_set1_epi8(15));
        }
        p += 32;
    }
    if constexpr (B & 2) {
        constexpr int shift = B & 4;  // where the plane's bits go
        i32 x = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
        if constexpr (Blocks == 2) {
            x = _mm512_mask_broadcast_i32x4(x, 0xff00, _mm_loadu_si128((const __m128i*)(p + size)));
        }
        if constexpr (shift == 0) {
            c[0] = _mm512_srlv_epi64(x, _mm512_setr_epi64(0, 0, 2, 2, 0, 0, 2, 2));
            c[1] = _mm512_srlv_epi64(x, _mm512_setr_epi64(4, 4, 6, 6, 4, 4, 6, 6));
            if constexpr (B != 2) {
                c[0] = _mm512_and_si512(c[0], _mm512_set1_epi8(3));
                c[1] = _mm512_and_si512(c[1], _mm512_set1_epi8(3));
            }
        } else {  // rotate instead: field i lands on bits 4 and 5
            const i32 mask = _mm512_set1_epi8(0x30);
            const i32 first = _mm512_rolv_epi64(x, _mm512_setr_epi64(4, 4, 2, 2, 4, 4, 2, 2));
            const i32 last = _mm512_rolv_epi64(x, _mm512_setr_epi64(0, 0, 62, 62, 0, 0, 62, 62));
            c[0] = _mm512_ternarylogic_epi32(c[0], first, mask, 0xf8);
            c[1] = _mm512_ternarylogic_epi32(c[1], last, mask, 0xf8);
        }
        p += 16;
    }
    if constexpr (B & 1) {
        uint64_t a, b = 0;
        __builtin_memcpy(&a, p, 8);
        if constexpr (Blocks == 2) __builtin_memcpy(&b, p + size, 8);
        const i32 one = _mm512_set1_epi8((char)(1 << (B - 1)));
        const __mmask64 first = _cvtu64_mask64((uint32_t)a | b << 32);
        const __mmask64 last = _cvtu64_mask64(a >> 32 | (b >> 32 << 32));
        c[0] = _mm512_mask_add_epi8(c[0], first, c[0], one);
        c[1] = _mm512_mask_add_epi8(c[1], last, c[1], one);
    }
    return {{c[0], c[1]}};
}
template <int Blocks>
DQW_INLINE i32 load_part(const int8_t* q, int part) {
    if constexpr (Blocks == 2) return load_int(q + 64 * part);
    return _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)(q + 32 * part)));
}
template <int Blocks>
DQW_INLINE void store_part(void* p, int part, i32 x) {
    if constexpr (Blocks == 2) return store_int((char*)p + 64 * part, x);
    _mm256_storeu_si256((__m256i*)((char*)p + 32 * part), _mm512_castsi512_si256(x));
}
// Where the activations of 32 columns go, counted in 32, of so many.
DQW_INLINE int64_t place_of(int64_t chunk, int64_t chunks) {
    if (chunk / 4 * 4 + 4 > chunks) return chunk;  // the last block, alone
    return chunk - chunk % 4 + (chunk % 4 == 1 ? 2 : chunk % 4 == 2 ? 1 : chunk % 4);
}
// `x` with `*s` in the lanes of `mask`; a lane is four columns.
DQW_INLINE f32 with_scale(f32 x, __mmask16 mask, const float* s) {
    return _mm512_mask_broadcastss_ps(x, mask, _mm_load_ss(s));
}
// Scales of the lanes of a step's part, from those of every Span columns of the step.
template <int Blocks, int Span>
DQW_INLINE f32 part_scale(const float* s, int part) {
    if constexpr (Span == 16) {
        const i32 of_lane = add_int(
            _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 4, 4, 4, 4, 5, 5, 5, 5), all_int(2 * part));
        const f32 own = Blocks == 2 ? _mm512_castps256_ps512(_mm256_loadu_ps(s))
                                    : _mm512_broadcast_f32x4(_mm_loadu_ps(s));
        return _mm512_permutexvar_ps(of_lane, own);
    }
    const f32 first = all(s[Span == 32 ? part : 0]);
    return Blocks == 1 ? first : with_scale(first, 0xff00, s + (Span == 32 ? 2 + part : 1));
}

// The sums of all lanes, of four registers.
template <int R>
DQW_INLINE void store_sums(int32_t* out, const i32 (&v)[R]) {
    static_assert(R == 4);
    const i32 a = add_int(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    const i32 b = add_int(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    const i32 c = add_int(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    const __m256i d = _mm256_add_epi32(_mm512_castsi512_si256(c), _mm512_extracti64x4_epi64(c, 1));
    _mm_storeu_si128((__m128i*)out,
                     _mm_add_epi32(_mm256_castsi256_si128(d), _mm256_extracti128_si256(d, 1)));
}
template <int R>
DQW_INLINE void store_sums(float* out, const f32 (&v)[R]) {
    static_assert(R == 4);
    const auto pairs = [](f32 x, f32 y) {
        return add(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    };
    const __m512d a = _mm512_castps_pd(pairs(v[0], v[1])), b = _mm512_castps_pd(pairs(v[2], v[3]));
    const f32 c =
        add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    const __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1)));
}

// Byte J of every 32-bit lane as a float: of a code (up to 5 bits: the table is looked up by whole
// lanes, whose upper bits the instruction ignores), or of a level.
template <int B>
struct FloatTable {
    f32 low, high;
    const Table<B> bytes;
    explicit FloatTable(const int8_t* levels)
        : low(first(levels)), high(first(levels + 16)), bytes(levels, 0) {}
    Bytes operator()(Bytes c) const { return B <= 5 ? c : bytes(c); }
    i32 packed_low(i32 x) const { return x; }
    i32 packed_high(i32 x) const { return _mm512_srli_epi16(x, 4); }
    template <int J>
    f32 part(i32 v) const {
        if constexpr (B <= 4) return _mm512_permutexvar_ps(_mm512_srli_epi32(v, 8 * J), low);
        if constexpr (B == 5) return _mm512_permutex2var_ps(low, _mm512_srli_epi32(v, 8 * J), high);
        return to_float(_mm512_srai_epi32(_mm512_slli_epi32(v, 24 - 8 * J), 24));
    }
    static f32 first(const int8_t* levels) {
        return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)levels)));
    }
};

// Bytes 16 j … 16 j + 15 of a block, signed, as 32-bit lanes.
template <int J>
DQW_INLINE i32 widen(Bytes b) {
    return _mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(b.part[0], J));
}
// The scales of part P of a block, given for every 16 columns.
template <int P>
DQW_INLINE f32 quarters(const float* s) {
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                                 _mm512_castps128_ps512(_mm_loadu_ps(s)));
}

// v[i] lane j <-> v[j] lane i.
DQW_INLINE void transpose(i32 (&v)[W]) {
    i32 t[W];
#pragma GCC unroll 4
    for (int i = 0; i < W; i += 4) {
        const i32 a = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        const i32 b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
        const i32 c = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]);
        const i32 d = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c);
        t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d);
        t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {  // t[4 r + i] quarter q holds rows 4r..4r+3 of column 4q + i
        const i32 a = _mm512_shuffle_i32x4(t[i], t[4 + i], 0x88);
        const i32 b = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0x88);
        const i32 c = _mm512_shuffle_i32x4(t[i], t[4 + i], 0xdd);
        const i32 d = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0xdd);
        v[i] = _mm512_shuffle_i32x4(a, b, 0x88);
        v[8 + i] = _mm512_shuffle_i32x4(a, b, 0xdd);
        v[4 + i] = _mm512_shuffle_i32x4(c, d, 0x88);
        v[12 + i] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
}

}  // namespace
}  // namespace dqw
