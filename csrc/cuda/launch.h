// Which instance of the kernel serves a call: every type, 2 to 8 bits and group size that it has.
#pragma once

#include "gemv.h"

namespace dqw {

// To a block of threads: with 4 loads in flight they take 2048 columns with groups, 4096 without,
// in one round of loads.
constexpr int kWarps = 8;

// f(kernel) with the instance for BITS and group; false where there is none.
template <typename T, int BITS, typename F>
bool with_group(int group, const F& f) {
    switch (group) {
        case 0:
            f(gemv<T, BITS, 0, kWarps>);
            return true;
        case 16:
            f(gemv<T, BITS, 16, kWarps>);
            return true;
        case 32:
            f(gemv<T, BITS, 32, kWarps>);
            return true;
        case 64:
            f(gemv<T, BITS, 64, kWarps>);
            return true;
        case 128:
            f(gemv<T, BITS, 128, kWarps>);
            return true;
    }
    return false;
}

// bfloat16 does not hold every level of 7 and 8 bits, and this kernel multiplies levels.
template <typename T, bool EXACT_7_AND_8, typename F>
bool with_kernel(int bits, int group, const F& f) {
    switch (bits) {
        case 2:
            return with_group<T, 2>(group, f);
        case 3:
            return with_group<T, 3>(group, f);
        case 4:
            return with_group<T, 4>(group, f);
        case 5:
            return with_group<T, 5>(group, f);
        case 6:
            return with_group<T, 6>(group, f);
    }
    if constexpr (EXACT_7_AND_8) {
        if (bits == 7) return with_group<T, 7>(group, f);
        if (bits == 8) return with_group<T, 8>(group, f);
    }
    return false;
}

inline int blocks_of(const Gemv& a) {
    int blocks = 0;
    for (int i = 0; i < a.matrices; i++) blocks += (a.matrix[i].rows + kRows - 1) / kRows;
    return blocks;
}

}  // namespace dqw
