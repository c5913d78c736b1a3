// Products of bfloat16 with float32 sums, and in AMX's tiles of int8 with int32 sums: what
// product_bf16.h asks of the tiers that have them. Like kernels.h without torch and inline code of
// the standard library.
#pragma once

#include "kernels.h"

namespace dqw {

// What is multiplied. A number is the sum of so many terms of bfloat16, each what the ones before
// it leave over, so that two hold 16 bits and three a float32. Of the products of terms those below
// 2^-24 of the whole are left out: a float32 sum would not see them.
//
//   x                W                      terms of x, W
//   bfloat16         level * scale          1, 1          rounded
//   float32 (16)     level                  3 (2), 1      the rows' scales come after the sum
//   the same         level of more bits     3 (2), 2      the same
//   the same         level * scale          3 (2), 2      scales of 5 bits, as groups have them
//   int8             level * scale          1, 2          the same
//   int8             level, int8            bytes
struct Factors {
    bool bytes = false;  // int8 by int8
    bool scaled = true;  // W is level * scale; else its levels
    int x = 1, w = 1;    // terms
    Type type = Type::bf16;
    bool codes = false;  // x is int8, rows padded to blocks of 64; else of `type`
};

// Products of terms, and whether the i-th of W and the j-th of x are one.
constexpr bool is_product(int i, int j) { return i + j <= 2; }
constexpr int products_of(const Factors& f) {
    int count = 0;
    for (int i = 0; i < f.w; i++) {
        for (int j = 0; j < f.x; j++) count += is_product(i, j);
    }
    return count;
}

// Numbers of 16 bits that 64 columns of 32 rows take.
inline int64_t block_of_x(const Factors& f) { return f.bytes ? 1024 : 2048 * f.x; }
inline int64_t block_of_w(const Factors& f) { return f.bytes ? 1024 : 2048 * f.w; }

// Some columns of up to 32 rows of x, on their way to what is multiplied, zeros behind the last
// column: for each 32 columns (terms, 2, 16 rows, 32 columns) of bfloat16, or for each 64 (2, 16
// rows, 64 columns) of int8.
struct Bf16Rows {
    const void* x;  // the first of `rows` rows, `cols` wide, contiguous
    Factors factors;
    int64_t rows, cols;
    int64_t begin, end;  // columns, in blocks of 64
    uint16_t* out;
};

// A block of products: up to 32 rows of x by strips of 32 rows of W, over blocks of 64 columns.
struct Bf16Block {
    Factors factors;
    const uint16_t* x;            // Bf16Rows::out
    const uint16_t* strips;       // of decode
    int64_t rows, blocks, width;  // width: outputs, at most 32 a strip
    const float* bias;            // (width), zeros behind; or null. What sums start from, unless
    const float* row_scale;       // (rows) and
    const float* scale;           // (width) are there: then sum * (row_scale * scale) + bias
    bool more;                    // sums start from what is there
    // Row r of strip s is at sums + s * strip_stride + r * stride; int32 of bytes. In y itself, or
    // strip after strip in a piece: rows of y may lie 4 KiB apart, the same few sets of a cache.
    float* sums;
    int64_t stride, strip_stride;
    void* y;  // where the finished sums go, rows `y_stride` apart; or null
    Type y_type;
    int64_t y_stride;
    const Bf16Rows* next;  // rows of x to be converted meanwhile, or null
};

struct Bf16Kernels {
    // Strip `strip` of W, columns [64 begin, 64 end), as terms of bfloat16: for each 32 columns
    // (terms, 2, 16 pairs of columns, 16 rows, 2 columns); or as int8: for each 64 columns (2, 16
    // fours of columns, 16 rows, 4 columns). scales: room for 32 floats a group.
    void (*decode)(const Packed&, const Factors&, int64_t strip, int64_t begin, int64_t end,
                   float* scales, uint16_t* out);
    void (*convert)(const Bf16Rows&, int64_t row_begin, int64_t row_end);
    void (*multiply)(const Bf16Block&);
    // Columns [column, column + 32) of x (rows, cols) as pairs of rows: (pairs, 32, 2), zeros
    // outside.
    void (*pack_pairs)(const uint16_t* x, int64_t rows, int64_t cols, int64_t column,
                       uint16_t* out);
    // sum (rows, columns), at most 32 by 32, whose rows lie `stride` apart, += yT x of so many
    // pairs. Null where torch's product is faster.
    void (*add_moment)(const uint16_t* y, const uint16_t* x, int64_t pairs, int64_t rows,
                       int64_t columns, float* sum, int64_t stride);
    // sum (columns), at most 32, += the sums of so many pairs.
    void (*add_columns)(const uint16_t* x, int64_t pairs, int64_t columns, float* sum);
    int64_t cycles;       // of multiply for 32 rows, 32 outputs and 64 columns
    int64_t panel_bytes;  // of W that stay in the second cache, with room for x beside them
    int64_t few;          // up to so many rows of x the other kernels are faster,
    int64_t few_grouped;  // with int8 activations and groups these
    bool tiles;           // takes all factors, not only one term by one
};

void decode_bf16(const Packed&, const Factors&, int64_t strip, int64_t begin, int64_t end,
                 float* scales, uint16_t* out);
void convert_bf16(const Bf16Rows&, int64_t row_begin, int64_t row_end);
// Strip `strip` of a block's sums to its y.
void finish_bf16(const Bf16Block&, int64_t strip);
void multiply_avx512_bf16(const Bf16Block&);
void multiply_amx(const Bf16Block&);
void pack_pairs_bf16(const uint16_t* x, int64_t rows, int64_t cols, int64_t column, uint16_t* out);
void add_moment_bf16(const uint16_t* y, const uint16_t* x, int64_t pairs, int64_t rows,
                     int64_t columns, float* sum, int64_t stride);
void add_columns_bf16(const uint16_t* x, int64_t pairs, int64_t columns, float* sum);

}  // namespace dqw
