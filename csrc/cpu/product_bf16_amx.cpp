// Products of bfloat16 (kernels.h, Bf16Kernels) in AMX's tiles: 16 x 16 sums take 32 columns in 16
// cycles, if they need not be waited for, and a tile comes from the first cache in 8.
#include "kernels.h"
#include "tiles.h"

namespace dqw {
namespace {

static inline __attribute__((always_inline)) __mmask16 lanes(int64_t n) {
    return (__mmask16)(n <= 0 ? 0 : n >= 16 ? 0xffff : (1u << n) - 1);
}

// Sums of 32 rows and 32 outputs: tiles 0 1 over 2 3, or 0 1 alone.
template <bool Two>
void multiply_strip(const Bf16Block& b, const uint16_t* w, const float* bias, float* sums,
                    int64_t stride) {
    const uint16_t* x = b.x;
    if (b.more) {
        _tile_loadd(0, sums, stride * 4);
        _tile_loadd(1, sums + 16, stride * 4);
        if (Two) _tile_loadd(2, sums + 16 * stride, stride * 4);
        if (Two) _tile_loadd(3, sums + 16 * stride + 16, stride * 4);
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
    for (int64_t k = 0; k < b.blocks * 2; k++) {
        // W passes by once for these rows, which stay: a stream leaves them in the first cache.
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
    }
    _tile_stored(0, sums, stride * 4);
    _tile_stored(1, sums + 16, stride * 4);
    if (Two) _tile_stored(2, sums + 16 * stride, stride * 4);
    if (Two) _tile_stored(3, sums + 16 * stride + 16, stride * 4);
}

}  // namespace

void multiply_amx(const Bf16Block& b) {
    const Tiles tiles;
    alignas(64) float edge[32 * 32];
    const bool two = b.rows > 16;
    for (int64_t n = 0; n < b.width; n += 32) {
        const uint16_t* w = b.strips + n * b.blocks * 64;
        float* to = b.sums + n;
        const int64_t width = b.width - n;
        const auto run = [&](float* sums, int64_t stride) {
            const auto strip = two ? multiply_strip<true> : multiply_strip<false>;
            strip(b, w, b.bias ? b.bias + n : nullptr, sums, stride);
        };
        if (b.rows == (two ? 32 : 16) && width >= 32) {
            run(to, b.stride);
            continue;
        }
        // Whole tiles that would reach over the edge of the sums.
        for (int64_t r = 0; b.more && r < b.rows; r++) {
            for (int i = 0; i < 32; i += 16) {
                _mm512_store_ps(edge + r * 32 + i,
                                _mm512_maskz_loadu_ps(lanes(width - i), to + r * b.stride + i));
            }
        }
        keep(edge);
        run(edge, 32);
        keep(edge);
        for (int64_t r = 0; r < b.rows; r++) {
            for (int i = 0; i < 32; i += 16) {
                _mm512_mask_storeu_ps(to + r * b.stride + i, lanes(width - i),
                                      _mm512_load_ps(edge + r * 32 + i));
            }
        }
    }
}

}  // namespace dqw
