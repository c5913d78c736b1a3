// Which instance of the kernel serves a call: every type, 2 to 8 bits, groups or not.
#pragma once

#include "gemv.h"

namespace dqw {

// f(kernel) with the instance for the call.
template <typename T, int BITS, typename F>
void with_bits(const Gemv& a, bool grouped, const F& f) {
    const int tiles = x_tiles_of(a.m);
    if (tiles == 1) {
        grouped ? f(gemv<T, BITS, true, 1>) : f(gemv<T, BITS, false, 1>);
    } else if (tiles == 2) {
        grouped ? f(gemv<T, BITS, true, 2>) : f(gemv<T, BITS, false, 2>);
    } else {
        grouped ? f(gemv<T, BITS, true, 4>) : f(gemv<T, BITS, false, 4>);
    }
}

// with_bits for the width among BITS to 8; false where there is none.
template <typename T, int BITS = 2, typename F>
bool with_width(const Gemv& a, int bits, bool grouped, const F& f) {
    if (bits == BITS) {
        with_bits<T, BITS>(a, grouped, f);
        return true;
    }
    if constexpr (BITS < 8) return with_width<T, BITS + 1>(a, bits, grouped, f);
    return false;
}

// False where there is no instance: groups of 16, 32, 64 and 128 have their scale in a lane's
// columns. bfloat16 holds every level of 7 and 8 bits of a uniform grid alone, and this kernel
// multiplies levels: who calls sees to that.
template <typename T, typename F>
bool with_kernel(Gemv& a, int bits, int group, const F& f) {
    if (group != 0 && group != 16 && group != 32 && group != 64 && group != 128) return false;
    const bool grouped = group != 0;
    for (a.group_shift = 4; grouped && 1 << a.group_shift < group;) a.group_shift++;
    return with_width<T>(a, bits, grouped, f);
}

inline int tiles_of(const Gemv& a) {
    int tiles = 0;
    for (int i = 0; i < a.matrices; i++) tiles += (a.matrix[i].rows + kTile - 1) / kTile;
    return tiles;
}

}  // namespace dqw
