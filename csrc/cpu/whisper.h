// What Whisper's layers ask of one instruction set, besides its matrix products (kernels.h).
//
// The same split: decoder.cpp and encoder.cpp know torch, these know pointers only.
#pragma once

#include "kernels.h"

namespace dqw {

// How the cross-attention keys and values of one head are stored, for `positions` of the audio
// padded to a multiple of 16 (`padded`), head_dim a multiple of 16, W lanes in a register:
//   keys    blocks of W positions: (head_dim / 4, W, 4) int8, or (head_dim, W) floats
//   values  int8: (padded / 4, head_dim, 4) · floats: (padded, head_dim)
// int8 has a scale for each position, keys' then values', behind them. W and the offset of the
// bytes are the tier's, so a cache belongs to the tier that wrote it.
enum class CrossType : int { int8, bf16, f32 };

struct CrossHead {
    CrossType type;
    int64_t positions, padded, head_dim;
    uint8_t* data;
};

inline int64_t cross_head_bytes(CrossType type, int64_t padded, int64_t head_dim) {
    if (type == CrossType::int8) return 2 * padded * (head_dim + 4);
    return 2 * padded * head_dim * (type == CrossType::bf16 ? 2 : 4);
}

struct CrossAttention {
    CrossHead head;
    const float* query;  // (head_dim), scaled
    float* scores;       // (padded), scratch
    int8_t* bytes;       // (2 * padded + 2 * head_dim), scratch
    float* out;          // (head_dim)
};

// One head of one new token against the `count` tokens up to itself.
struct SelfAttention {
    const float* query;  // (head_dim), scaled
    const float* keys;   // key of token t: keys + source[t] * row_stride + t * token_stride
    const float* values;
    const int32_t* source;  // the cache's row that holds token t
    int64_t row_stride, token_stride, count, head_dim;
    float* scores;  // (count rounded up to 16), scratch
    float* out;
};

// One head: queries attend to every position of the audio; in the encoder these are their own.
struct EncoderHead {
    const float *q, *k, *v;               // this head's columns of rows `stride` apart; q scaled
    int64_t stride, positions, head_dim;  // positions: rows of k and v
    char* packed;                         // packed_bytes of it, aligned to a cache line, by pack
};

// How a tier does it: keys and values are packed once, then blocks of queries attend in any order.
struct EncoderAttention {
    int64_t rows;  // queries that share their way through keys and values
    int64_t (*packed_bytes)(int64_t positions, int64_t head_dim);
    int64_t (*scratch_bytes)(int64_t positions, int64_t head_dim);  // of a thread
    void (*pack)(const EncoderHead&);
    // Queries [begin, end), at most `rows`, to the same rows of out, `stride` apart.
    void (*attend)(const EncoderHead&, int64_t begin, int64_t end, char* scratch, float* out);
};

struct WhisperKernels {
    void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                       float* y);
    void (*gelu)(float* x, int64_t n);                 // in place, exact (erf), n any
    void (*add)(float* x, const float* y, int64_t n);  // x += y
    // out (n, 3): three neighbouring columns of what a convolution takes.
    void (*interleave)(const float* a, const float* b, const float* c, int64_t n, float* out);
    void (*self_attention)(const SelfAttention&);
    void (*pack_cross)(const CrossHead&, const float* keys, const float* values, int64_t stride);
    void (*cross_attention)(const CrossAttention&);
};

extern const WhisperKernels whisper_scalar, whisper_avx2, whisper_avx512;
inline const WhisperKernels& whisper_kernels() { return *tier().whisper; }

extern const EncoderAttention attention_scalar, attention_avx2, attention_avx512,
    attention_avx512_bf16, attention_amx;

}  // namespace dqw
