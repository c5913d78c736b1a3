// AMX's eight tiles: 16 rows of 64 bytes each. Only for files with AMX's flags.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace dqw {
namespace {

// GCC 12's tile instructions do not say that they read memory: without this, writes before them may
// be moved behind them or left out.
static inline __attribute__((always_inline)) void keep(const void* p) {
    asm volatile("" : : "r"(p) : "memory");
}

struct alignas(64) TileShapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];  // of a row
    uint8_t rows[16];
};

// All eight are whole from here to _tile_release(), which must follow before other code runs:
// oneDNN shapes them anew for itself, and a thread with tiles in use has 8 KiB more to save
// whenever it is switched.
static inline __attribute__((always_inline)) void take_tiles() {
    TileShapes shapes = {};
    shapes.palette = 1;
    for (int i = 0; i < 8; i++) {
        shapes.bytes[i] = 64;
        shapes.rows[i] = 16;
    }
    keep(&shapes);
    _tile_loadconfig(&shapes);
}

// The same for a scope that calls nothing that might throw: else the compiler adds a weak symbol,
// which no tier's file may have (tests/test_packaging.py).
struct Tiles {
    Tiles() { take_tiles(); }
    Tiles(const Tiles&) = delete;
    ~Tiles() { _tile_release(); }
};

}  // namespace
}  // namespace dqw
