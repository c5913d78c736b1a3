// AVX2 with FMA and F16C as the loops want it: Haswell, Zen and later.
#pragma once

#include <immintrin.h>

#include "kernels.h"

#define DQW_INLINE static inline __attribute__((always_inline))
#define DQW_INLINED __attribute__((always_inline))  // a lambda, behind its parameters

namespace dqw {
namespace {

constexpr int W = 8;  // 32-bit lanes of a register

constexpr int kGemvRows = 4, kGemvOutputs = 2;
// Two turns of the gemv lose: 8 rows of an 8-bit 512 -> 2048 take 0.53 ms so, and 0.31 by the gemm.
constexpr int kInt8GemvLimit = 4, kFloatGemvLimit = 4;
constexpr int kTileVectors = 2;
constexpr int kInt8BlockRows = 6, kFloatBlockRows = 6, kGroupBlockRows = 6;
// Rows of the packed matrix that the gemv runs side by side, for M rows of q.
template <int M>
constexpr int kSideBySide = M == 1 ? 4 : 2;

using f32 = __m256;
using i32 = __m256i;

DQW_INLINE i32 lanes(int64_t n) {  // all ones in the first n lanes
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

DQW_INLINE f32 zero() { return _mm256_setzero_ps(); }
DQW_INLINE f32 all(float x) { return _mm256_set1_ps(x); }
DQW_INLINE f32 load(const float* p) { return _mm256_loadu_ps(p); }
DQW_INLINE void store(float* p, f32 x) { _mm256_storeu_ps(p, x); }
DQW_INLINE f32 add(f32 a, f32 b) { return _mm256_add_ps(a, b); }
DQW_INLINE f32 sub(f32 a, f32 b) { return _mm256_sub_ps(a, b); }
DQW_INLINE f32 mul(f32 a, f32 b) { return _mm256_mul_ps(a, b); }
DQW_INLINE f32 fma(f32 a, f32 b, f32 c) { return _mm256_fmadd_ps(a, b, c); }
// Of a NaN in `a`, both give `b`.
DQW_INLINE f32 min(f32 a, f32 b) { return _mm256_min_ps(a, b); }
DQW_INLINE f32 max(f32 a, f32 b) { return _mm256_max_ps(a, b); }
DQW_INLINE f32 absolute(f32 x) { return _mm256_andnot_ps(all(-0.0f), x); }
DQW_INLINE f32 round_even(f32 x) { return _mm256_round_ps(x, 0x08); }
DQW_INLINE f32 copy_sign(f32 magnitude, f32 sign) {
    return _mm256_or_ps(_mm256_and_ps(all(-0.0f), sign), absolute(magnitude));
}
DQW_INLINE f32 flip_sign(f32 x, f32 sign) {  // -x where `sign` is negative
    return _mm256_xor_ps(x, _mm256_and_ps(all(-0.0f), sign));
}
DQW_INLINE f32 where_nan(f32 x, f32 then, f32 otherwise) {
    return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
DQW_INLINE f32 where_not_above(f32 x, f32 limit, f32 then, f32 otherwise) {  // false for a NaN
    return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(x, limit, _CMP_LE_OQ));
}
DQW_INLINE float sum(f32 x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

// Fetches a line into the cache to be written; does nothing on the oldest processors with AVX2.
DQW_INLINE void prefetch_write(const void* p) {
    asm volatile("prefetchw %0" : : "m"(*(const char*)p));
}

DQW_INLINE i32 all_int(int32_t x) { return _mm256_set1_epi32(x); }
DQW_INLINE i32 load_int(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
DQW_INLINE void store_int(void* p, i32 x) { _mm256_storeu_si256((__m256i*)p, x); }
DQW_INLINE i32 add_int(i32 a, i32 b) { return _mm256_add_epi32(a, b); }
DQW_INLINE i32 sub_int(i32 a, i32 b) { return _mm256_sub_epi32(a, b); }
DQW_INLINE i32 shift_left_8(i32 x) { return _mm256_slli_epi32(x, 8); }
DQW_INLINE i32 shift_left_23(i32 x) { return _mm256_slli_epi32(x, 23); }
DQW_INLINE f32 as_floats(i32 x) { return _mm256_castsi256_ps(x); }
DQW_INLINE f32 divide(f32 a, f32 b) { return _mm256_div_ps(a, b); }
DQW_INLINE float largest(f32 x) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
DQW_INLINE i32 shift_right_8(i32 x) { return _mm256_srai_epi32(x, 8); }
DQW_INLINE i32 low_byte(i32 x) {
    return _mm256_srai_epi32(_mm256_slli_epi32(x, 24), 24);
}  // signed
DQW_INLINE i32 max_int(i32 a, i32 b) { return _mm256_max_epi32(a, b); }
DQW_INLINE i32 bits_of(f32 x) { return _mm256_castps_si256(x); }
DQW_INLINE i32 truncate(f32 x) { return _mm256_cvttps_epi32(x); }
DQW_INLINE f32 to_float(i32 x) { return _mm256_cvtepi32_ps(x); }
DQW_INLINE int32_t sum_int(i32 x) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
DQW_INLINE int32_t largest_int(i32 x) {
    __m128i s = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
DQW_INLINE __m128i narrow(i32 x) {  // lanes -32768..32767 as 16-bit
    return _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
DQW_INLINE void store_bytes(int8_t* p, i32 x) {  // lanes -128..127
    const __m128i words = narrow(x);
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}
// Lanes -128..127 of four registers as bytes: lane i has those of columns 4 (i % 4 * (W / 4) + i /
// 4) and the next three, of the 4 W columns in all.
DQW_INLINE i32 pack_bytes(i32 a, i32 b, i32 c, i32 d) {
    return _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
}
DQW_INLINE void store_words(int16_t* p, i32 x) { _mm_storeu_si128((__m128i*)p, narrow(x)); }

// Dot products of bytes, weights by activations (-128..127), summed by 32-bit lanes. Either levels
// are small enough to be unsigned by an offset, and a few products are added in 16 bits before
// they are widened; or weights stay signed and every product is widened at once.
constexpr int64_t kDeepest = 1 << 30;
struct Deep {
    static constexpr bool has_offset = true;
    static constexpr bool direct = false;
    DQW_INLINE i32 dot(i32 part, i32 w, i32 q) {
        // Added in place and in this order: GCC 12 would make all products first and spill the
        // sums.
        asm volatile("vpaddw %1, %0, %0" : "+x"(part) : "x"(_mm256_maddubs_epi16(w, q)));
        return part;
    }
    DQW_INLINE i32 widen(i32 part) { return _mm256_madd_epi16(part, _mm256_set1_epi16(1)); }
    // What `part` starts from to take the offset of all products with q0 and q1 back.
    DQW_INLINE i32 start(i32 q0, i32 q1, int offset) {
        const i32 ones = _mm256_set1_epi8(1);
        const i32 sums =
            _mm256_add_epi16(_mm256_maddubs_epi16(ones, q0), _mm256_maddubs_epi16(ones, q1));
        return _mm256_mullo_epi16(sums, _mm256_set1_epi16((short)-offset));
    }
};
struct Signed {
    static constexpr bool has_offset = false;
    static constexpr bool direct = true;
    // |w| <= 128 is unsigned, q (|q| <= 127) takes w's sign; a pair of products is at most
    // 2 * 128 * 127 = 32512, so maddubs is exact.
    DQW_INLINE i32 dot(i32 part, i32 w, i32 q) {
        const i32 pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w));
        return add_int(part, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    DQW_INLINE i32 widen(i32 part) { return part; }
    DQW_INLINE i32 start(i32, i32, int) { return _mm256_setzero_si256(); }
};
// Two products a part, or 16 bits are no use.
DQW_INLINE bool is_deep(const Packed& w) { return w.bits < 7 && !w.wide && w.products16 >= 2; }
DQW_INLINE int byte_offset(const Packed& w) { return is_deep(w) ? w.largest : 0; }
DQW_INLINE int64_t dot_depth(const Packed& w) { return is_deep(w) ? w.products16 : kDeepest; }
DQW_INLINE bool takes_planes(const Packed& w) { return is_deep(w); }
template <int B, class F>
DQW_INLINE void with_dot(const Packed& w, const F& f) {
    if constexpr (B < 7) {
        if (is_deep(w)) return f(Deep());
    }
    f(Signed());
}

// ---- float32, float16, bfloat16 in memory ----

DQW_INLINE f32 from_bf16(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
DQW_INLINE __m128i to_bf16(f32 x) {  // to nearest even; NaN stays NaN
    const i32 b = _mm256_castps_si256(x);
    const i32 odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), all_int(1));
    const f32 r = _mm256_castsi256_ps(add_int(b, add_int(odd, all_int(0x7fff))));
    const f32 nan = _mm256_castsi256_ps(all_int(0x7fc00000));
    const i32 upper = _mm256_srli_epi32(_mm256_castps_si256(where_nan(x, nan, r)), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}

template <Type T>
DQW_INLINE f32 read(const void* p, int64_t i) {
    if constexpr (T == Type::f32) return load((const float*)p + i);
    const __m128i x = _mm_loadu_si128((const __m128i*)((const uint16_t*)p + i));
    return T == Type::f16 ? _mm256_cvtph_ps(x) : from_bf16(x);
}
template <Type T>
DQW_INLINE void write(void* p, int64_t i, f32 x) {
    if constexpr (T == Type::f32) return store((float*)p + i, x);
    const __m128i y = T == Type::f16 ? _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT) : to_bf16(x);
    _mm_storeu_si128((__m128i*)((uint16_t*)p + i), y);
}
template <Type T>
DQW_INLINE f32 read(const void* p, int64_t i, int64_t n) {  // the first n lanes, zeros behind
    if constexpr (T == Type::f32) return _mm256_maskload_ps((const float*)p + i, lanes(n));
    uint16_t few[W] = {};
    for (int64_t j = 0; j < n; j++) few[j] = ((const uint16_t*)p)[i + j];
    return read<T>(few, 0);
}
template <Type T>
DQW_INLINE void write(void* p, int64_t i, f32 x, int64_t n) {
    if constexpr (T == Type::f32) return _mm256_maskstore_ps((float*)p + i, lanes(n), x);
    uint16_t few[W];
    write<T>(few, 0, x);
    for (int64_t j = 0; j < n; j++) ((uint16_t*)p)[i + j] = few[j];
}
// n floats (of W) that are stored as bytes, see ScaleType.
DQW_INLINE f32 read_scales(const uint8_t* p, int64_t n, int32_t lowest) {
    uint64_t few = 0;
    n == W ? __builtin_memcpy(&few, p, W) : __builtin_memcpy(&few, p, n);
    const i32 code = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)few));
    return _mm256_castsi256_ps(add_int(_mm256_slli_epi32(code, kScaleShift), all_int(lowest)));
}
DQW_INLINE float half_to_float(uint16_t x) { return _cvtsh_ss(x); }

// ---- level lookup for fake quantization: k = floor(2|x|/scale) to a level ----

struct Uniform {
    explicit Uniform(const Grid&) {}
    f32 operator()(i32 k) const { return to_float(_mm256_srli_epi32(add_int(k, all_int(1)), 1)); }
};
// Up to 16 or 32 entries, as bytes. The three upper bytes of an index are 0 and fetch level 0,
// which need not be 0.
DQW_INLINE f32 lowest_byte(i32 x) { return to_float(_mm256_and_si256(x, all_int(255))); }
DQW_INLINE i32 sixteen(const uint8_t* bytes) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)bytes));
}
struct Table16 {
    i32 t;
    explicit Table16(const Grid& g) : t(sixteen(g.bytes)) {}
    f32 operator()(i32 k) const { return lowest_byte(_mm256_shuffle_epi8(t, k)); }
};
struct Table32 {  // a shuffle gives 0 where bit 7 of the index is set: where the other half has it
    i32 low, high;
    explicit Table32(const Grid& g) : low(sixteen(g.bytes)), high(sixteen(g.bytes + 16)) {}
    f32 operator()(i32 k) const {
        const i32 in_low = _mm256_add_epi8(k, _mm256_set1_epi8(0x70));
        const i32 in_high = _mm256_sub_epi8(k, _mm256_set1_epi8(16));
        return lowest_byte(
            _mm256_or_si256(_mm256_shuffle_epi8(low, in_low), _mm256_shuffle_epi8(high, in_high)));
    }
};
struct Gather {
    const float* levels;
    explicit Gather(const Grid& g) : levels(g.levels) {}
    f32 operator()(i32 k) const { return _mm256_i32gather_ps(levels, k, 4); }
};
template <class F>
DQW_INLINE void with_lookup(const Grid& g, const F& f) {
    if (g.uniform) return f(Uniform(g));
    if (g.size <= 16) return f(Table16(g));
    if (g.size <= 32) return f(Table32(g));
    f(Gather(g));
}

// ---- packed codes: a block of 64 codes is two registers of bytes ----

constexpr int kParts = 2;  // registers of a block
struct Bytes {
    i32 part[kParts];
};

template <int B>
DQW_INLINE Bytes codes(const uint8_t* p) {
    if constexpr (B == 8) return {{load_int(p), load_int(p + 32)}};
    i32 c[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    if constexpr (B & 4) {
        const i32 x = load_int(p), low = _mm256_set1_epi8(15);
        c[0] = _mm256_and_si256(x, low);
        c[1] = _mm256_and_si256(_mm256_srli_epi16(x, 4), low);
        p += 32;
    }
    if constexpr (B & 2) {
        const i32 x = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
        const i32 field = _mm256_set1_epi8(3);
        for (int h = 0; h < 2; h++) {
            const i32 by = _mm256_setr_epi64x(4 * h, 4 * h, 4 * h + 2, 4 * h + 2);
            const i32 two = _mm256_and_si256(_mm256_srlv_epi64(x, by), field);
            c[h] = _mm256_or_si256(c[h], _mm256_slli_epi16(two, B & 4));
        }
        p += 16;
    }
    if constexpr (B & 1) {
        const i32 which =
            _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const i32 bit = _mm256_set1_epi64x((long long)0x8040201008040201);
        for (int h = 0; h < 2; h++) {  // each byte looks at its own bit of 32
            const int32_t x = *(const int32_t __attribute__((may_alias, aligned(1)))*)(p + 4 * h);
            const i32 spread = _mm256_shuffle_epi8(all_int(x), which);
            const i32 set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
            const i32 one = _mm256_and_si256(set, _mm256_set1_epi8((char)(1 << (B - 1))));
            c[h] = _mm256_or_si256(c[h], one);
        }
    }
    return {{c[0], c[1]}};
}

// The gemv takes a block at a time: its first and its last 32 codes.
constexpr int kStepBlocks = 1;
template <int B, int Blocks>
DQW_INLINE Bytes step_codes(const uint8_t* p) {
    return codes<B>(p);
}
template <int Blocks>
DQW_INLINE i32 load_part(const int8_t* q, int part) {
    return load_int(q + 32 * part);
}
template <int Blocks>
DQW_INLINE void store_part(void* p, int part, i32 x) {
    store_int((char*)p + 32 * part, x);
}
// Where the activations of 32 columns go, counted in 32.
DQW_INLINE int64_t place_of(int64_t chunk, int64_t) { return chunk; }
// By lanes, four columns each: 16 columns of `first`, 16 of `second`.
DQW_INLINE f32 by_columns(float first, float second) {
    return _mm256_blend_ps(all(first), all(second), 0xf0);
}
// Scales of the lanes of a step's part, from those of every Span columns of the step.
template <int Blocks, int Span>
DQW_INLINE f32 part_scale(const float* s, int part) {
    if constexpr (Span == 16) return by_columns(s[2 * part], s[2 * part + 1]);
    return all(s[Span == 32 ? part : 0]);
}

// The sums of all lanes, of R registers.
template <int R>
DQW_INLINE void store_sums(int32_t* out, const i32 (&v)[R]) {
    if constexpr (R == 4) {
        const i32 s =
            _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
        const __m128i both =
            _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
        _mm_storeu_si128((__m128i*)out, both);
    } else {
        for (int r = 0; r < R; r++) out[r] = sum_int(v[r]);
    }
}
template <int R>
DQW_INLINE void store_sums(float* out, const f32 (&v)[R]) {
    if constexpr (R == 4) {
        const f32 s = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
    } else {
        for (int r = 0; r < R; r++) out[r] = sum(v[r]);
    }
}

// 2^B bytes by code, 16 at a time: a shuffle gives 0 where bit 7 of the index is set, so a code is
// made to keep it clear only in the one sub-table that its upper bits name.
template <int B>
struct Table {
    static constexpr int n = B <= 4 ? 1 : 1 << (B - 4);
    i32 t[n];
    explicit Table(const int8_t* bytes, int offset) {
        const __m128i add = _mm_set1_epi8((char)offset);
        for (int i = 0; i < n; i++) {
            const __m128i own = _mm_loadu_si128((const __m128i*)(bytes + 16 * i));
            t[i] = _mm256_broadcastsi128_si256(_mm_add_epi8(own, add));
        }
    }
    // 4 bits: of codes that are the lower or the upper halves of bytes.
    i32 packed_low(i32 x) const {
        return _mm256_shuffle_epi8(t[0], _mm256_and_si256(x, _mm256_set1_epi8(15)));
    }
    i32 packed_high(i32 x) const { return packed_low(_mm256_srli_epi16(x, 4)); }
    Bytes operator()(Bytes c) const {
        for (int h = 0; h < kParts; h++) {
            if constexpr (n == 1) {
                c.part[h] = _mm256_shuffle_epi8(t[0], c.part[h]);
            } else {
                i32 found = _mm256_setzero_si256();
                for (int i = 0; i < n; i++) {
                    const i32 own = _mm256_xor_si256(c.part[h], _mm256_set1_epi8((char)(i << 4)));
                    const i32 k = _mm256_adds_epu8(own, _mm256_set1_epi8(0x70));
                    found = _mm256_or_si256(found, _mm256_shuffle_epi8(t[i], k));
                }
                c.part[h] = found;
            }
        }
        return c;
    }
};

// Byte J of every 32-bit lane, a level, as a float.
template <int B>
struct FloatTable {
    const Table<B> bytes;
    explicit FloatTable(const int8_t* levels) : bytes(levels, 0) {}
    Bytes operator()(Bytes c) const { return bytes(c); }
    i32 packed_low(i32 x) const { return bytes.packed_low(x); }
    i32 packed_high(i32 x) const { return bytes.packed_high(x); }
    template <int J>
    f32 part(i32 v) const {
        return to_float(_mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * J), 24));
    }
};

// Bytes 8 j … 8 j + 7 of a block, signed, as 32-bit lanes.
template <int J>
DQW_INLINE i32 widen(Bytes b) {
    const i32 x = b.part[J / 4];
    const __m128i half = J & 2 ? _mm256_extracti128_si256(x, 1) : _mm256_castsi256_si128(x);
    return _mm256_cvtepi8_epi32(J & 1 ? _mm_srli_si128(half, 8) : half);
}
// The scales of part P of a block, given for every 16 columns.
template <int P>
DQW_INLINE f32 quarters(const float* s) {
    return by_columns(s[2 * P], s[2 * P + 1]);
}

// v[i] lane j <-> v[j] lane i.
DQW_INLINE void transpose(i32 (&v)[W]) {
    i32 t[W];
#pragma GCC unroll 4
    for (int i = 0; i < W; i += 4) {
        const i32 a = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        const i32 b = _mm256_unpackhi_epi32(v[i], v[i + 1]);
        const i32 c = _mm256_unpacklo_epi32(v[i + 2], v[i + 3]);
        const i32 d = _mm256_unpackhi_epi32(v[i + 2], v[i + 3]);
        t[i] = _mm256_unpacklo_epi64(a, c);
        t[i + 1] = _mm256_unpackhi_epi64(a, c);
        t[i + 2] = _mm256_unpacklo_epi64(b, d);
        t[i + 3] = _mm256_unpackhi_epi64(b, d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2x128_si256(t[i], t[4 + i], 0x20);
        v[4 + i] = _mm256_permute2x128_si256(t[i], t[4 + i], 0x31);
    }
}

}  // namespace
}  // namespace dqw
