// The peaks of AMX: products of bfloat16 and of int8 in tiles of 16 rows of 64 bytes.
#include <immintrin.h>

#include "kernels.h"
#include "tiles.h"

namespace dqw {
namespace {

constexpr int kSums = 6;  // each product waits 52 cycles for its sum, and the next may start in 16

// `step` is one round: kSums products.
template <class Step>
int64_t products(int64_t rounds, void* sink, const Step& step) {
    const Tiles tiles;
    alignas(64) uint8_t ones[16 * 64];
    for (int i = 0; i < 16 * 64; i++) ones[i] = 1;
    keep(ones);
    _tile_loadd(6, ones, 64);
    _tile_loadd(7, ones, 64);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    for (int64_t r = 0; r < rounds; r++) step();
    _tile_stored(0, ones, 64);
    __builtin_memcpy(sink, ones, 64);
    return rounds * kSums * 16 * 16 * 2;
}

}  // namespace

int64_t multiply_bf16_amx(int64_t rounds, void* sink) {
    return 32 * products(rounds, sink, [] {
               _tile_dpbf16ps(0, 6, 7);
               _tile_dpbf16ps(1, 6, 7);
               _tile_dpbf16ps(2, 6, 7);
               _tile_dpbf16ps(3, 6, 7);
               _tile_dpbf16ps(4, 6, 7);
               _tile_dpbf16ps(5, 6, 7);
           });
}

int64_t multiply_int8_amx(int64_t rounds, void* sink) {
    return 64 * products(rounds, sink, [] {
               _tile_dpbssd(0, 6, 7);
               _tile_dpbssd(1, 6, 7);
               _tile_dpbssd(2, 6, 7);
               _tile_dpbssd(3, 6, 7);
               _tile_dpbssd(4, 6, 7);
               _tile_dpbssd(5, 6, 7);
           });
}

}  // namespace dqw
