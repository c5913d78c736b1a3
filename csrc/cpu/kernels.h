// What the operators ask of one instruction set ("tier"), and how they choose a tier.
//
// The operators (fake_quant.cpp, quant_linear.cpp, dequantize.cpp) know torch: they check
// arguments, allocate, and split the work over threads. The tiers know pointers only. Each tier is
// compiled with its own flags from the same loops (*_loops.h over isa_*.h), so its files include
// no torch and no standard library header with inline code: two copies of one inline function,
// one of them with AVX-512 in it, would be merged by the linker and crash older machines.
#pragma once

#include <stdint.h>

namespace dqw {

enum class Type : int { f32, f16, bf16 };

// ---- fake quantization: csrc/cpu/fake_quant.cpp ----

// The rounding table: the level of t = 2|x|/scale is levels[floor(min(t, last))].
struct Grid {
    bool uniform;          // needs no table: its levels are arithmetic
    int size;              // entries, 2 * level_max + 1
    const float* levels;   // `size` of them, zero-padded to at least 32
    const uint8_t* bytes;  // the same as 256 bytes if size <= 256 (then every level < 256), or null
};

struct FakeQuant {
    const void* x;     // (rows, cols), contiguous
    const void* grad;  // the same; backward only
    void* y;           // (rows, cols): y, dx, or int16 levels
    float* dscale;     // (rows, groups): one sum a segment; backward only
    Type type;         // of x, grad and y
    int64_t cols;
    int64_t group;  // columns that share a scale; cols unless grouped
    const float* scale;
    int64_t scale_stride;  // from row to row: 0 per tensor, else the number of groups
    Grid grid;
};

// Columns of a block, rounded one after the other, each with the errors of those before it.
constexpr int64_t kMostColumns = 64;
struct Columns {
    int64_t cols, rows;        // what follows is (cols, rows) or as said, float32
    const float* state;        // what is rounded is state, or
    const float* base;         // base + state / divisor; or null
    const float* divisor;      // (cols)
    const float* coefficient;  // (cols, cols): state[j] -= coefficient[i, j] * delta[i] for j > i
    const float* scale;
    float* rounded;
    float* delta;  // (state - rounded) / divisor, or rounded - base
    Grid grid;
};

struct FakeQuantKernels {
    void (*forward)(const FakeQuant&, int64_t row_begin, int64_t row_end);
    void (*backward)(const FakeQuant&, int64_t row_begin, int64_t row_end);
    void (*quantize)(const FakeQuant&, int64_t row_begin, int64_t row_end);
    void (*activation)(const FakeQuant&, int64_t row_begin, int64_t row_end);
    void (*columns)(const Columns&, int64_t row_begin, int64_t row_end);
};

// ---- packed weights: csrc/cpu/quant_linear.cpp, csrc/cpu/dequantize.cpp ----

// What scales are kept as: floats, halves, or the bytes that a folder stores for groups
// (dqw/packing.py), whose float32 is (byte << kScaleShift) + Packed::lowest_scale, as bits.
enum class ScaleType : int { f32, f16, byte };
constexpr int kScaleShift = 23 - 4;

// A packed matrix (dqw/packing.py), its scales, and its levels split into bytes.
struct Packed {
    const uint8_t* data;
    int bits;
    int64_t rows, cols;
    int64_t blocks;     // of 64 codes a row; cols padded = 64 * blocks
    int64_t row_bytes;  // 8 * bits * blocks
    const void* scale;
    ScaleType scale_type;
    int32_t lowest_scale;  // its bits as a float32, if the scales are bytes
    int64_t scale_stride;  // from row to row, as above
    int64_t group;         // columns that share a scale; 0 unless grouped
    // level = low + 256 * high, low in -128..127. `wide`: some level needs `high`.
    alignas(64) int8_t low[256];
    alignas(64) int8_t high[256];
    bool wide;
    int largest;     // magnitude of a level, at least 1
    int products16;  // so many pairs of products of bytes, unsigned by `largest`, fit 16 bits
};

constexpr int64_t kLongestInt8Row = 65536;  // 65536 * 255 * 127 < 2^31

struct Linear {
    Packed w;
    int64_t m;          // rows of x
    int planes;         // rows of q for one of x: 3, see LinearKernels::takes_planes, or 0 for 1
    const float* bias;  // (w.rows), or null
    void* y;            // (m, w.rows)
    Type type;          // of x and y
    // The activations, by the tier's prepare_* or block_*. Float: x as float32. Int8: q, its
    // row scales, and what takes back the offset of unsigned weights.
    float* x;             // gemv: (m, padded cols) · gemm: packed by blocks of rows
    int8_t* q;            // the same layouts
    float* row_scale;     // (m)
    int32_t* row_start;   // (m * planes), gemm: (m * planes, groups or 1): the offset of a sum
    int32_t* lane_start;  // gemv with groups: (m * planes, padded cols / 4): what sums start from
    int64_t block_rows;   // gemm: rows of q in a register block
};

struct Bf16Kernels;  // bf16.h

struct LinearKernels {
    int gemv_rows;  // gemv takes at most this many rows of x (of q, if there are planes) at a time
    // Up to so many rows of x the gemv, in turns, is faster than the alternative.
    int int8_gemv_limit, float_gemv_limit;
    // Convert or quantize rows of x (`source`, cols wide, contiguous) into Linear::x or ::q, for
    // the gemv.
    void (*prepare_float)(const Linear&, const void* source, int64_t begin, int64_t end);
    void (*prepare_int8)(const Linear&, const void* source, int64_t begin, int64_t end);
    // Linear::q as (m, padded cols) in the order of the columns, and the row scales.
    void (*quantize_rows)(const Linear&, const void* source, int64_t begin, int64_t end);
    // Whether float activations may run as integers, faster than as floats: a row of x becomes
    // three rows of q, the digits to base 256 of x in units of row_scale, a power of two. They hold
    // 23 bits below the row's largest magnitude, as good as a float32 sum. prepare_int8 and
    // block_int8 see it by Linear::planes = 3, and the int8 kernels follow.
    bool (*takes_planes)(const Packed&);
    int planes_limit;  // up to so many rows of x
    // y[:, begin:end]; m <= gemv_rows.
    void (*gemv_float)(const Linear&, int64_t begin, int64_t end);
    void (*gemv_int8)(const Linear&, int64_t begin, int64_t end);
    // Row `row` as float32 level * scale (cols), or as int16 levels (cols padded).
    void (*dequantize)(const Packed&, int64_t row, float* out);
    void (*levels)(const Packed&, int64_t row, int16_t* out);
    float (*scale)(const Packed&, int64_t row, int64_t group);
    // Many rows of x; null where torch's matmul on the unpacked matrix is faster.
    int int8_block_rows;  // register block: rows of x
    int float_block_rows;
    int group_block_rows;  // int8 with groups: sums and their scaled totals both take registers
    int tile_rows;         // register block: rows of w
    // As prepare_*, for the gemm: the rows of one register block.
    void (*block_float)(const Linear&, const void* source, int64_t begin, int64_t end);
    void (*block_int8)(const Linear&, const void* source, int64_t begin, int64_t end);
    // Decodes rows n … n + tile_rows of w.
    void (*fill_float)(const Packed&, int64_t n, void* tile);
    void (*fill_int8)(const Packed&, int64_t n, void* tile);
    // y[m_begin:m_end, n:n+tile_rows] by that tile; m_begin is the first row of a register block.
    void (*gemm_float)(const Linear&, int64_t n, int64_t m_begin, int64_t m_end, const void* tile);
    void (*gemm_int8)(const Linear&, int64_t n, int64_t m_begin, int64_t m_end, const void* tile);
    const Bf16Kernels* bf16;  // null where the processor has no products of bfloat16
};

// ---- what the machine can do at most: csrc/cpu/ceilings.cpp ----

// On one thread. `sink`: 64 bytes that keep the result alive; multiply returns its operations.
struct CeilingKernels {
    int64_t (*multiply_float)(int64_t rounds, void* sink);
    int64_t (*multiply_int8)(int64_t rounds, void* sink);
    void (*read)(const uint8_t* data, int64_t bytes, void* sink);
    int64_t (*multiply_bf16)(int64_t rounds, void* sink);  // or null
};

int64_t multiply_bf16_avx512(int64_t rounds, void* sink);
int64_t multiply_bf16_amx(int64_t rounds, void* sink);
int64_t multiply_int8_amx(int64_t rounds, void* sink);

// ---- tiers: csrc/cpu/dispatch.cpp ----

struct WhisperKernels;  // whisper.h
struct EncoderAttention;

struct Tier {
    const char* name;
    const FakeQuantKernels* fake_quant;
    const LinearKernels* linear;
    const WhisperKernels* whisper;
    const EncoderAttention* attention;
    const CeilingKernels* ceilings;
    // Where Whisper's float32 products may be rounded to bfloat16: the tier that rounds none; or
    // null.
    const Tier* exact;
};

extern const FakeQuantKernels fake_quant_scalar, fake_quant_avx2, fake_quant_avx512;
extern const LinearKernels linear_scalar, linear_avx2, linear_avx512;
extern const CeilingKernels ceilings_scalar, ceilings_avx2, ceilings_avx512;

// The tier in use: the best that the machine runs, or what DQW_CPU_ISA asks for if it runs that.
const Tier& tier();
// The same, or the one that multiplies float32 as float32.
inline const Tier& tier(bool bf16) {
    const Tier& best = tier();
    return bf16 || best.exact == nullptr ? best : *best.exact;
}

}  // namespace dqw
