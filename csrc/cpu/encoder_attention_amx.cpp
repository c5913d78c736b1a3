// The encoder's attention on AMX: products by tiles (tdpbf16ps).
#include "encoder_attention_bf16.h"
#include "tiles.h"

namespace dqw {
namespace {

struct TileProducts {
    static constexpr int64_t kRows = 32;
    const Tiles tiles;

    // Tiles 0 to 3 are the sums, two by two, 4 and 5 rows of a, 6 and 7 columns of b.
    DQW_INLINE void multiply(const Half* a, int64_t a_stride, const Half* b, int64_t b_step,
                             int64_t chunks, float* c, int64_t c_stride, bool more) {
        keep(a);  // both, and c
        float* lower = c + 16 * c_stride;
        if (more) {
            _tile_loadd(0, c, c_stride * 4);
            _tile_loadd(1, c + 16, c_stride * 4);
            _tile_loadd(2, lower, c_stride * 4);
            _tile_loadd(3, lower + 16, c_stride * 4);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t i = 0; i < chunks; i++) {
            _tile_loadd(4, a + i * 32, a_stride * 2);
            _tile_stream_loadd(6, b + i * kTile, 64);
            _tile_loadd(5, a + 16 * a_stride + i * 32, a_stride * 2);
            _tile_stream_loadd(7, b + b_step + i * kTile, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, c, c_stride * 4);
        _tile_stored(1, c + 16, c_stride * 4);
        _tile_stored(2, lower, c_stride * 4);
        _tile_stored(3, lower + 16, c_stride * 4);
    }
};

}  // namespace

const EncoderAttention attention_amx = kEncoderAttention<TileProducts>;

}  // namespace dqw
