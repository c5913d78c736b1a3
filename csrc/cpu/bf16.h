// Products of bfloat16 with float32 sums: what product_bf16.h asks of the tiers that have them.
// Like kernels.h without torch and inline code of the standard library.
#pragma once

#include "kernels.h"

namespace dqw {

// Some columns of up to 32 rows of x, on their way to bfloat16: for each 32 columns (2, 16 rows, 32
// columns), zeros behind the last column.
struct Bf16Rows {
    const void* x;  // the first of `rows` rows, `cols` wide, contiguous
    Type type;      // float32 or bfloat16
    int64_t rows, cols;
    int64_t begin, end;  // columns, in blocks of 64
    uint16_t* out;
};

// A block of products: up to 32 rows of x by strips of 32 rows of W, over blocks of 64 columns.
struct Bf16Block {
    const uint16_t* x;            // Bf16Rows::out
    const uint16_t* strips;       // of decode
    int64_t rows, blocks, width;  // width: outputs, at most 32 a strip
    const float* bias;            // what sums start from, zeros behind `width`; or null
    bool more;                    // sums start from what is there
    float* sums;                  // (rows, width), rows `stride` apart
    int64_t stride;
    uint16_t* y;  // where sums go as bfloat16, rows `y_stride` apart; or null
    int64_t y_stride;
    const Bf16Rows* next;  // rows of x to be converted meanwhile, or null
};

struct Bf16Kernels {
    // Strip `strip` of W, columns [64 begin, 64 end): level * scale, rounded to float32 and then to
    // bfloat16, in 2048 numbers a block: for each 32 columns and each 16 rows of the strip
    // (16 pairs of columns, 16 rows, 2 columns). scales: room for 32 floats a group.
    void (*decode)(const Packed&, int64_t strip, int64_t begin, int64_t end, float* scales,
                   uint16_t* out);
    void (*convert)(const Bf16Rows&, int64_t row_begin, int64_t row_end);
    void (*multiply)(const Bf16Block&);
    int64_t cycles;       // of multiply for 32 rows, 32 outputs and 64 columns
    int64_t panel_bytes;  // of W that stay in the second cache, with room for x beside them
    int64_t few;          // up to so many rows of x the other kernels are faster
};

void decode_bf16(const Packed&, int64_t strip, int64_t begin, int64_t end, float* scales,
                 uint16_t* out);
void convert_bf16(const Bf16Rows&, int64_t row_begin, int64_t row_end);
// Strip `strip` of a block's sums to its y.
void round_bf16(const Bf16Block&, int64_t strip);
void multiply_avx512_bf16(const Bf16Block&);
void multiply_amx(const Bf16Block&);

}  // namespace dqw
