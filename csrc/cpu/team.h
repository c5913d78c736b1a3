// One parallel region for a whole network: threads that meet at barriers between its phases.
//
// Waking torch's threads costs 5 to 10 microseconds, and a decoder step has 50 phases: as many
// parallel_for calls would cost half of what the step may take. A barrier costs a quarter of a
// microsecond.
#pragma once

#include <atomic>
#include <mutex>
#include <thread>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "tensors.h"

namespace dqw {

// A thread of the team. It stands for slots [begin, end) of `slots`: torch may give fewer threads
// than were asked for, down to one.
class Member {
  public:
    Member(std::atomic<int64_t>& arrived, int64_t begin, int64_t end, int64_t slots)
        : arrived_(arrived), begin_(begin), end_(end), slots_(slots) {}

    int64_t index() const { return begin_; }  // differs between the threads
    int64_t slots() const { return slots_; }  // threads that were asked for

    // f(begin, end) with this thread's part of [0, n), none of the others'.
    template <class F>
    void share(int64_t n, const F& f) const {
        const int64_t begin = n * begin_ / slots_, end = n * end_ / slots_;
        if (begin < end) f(begin, end);
    }

    // What every thread wrote before is seen by all behind.
    void barrier() {
        phase_ += slots_;
        arrived_.fetch_add(end_ - begin_, std::memory_order_acq_rel);
        for (int spins = 0; arrived_.load(std::memory_order_acquire) < phase_; spins++) {
            if (spins < 2000) {
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
            } else {
                std::this_thread::yield();  // another program has the core of the one that lacks
            }
        }
    }

  private:
    std::atomic<int64_t>& arrived_;
    int64_t begin_, end_, slots_, phase_ = 0;
};

// As long as this lives, numbers below 1e-38 count as 0 on this thread. A softmax's small
// probabilities times a value would be such, and so would GELU's far tail; x86 takes a hundred
// cycles for one. Without this, float32 attention with scores hundreds apart took 28 times as long.
class NoTinyNumbers {
  public:
#if defined(__x86_64__)
    NoTinyNumbers() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~NoTinyNumbers() { _mm_setcsr(before_); }
    NoTinyNumbers(const NoTinyNumbers&) = delete;

  private:
    unsigned before_;
#endif
};

// Held by the team at work. Two at a time could hold each other's threads where torch's come from
// one pool.
inline std::mutex& one_at_a_time() {
    static std::mutex mutex;
    return mutex;
}

// f(Member&) on every thread of the team. f must not throw: the others would wait for ever.
template <class F>
void run_team(int64_t slots, const F& f) {
    const std::lock_guard<std::mutex> lock(one_at_a_time());
    alignas(64) std::atomic<int64_t> arrived{0};
    torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
        [[maybe_unused]] const NoTinyNumbers guard;
        Member member(arrived, begin, end, slots);
        f(member);
    });
}

}  // namespace dqw
