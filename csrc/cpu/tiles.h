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

// All eight are whole while this lives, and none afterwards: oneDNN shapes them anew for itself,
// and a thread with tiles in use has 8 KiB more to save whenever it is switched.
struct Tiles {
    struct alignas(64) Shape {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];  // of a row
        uint8_t rows[16];
    };
    Tiles() {
        Shape shape = {};
        shape.palette = 1;
        for (int i = 0; i < 8; i++) {
            shape.bytes[i] = 64;
            shape.rows[i] = 16;
        }
        keep(&shape);
        _tile_loadconfig(&shape);
    }
    Tiles(const Tiles&) = delete;
    ~Tiles() { _tile_release(); }
};

}  // namespace
}  // namespace dqw
