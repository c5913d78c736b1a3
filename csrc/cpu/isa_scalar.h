// Plain C++ as the loops want it: any processor. A "register" is eight lanes that the compiler
// may vectorize with whatever the target's baseline has.
#pragma once

#include <string.h>

#include "kernels.h"

#define DQW_INLINE static inline __attribute__((always_inline))
#define DQW_INLINED __attribute__((always_inline))  // a lambda, behind its parameters

namespace dqw {
namespace {

constexpr int W = 8;

constexpr int kGemvRows = 1, kGemvOutputs = 1;
constexpr int kInt8GemvLimit = 2, kFloatGemvLimit = 2;
template <int M>
constexpr int kSideBySide = 1;

struct f32 {
    float v[W];
};
struct i32 {
    int32_t v[W];
};

template <class V, class F>
DQW_INLINE V each(const F& f) {
    V r;
    for (int i = 0; i < W; i++) r.v[i] = f(i);
    return r;
}
DQW_INLINE uint32_t bits(float x) {
    uint32_t b;
    memcpy(&b, &x, 4);
    return b;
}
DQW_INLINE float from_bits(uint32_t b) {
    float x;
    memcpy(&x, &b, 4);
    return x;
}

DQW_INLINE f32 all(float x) {
    return each<f32>([&](int) { return x; });
}
DQW_INLINE f32 zero() { return all(0); }
DQW_INLINE f32 load(const float* p) {
    return each<f32>([&](int i) { return p[i]; });
}
DQW_INLINE void store(float* p, f32 x) { memcpy(p, x.v, sizeof x.v); }
DQW_INLINE f32 add(f32 a, f32 b) {
    return each<f32>([&](int i) { return a.v[i] + b.v[i]; });
}
DQW_INLINE f32 sub(f32 a, f32 b) {
    return each<f32>([&](int i) { return a.v[i] - b.v[i]; });
}
DQW_INLINE f32 mul(f32 a, f32 b) {
    return each<f32>([&](int i) { return a.v[i] * b.v[i]; });
}
DQW_INLINE f32 fma(f32 a, f32 b, f32 c) {
    return add(mul(a, b), c);
}  // not fused: slow in software
// Of a NaN in `a`, both give `b`.
DQW_INLINE f32 min(f32 a, f32 b) {
    return each<f32>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
DQW_INLINE f32 max(f32 a, f32 b) {
    return each<f32>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
DQW_INLINE f32 absolute(f32 x) {
    return each<f32>([&](int i) { return from_bits(bits(x.v[i]) & 0x7fffffffu); });
}
DQW_INLINE f32 round_even(f32 x) {  // |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits
    return each<f32>([&](int i) { return (x.v[i] + 12582912.0f) - 12582912.0f; });
}
DQW_INLINE f32 copy_sign(f32 m, f32 s) {
    return each<f32>([&](int i) {
        return from_bits((bits(m.v[i]) & 0x7fffffffu) | (bits(s.v[i]) & 0x80000000u));
    });
}
DQW_INLINE f32 flip_sign(f32 x, f32 s) {  // -x where `s` is negative
    return each<f32>([&](int i) { return from_bits(bits(x.v[i]) ^ (bits(s.v[i]) & 0x80000000u)); });
}
DQW_INLINE f32 where_nan(f32 x, f32 then, f32 otherwise) {
    return each<f32>([&](int i) { return x.v[i] != x.v[i] ? then.v[i] : otherwise.v[i]; });
}
DQW_INLINE f32 where_not_above(f32 x, f32 limit, f32 then, f32 otherwise) {  // false for a NaN
    return each<f32>([&](int i) { return x.v[i] <= limit.v[i] ? then.v[i] : otherwise.v[i]; });
}
DQW_INLINE float sum(f32 x) {
    float s = 0;
    for (int i = 0; i < W; i++) s += x.v[i];
    return s;
}

DQW_INLINE i32 all_int(int32_t x) {
    return each<i32>([&](int) { return x; });
}
DQW_INLINE i32 load_int(const void* p) {
    i32 x;
    memcpy(x.v, p, sizeof x.v);
    return x;
}
DQW_INLINE void store_int(void* p, i32 x) { memcpy(p, x.v, sizeof x.v); }
DQW_INLINE i32 add_int(i32 a, i32 b) {
    return each<i32>([&](int i) { return a.v[i] + b.v[i]; });
}
DQW_INLINE i32 sub_int(i32 a, i32 b) {
    return each<i32>([&](int i) { return a.v[i] - b.v[i]; });
}
DQW_INLINE i32 shift_left_8(i32 x) {
    return each<i32>([&](int i) { return x.v[i] * 256; });
}
DQW_INLINE i32 shift_left_23(i32 x) {
    return each<i32>([&](int i) { return (int32_t)((uint32_t)x.v[i] << 23); });
}
DQW_INLINE f32 as_floats(i32 x) {
    return each<f32>([&](int i) { return from_bits((uint32_t)x.v[i]); });
}
DQW_INLINE f32 divide(f32 a, f32 b) {
    return each<f32>([&](int i) { return a.v[i] / b.v[i]; });
}
DQW_INLINE float largest(f32 x) {
    float s = x.v[0];
    for (int i = 1; i < W; i++) s = x.v[i] > s ? x.v[i] : s;
    return s;
}
DQW_INLINE i32 max_int(i32 a, i32 b) {
    return each<i32>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
DQW_INLINE i32 bits_of(f32 x) {
    return each<i32>([&](int i) { return (int32_t)bits(x.v[i]); });
}
DQW_INLINE i32 truncate(f32 x) {
    return each<i32>([&](int i) { return (int32_t)x.v[i]; });
}
DQW_INLINE f32 to_float(i32 x) {
    return each<f32>([&](int i) { return (float)x.v[i]; });
}
DQW_INLINE int32_t sum_int(i32 x) {
    int32_t s = 0;
    for (int i = 0; i < W; i++) s += x.v[i];
    return s;
}
DQW_INLINE i32 shift_right_8(i32 x) {
    return each<i32>([&](int i) { return x.v[i] >> 8; });
}
DQW_INLINE i32 low_byte(i32 x) {  // signed
    return each<i32>([&](int i) { return (int32_t)(int8_t)x.v[i]; });
}
DQW_INLINE int32_t largest_int(i32 x) {
    int32_t s = x.v[0];
    for (int i = 1; i < W; i++) s = x.v[i] > s ? x.v[i] : s;
    return s;
}
DQW_INLINE void store_bytes(int8_t* p, i32 x) {
    for (int i = 0; i < W; i++) p[i] = (int8_t)x.v[i];
}
DQW_INLINE void store_words(int16_t* p, i32 x) {
    for (int i = 0; i < W; i++) p[i] = (int16_t)x.v[i];
}

// Dot products of signed bytes, summed by 32-bit lanes.
struct Signed {
    static constexpr bool has_offset = false;
    static constexpr bool direct = true;
    DQW_INLINE i32 dot(i32 acc, i32 w, i32 q) {
        int8_t a[4 * W], b[4 * W];
        memcpy(a, w.v, sizeof a);
        memcpy(b, q.v, sizeof b);
        for (int i = 0; i < W; i++) {
            for (int j = 0; j < 4; j++) acc.v[i] += (int32_t)a[4 * i + j] * b[4 * i + j];
        }
        return acc;
    }
    DQW_INLINE i32 widen(i32 part) { return part; }
    DQW_INLINE i32 start(i32, i32, int) { return all_int(0); }
};
constexpr int64_t kDeepest = 1 << 30;
DQW_INLINE int byte_offset(const Packed&) { return 0; }
DQW_INLINE int64_t dot_depth(const Packed&) { return kDeepest; }
DQW_INLINE bool takes_planes(const Packed&) { return false; }
template <int B, class F>
DQW_INLINE void with_dot(const Packed&, const F& f) {
    f(Signed());
}

// ---- float32, float16, bfloat16 in memory ----

DQW_INLINE float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // A subnormal half in place would be a subnormal float, which counts as 0 where the processor
    // was told so (NoTinyNumbers, torch.set_flush_denormal).
    if (rest < 0x400) return from_bits(sign | bits((float)rest * 0x1p-24f));
    // Exponent and mantissa in place, then 2^112 for the difference of the biases.
    return from_bits(sign | bits(from_bits(rest << 13) * 0x1p112f));
}
DQW_INLINE uint16_t float_to_half(float x) {  // to nearest even
    const uint32_t b = bits(x), sign = b >> 16 & 0x8000, rest = b & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds to infinity
    if (rest < 0x38800000) {  // subnormal: the addition rounds at the last bit of a half
        return (uint16_t)(sign | (bits(from_bits(rest) + 0.5f) - 0x3f000000));
    }
    return (uint16_t)(sign | ((rest + 0xc8000fff + (rest >> 13 & 1)) >> 13));
}
DQW_INLINE uint16_t float_to_bf16(float x) {  // to nearest even
    const uint32_t b = bits(x);
    return x != x ? 0x7fc0 : (uint16_t)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

// n floats (of W) that are stored as bytes, see ScaleType.
DQW_INLINE f32 read_scales(const uint8_t* p, int64_t n, int32_t lowest) {
    f32 x = zero();
    for (int64_t j = 0; j < n; j++) {
        x.v[j] = from_bits(((uint32_t)p[j] << kScaleShift) + (uint32_t)lowest);
    }
    return x;
}

template <Type T>
DQW_INLINE f32 read(const void* p, int64_t i, int64_t n) {  // the first n lanes, zeros behind
    f32 x = zero();
    for (int64_t j = 0; j < n; j++) {
        if (T == Type::f32) x.v[j] = ((const float*)p)[i + j];
        if (T == Type::f16) x.v[j] = half_to_float(((const uint16_t*)p)[i + j]);
        if (T == Type::bf16) x.v[j] = from_bits((uint32_t)((const uint16_t*)p)[i + j] << 16);
    }
    return x;
}
template <Type T>
DQW_INLINE f32 read(const void* p, int64_t i) {
    return read<T>(p, i, W);
}
template <Type T>
DQW_INLINE void write(void* p, int64_t i, f32 x, int64_t n) {
    for (int64_t j = 0; j < n; j++) {
        if (T == Type::f32) ((float*)p)[i + j] = x.v[j];
        if (T == Type::f16) ((uint16_t*)p)[i + j] = float_to_half(x.v[j]);
        if (T == Type::bf16) ((uint16_t*)p)[i + j] = float_to_bf16(x.v[j]);
    }
}
template <Type T>
DQW_INLINE void write(void* p, int64_t i, f32 x) {
    write<T>(p, i, x, W);
}

// ---- level lookup for fake quantization: k = floor(2|x|/scale) to a level ----

struct Uniform {
    explicit Uniform(const Grid&) {}
    f32 operator()(i32 k) const {
        return each<f32>([&](int i) { return (float)((k.v[i] + 1) >> 1); });
    }
};
struct Gather {
    const float* levels;
    explicit Gather(const Grid& g) : levels(g.levels) {}
    f32 operator()(i32 k) const {
        return each<f32>([&](int i) { return levels[k.v[i]]; });
    }
};
template <class F>
DQW_INLINE void with_lookup(const Grid& g, const F& f) {
    if (g.uniform) return f(Uniform(g));
    f(Gather(g));
}

// ---- packed codes: a block of 64 codes is two registers of bytes ----

constexpr int kParts = 2;
struct Bytes {
    i32 part[kParts];
};

template <int B>
DQW_INLINE Bytes codes(const uint8_t* p) {
    uint8_t c[64] = {};
    if constexpr (B == 8) memcpy(c, p, 64);
    if constexpr (B != 8 && (B & 4)) {
        for (int i = 0; i < 64; i++) c[i] = p[i % 32] >> (i / 32 * 4) & 15;
        p += 32;
    }
    if constexpr (B & 2) {
        for (int i = 0; i < 64; i++) c[i] |= (p[i % 16] >> (i / 16 * 2) & 3) << (B & 4);
        p += 16;
    }
    if constexpr (B & 1) {
        for (int i = 0; i < 64; i++) c[i] |= (p[i / 8] >> (i % 8) & 1) << (B - 1);
    }
    Bytes b;
    memcpy(b.part, c, 64);
    return b;
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
DQW_INLINE int64_t place_of(int64_t chunk, int64_t) { return chunk; }
// By lanes, four columns each: 16 columns of `first`, 16 of `second`.
DQW_INLINE f32 by_columns(float first, float second) {
    return each<f32>([&](int i) { return i < W / 2 ? first : second; });
}
// Scales of the lanes of a step's part, from those of every Span columns of the step.
template <int Blocks, int Span>
DQW_INLINE f32 part_scale(const float* s, int part) {
    if constexpr (Span == 16) return by_columns(s[2 * part], s[2 * part + 1]);
    return all(s[Span == 32 ? part : 0]);
}
template <int R>
DQW_INLINE void store_sums(int32_t* out, const i32 (&v)[R]) {
    for (int r = 0; r < R; r++) out[r] = sum_int(v[r]);
}
template <int R>
DQW_INLINE void store_sums(float* out, const f32 (&v)[R]) {
    for (int r = 0; r < R; r++) out[r] = sum(v[r]);
}

template <int B>
struct Table {
    const int8_t* bytes;
    explicit Table(const int8_t* bytes, int) : bytes(bytes) {}
    Bytes operator()(Bytes b) const {
        uint8_t c[64];
        memcpy(c, b.part, 64);
        for (int i = 0; i < 64; i++) c[i] = (uint8_t)bytes[c[i]];
        memcpy(b.part, c, 64);
        return b;
    }
};

// Byte J of every 32-bit lane, a level, as a float.
template <int B>
struct FloatTable {
    const Table<B> bytes;
    explicit FloatTable(const int8_t* levels) : bytes(levels, 0) {}
    Bytes operator()(Bytes c) const { return bytes(c); }
    template <int J>
    f32 part(i32 v) const {
        return each<f32>([&](int i) { return (float)(int8_t)((uint32_t)v.v[i] >> (8 * J)); });
    }
};

template <int J>
DQW_INLINE i32 widen(Bytes b) {
    int8_t c[64];
    memcpy(c, b.part, 64);
    return each<i32>([&](int i) { return (int32_t)c[W * J + i]; });
}
template <int P>
DQW_INLINE f32 quarters(const float* s) {
    return by_columns(s[2 * P], s[2 * P + 1]);
}

}  // namespace
}  // namespace dqw
