// Products of bfloat16 (bf16.h) in AMX's tiles: 16 x 16 sums take 32 columns in 16 cycles if
// nothing is waited for.
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

constexpr int64_t kChunk = 8;  // blocks of 64 columns

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

// Sums of 32 rows and 32 outputs, tiles 0 1 over 2 3; or of 16 rows, tiles 0 1.
enum class Next { none, f32, bf16 };
template <bool Two, Next N>
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
        // As a stream W leaves x in the first cache: 2280 GFLOP/s instead of 1920.
        _tile_stream_loadd(6, w, 64);
        _tile_loadd(4, x, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_stream_loadd(7, w + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (Two) {
            _tile_loadd(5, x + 512, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        x += 1024;
        w += 1024;
        if constexpr (N != Next::none) next.convert<N == Next::bf16>(k);
    }
    _tile_stored(0, sums, bytes);
    _tile_stored(1, sums + 16, bytes);
    if (Two) _tile_stored(2, sums + 16 * stride, bytes);
    if (Two) _tile_stored(3, sums + 16 * stride + 16, bytes);
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
    const bool two = b.rows > 16;
    // Rows that end inside 32 columns are converted elsewhere.
    const bool whole = b.next && b.next->end * 64 <= b.next->cols;
    const auto plain = two ? multiply_strip<true, Next::none> : multiply_strip<false, Next::none>;
    const auto run = !whole || !two               ? plain
                     : b.next->type == Type::bf16 ? multiply_strip<true, Next::bf16>
                                                  : multiply_strip<true, Next::f32>;
    const int64_t strips = (b.width + 31) / 32, chunks = (b.blocks + kChunk - 1) / kChunk;
    Meanwhile next{b.next};
    for (int64_t c = 0; c < chunks; c++) {
        const int64_t begin = b.blocks * c / chunks, end = b.blocks * (c + 1) / chunks;
        for (int64_t s = 0; s < strips; s++) {
            const uint16_t* w = b.strips + (s * b.blocks + begin) * 2048;
            const float* bias = b.bias ? b.bias + s * 32 : nullptr;
            float* to = b.sums + s * 32;
            const bool more = b.more || c > 0;
            const int64_t steps = (end - begin) * 2, width = b.width - s * 32;
            if (b.next) {
                next.row_begin = b.next->rows * s / strips;
                next.row_end = b.next->rows * (s + 1) / strips;
                next.at = (b.next->begin + begin) * 2;
            }
            if (b.rows == (two ? 32 : 16) && width >= 32) {
                run(b.x + begin * 2048, w, steps, more, bias, to, b.stride, next);
            } else {
                if (more) edge.take(to, b.stride, b.rows, width);
                run(b.x + begin * 2048, w, steps, more, bias, edge.sums, 32, next);
                edge.give(to, b.stride, b.rows, width);
            }
            if (b.y && c + 1 == chunks && s > 0) round_bf16(b, s - 1);
        }
    }
    _tile_release();
    if (b.y) round_bf16(b, strips - 1);
    if (b.next && run == plain) convert_bf16(*b.next, 0, b.next->rows);
}

}  // namespace dqw
