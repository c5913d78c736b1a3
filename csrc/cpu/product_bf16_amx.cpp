// Products of bfloat16 and of int8 (bf16.h) in AMX's tiles: 16 x 16 sums take 32 columns of
// bfloat16, or 64 of int8, in 16 cycles if nothing is waited for.
//
// A block of four tiles of sums wants four tiles of factors in 64 cycles: as much as the second
// cache gives. So 512 columns of x, 32 KiB, stay in the first while strip after strip of W passes
// by, and sums are put down and taken up again between such chunks. On one core, 3340 GFLOP/s at
// most: 1280 columns as one chunk 1730, chunks of 1024 the same, of 512 2300, of 256 2150.
#include "bf16.h"
#include "tiles.h"

#define DQW_INLINE inline __attribute__((always_inline))

namespace dqw {
namespace {

// Numbers of 16 bits of a block of x at a time; of several terms fewer, which W's share the cache
// with.
constexpr int64_t kChunk = 16384, kChunkOfTerms = 12288;

static DQW_INLINE __mmask16 lanes(int64_t n) {
    return (__mmask16)(n <= 0 ? 0 : n >= 16 ? 0xffff : (1u << n) - 1);
}

// Rows of x that are converted meanwhile, 32 columns with every step of a strip: what needs no
// tiles hides behind them, and the processor sees slow streams that it can fetch ahead of. In one
// go after each strip they took as long as alone.
struct Meanwhile {
    const Bf16Rows* rows;
    int64_t row_begin, row_end;
    int64_t at;  // the first step's, in 32 columns

    template <bool IsBf16>
    DQW_INLINE void convert(int64_t step) const {
        for (int64_t r = row_begin; r < row_end; r++) {
            const int64_t i = r * rows->cols + (at + step) * 32;
            uint16_t* to = rows->out + step_of_out(step) + r / 16 * 512 + r % 16 * 32;
            if (IsBf16) {
                _mm512_store_si512(to, _mm512_loadu_si512((const uint16_t*)rows->x + i));
            } else {
                const float* x = (const float*)rows->x + i;
                const auto v = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x));
                _mm512_store_si512(to, (__m512i)v);
            }
        }
    }
    DQW_INLINE int64_t step_of_out(int64_t step) const {
        return (at - rows->begin * 2 + step) * 1024;
    }
};

// 16 x 16 sums += 16 rows of x by 16 of W. A macro: the names of tiles are text.
#define DQW_MULTIPLY(sums, x, w)        \
    do {                                \
        if constexpr (Bytes) {          \
            _tile_dpbssd(sums, x, w);   \
        } else {                        \
            _tile_dpbf16ps(sums, x, w); \
        }                               \
    } while (false)

// Sums of 32 rows and 32 outputs, tiles 0 1 over 2 3; or of 16 rows, tiles 0 1. A step takes 32
// columns, or 64 of int8.
enum class Next { none, f32, bf16 };
template <bool Two, Next N, bool Bytes, int XTerms, int WTerms>
void multiply_strip(const uint16_t* x, const uint16_t* w, int64_t steps, bool more,
                    const float* bias, float* sums, int64_t stride, const Meanwhile& next) {
    const int64_t bytes = stride * 4;
    if (more) {
        _tile_loadd(0, sums, bytes);
        _tile_loadd(1, sums + 16, bytes);
        if (Two) _tile_loadd(2, sums + 16 * stride, bytes);
        if (Two) _tile_loadd(3, sums + 16 * stride + 16, bytes);
    } else if (bias) {
        _tile_loadd(0, bias, 0);
        _tile_loadd(1, bias + 16, 0);
        if (Two) _tile_loadd(2, bias, 0);
        if (Two) _tile_loadd(3, bias + 16, 0);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (Two) _tile_zero(2);
        if (Two) _tile_zero(3);
    }
    for (int64_t k = 0; k < steps; k++) {
        for (int i = 0; i < WTerms; i++) {
            // As a stream W leaves x in the first cache: 2280 GFLOP/s instead of 1920.
            _tile_stream_loadd(6, w + i * 1024, 64);
            for (int j = 0; j < XTerms && is_product(i, j); j++) {
                // A single term of x stays in its tiles for all of W's.
                const bool loads = XTerms > 1 || i == 0;
                if (loads) _tile_loadd(4, x + j * 1024, 64);
                DQW_MULTIPLY(0, 4, 6);
                if (j == 0) _tile_stream_loadd(7, w + i * 1024 + 512, 64);
                DQW_MULTIPLY(1, 4, 7);
                if (Two) {
                    if (loads) _tile_loadd(5, x + j * 1024 + 512, 64);
                    DQW_MULTIPLY(2, 5, 6);
                    DQW_MULTIPLY(3, 5, 7);
                }
            }
        }
        x += XTerms * 1024;
        w += WTerms * 1024;
        if constexpr (N != Next::none) next.convert<N == Next::bf16>(k);
    }
    _tile_stored(0, sums, bytes);
    _tile_stored(1, sums + 16, bytes);
    if (Two) _tile_stored(2, sums + 16 * stride, bytes);
    if (Two) _tile_stored(3, sums + 16 * stride + 16, bytes);
}

template <bool Two>
auto strip_of(const Factors& f, Next next) {
    if (f.bytes) return multiply_strip<Two, Next::none, true, 1, 1>;
    if (f.w == 2) {
        return f.x == 1   ? multiply_strip<Two, Next::none, false, 1, 2>
               : f.x == 2 ? multiply_strip<Two, Next::none, false, 2, 2>
                          : multiply_strip<Two, Next::none, false, 3, 2>;
    }
    if (f.x == 2) return multiply_strip<Two, Next::none, false, 2, 1>;
    if (f.x == 3) return multiply_strip<Two, Next::none, false, 3, 1>;
    return next == Next::none  ? multiply_strip<Two, Next::none, false, 1, 1>
           : next == Next::f32 ? multiply_strip<Two, Next::f32, false, 1, 1>
                               : multiply_strip<Two, Next::bf16, false, 1, 1>;
}

// Whole tiles that would reach over the edge of the sums take a way round.
struct Edge {
    alignas(64) float sums[32 * 32];

    void take(const float* from, int64_t stride, int64_t rows, int64_t width) {
        for (int64_t r = 0; r < rows; r++) {
            for (int i = 0; i < 32; i += 16) {
                const __m512 v = _mm512_maskz_loadu_ps(lanes(width - i), from + r * stride + i);
                _mm512_store_ps(sums + r * 32 + i, v);
            }
        }
        keep(sums);
    }
    void give(float* to, int64_t stride, int64_t rows, int64_t width) const {
        keep(sums);
        for (int64_t r = 0; r < rows; r++) {
            for (int i = 0; i < 32; i += 16) {
                const __m512 v = _mm512_load_ps(sums + r * 32 + i);
                _mm512_mask_storeu_ps(to + r * stride + i, lanes(width - i), v);
            }
        }
    }
};

}  // namespace

void multiply_amx(const Bf16Block& b) {
    take_tiles();
    Edge edge;
    const Factors& f = b.factors;
    const bool two = b.rows > 16;
    // Rows that end inside 32 columns are converted elsewhere, and so is what is more than one
    // term.
    const bool meanwhile =
        two && b.next && f.x == 1 && !f.codes && b.next->end * 64 <= b.next->cols;
    const Next how = !meanwhile ? Next::none : f.type == Type::bf16 ? Next::bf16 : Next::f32;
    const auto run = two ? strip_of<true>(f, how) : strip_of<false>(f, how);
    const int64_t x_block = block_of_x(f), w_block = block_of_w(f), steps_a_block = f.bytes ? 1 : 2;
    const int64_t chunk = (products_of(f) == 1 ? kChunk : kChunkOfTerms) / x_block;
    const int64_t chunks = (b.blocks + chunk - 1) / chunk, strips = (b.width + 31) / 32;
    const float* start = b.scale ? nullptr : b.bias;
    Meanwhile next{b.next};
    for (int64_t c = 0; c < chunks; c++) {
        const int64_t begin = b.blocks * c / chunks, end = b.blocks * (c + 1) / chunks;
        for (int64_t s = 0; s < strips; s++) {
            const uint16_t* w = b.strips + (s * b.blocks + begin) * w_block;
            const float* bias = start ? start + s * 32 : nullptr;
            float* to = b.sums + s * b.strip_stride;
            const bool more = b.more || c > 0;
            const int64_t steps = (end - begin) * steps_a_block, width = b.width - s * 32;
            if (meanwhile) {
                next.row_begin = b.next->rows * s / strips;
                next.row_end = b.next->rows * (s + 1) / strips;
                next.at = (b.next->begin + begin) * 2;
            }
            if (b.strip_stride > 32 || (b.rows == (two ? 32 : 16) && width >= 32)) {
                run(b.x + begin * x_block, w, steps, more, bias, to, b.stride, next);
            } else {
                if (more) edge.take(to, b.stride, b.rows, width);
                run(b.x + begin * x_block, w, steps, more, bias, edge.sums, 32, next);
                edge.give(to, b.stride, b.rows, width);
            }
            if (b.y && c + 1 == chunks && s > 0) finish_bf16(b, s - 1);
        }
    }
    _tile_release();
    if (b.y) finish_bf16(b, strips - 1);
    if (b.next && !meanwhile) convert_bf16(*b.next, 0, b.next->rows);
}

}  // namespace dqw
