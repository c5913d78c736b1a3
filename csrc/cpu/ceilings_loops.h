// What one core can do at most: straight loops over registers with nothing to wait for. Included
// once by each tier, which has defined `Register`s and one step of each kind before.
#pragma once

namespace dqw {
namespace {

// Independent sums: enough to hide the latency (4 or 5 cycles) of two units.
constexpr int kChains = 12;

// Step: acc = step(acc, a, b), the instruction to be counted. `sink` keeps the result alive.
template <class Step, class Register>
DQW_INLINE void chains(Register a, Register b, const Step& step, int64_t rounds, void* sink) {
    Register acc[kChains];
    for (int i = 0; i < kChains; i++) {
        acc[i] = a;
        asm volatile("" : "+x"(acc[i]));  // else equal chains may be computed once
    }
    for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 12
        for (int i = 0; i < kChains; i++) acc[i] = step(acc[i], a, b);
        // Nothing is known about the factors from one round to the next.
        asm volatile("" : "+x"(a), "+x"(b));
    }
    // Every chain counts, so none may be dropped.
    for (int i = 0; i < kChains; i++) asm volatile("" : : "x"(acc[i]));
    __builtin_memcpy(sink, &acc[0], sizeof(Register));
}

}  // namespace
}  // namespace dqw
