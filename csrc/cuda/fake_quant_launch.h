// Which kernel of fake_quant.h serves a call, and in how many blocks.
#pragma once

#include <vector>

#include "fake_quant.h"

namespace dqw {

enum class Float { kFloat, kHalf, kBFloat16 };

struct FakeQuantPlan {
    bool groups;  // fake_quant_groups, else fake_quant_teams
    int blocks, threads;
};

// Fills in what the kernel has to know of the plan. columns: of a chunk.
inline FakeQuantPlan plan_of(FakeQuant& a, int columns) {
    const int chunks = (a.segment + columns - 1) / columns;
    const bool power = chunks >= 2 && chunks <= 32 && (chunks & (chunks - 1)) == 0;
    if (power && !a.per_tensor && columns > 1 && a.cols % a.segment == 0) {
        for (a.shift = 1; 1 << a.shift < chunks;) a.shift++;
        constexpr int kThreads = 128;
        const int64_t tile = (int64_t)columns * kChunks * kThreads;
        return {true, (int)((a.elements + tile - 1) / tile), kThreads};
    }
    // As many rounds as a block of all warps would need, and no more warps than those take.
    const int step = 32 * kChunks, most = step * kTeamWarps;
    const int rounds = (chunks + most - 1) / most;
    a.warps = (chunks + step * rounds - 1) / (step * rounds);
    a.teams = a.warps > 2 ? 1 : 4 / a.warps;
    return {false, (a.count + a.teams - 1) / a.teams, 32 * a.warps * a.teams};
}

// f.template operator()<Chunk>() for x's type and the other's: y's, or grad's if backward. False
// where there is none: types other than float32 are rounded to themselves first.
template <template <typename, typename, int> class Direction, int V, typename F>
bool with_types(Float x, Float other, const F& f) {
    if (x == Float::kFloat) {
        constexpr int W = V / 2 > 0 ? V / 2 : 1;
        if (other == Float::kFloat) f.template operator()<Direction<float, float, W>>();
        if (other == Float::kHalf) f.template operator()<Direction<float, __half, W>>();
        if (other == Float::kBFloat16) f.template operator()<Direction<float, __nv_bfloat16, W>>();
        return true;
    }
    if (x != other) return false;
    if (x == Float::kHalf) {
        f.template operator()<Direction<__half, __half, V>>();
    } else {
        f.template operator()<Direction<__nv_bfloat16, __nv_bfloat16, V>>();
    }
    return true;
}
// wide: chunks of 16 bytes of x.
template <typename F>
bool with_chunk(bool backward, bool wide, Float x, Float other, const F& f) {
    if (backward) {
        return wide ? with_types<Backward, 8>(x, other, f) : with_types<Backward, 1>(x, other, f);
    }
    return wide ? with_types<Forward, 8>(x, other, f) : with_types<Forward, 1>(x, other, f);
}

// Whether chunks of 16 bytes of x do: none crosses a segment, and every pointer is aligned to its
// own type's.
inline bool is_wide(const FakeQuant& a, bool backward, Float x, Float other) {
    const auto size = [](Float type) { return type == Float::kFloat ? 4 : 2; };
    const int columns = 16 / size(x);
    const auto fits = [&](const void* p, Float type) {
        return reinterpret_cast<uintptr_t>(p) % (columns * size(type)) == 0;
    };
    return a.cols % columns == 0 && a.segment % columns == 0 && fits(a.x, x) &&
           fits(a.out, backward ? x : other) && (!backward || fits(a.grad, other));
}

// The sizes of a (rows, cols) matrix, neither 0, in groups of columns or none; clip_rows: 1 where
// one clip serves a tensor; entries: of the table.
inline void set_sizes(FakeQuant& a, int64_t rows, int64_t cols, int64_t group, int64_t clip_rows,
                      int64_t entries) {
    a.elements = rows * cols;
    a.cols = static_cast<int>(cols);
    a.segment = static_cast<int>(group > 0 && group < cols ? group : cols);
    a.groups = (a.cols + a.segment - 1) / a.segment;
    a.count = static_cast<int>(rows) * a.groups;
    a.last = static_cast<int>(entries) - 1;
    a.per_tensor = group == 0 && clip_rows == 1 && rows > 1;
}

template <int MOST>
using FakeQuantKernel = void (*)(const FakeQuants<MOST>);

// What serves a matrix: a kernel, for it alone and with others, and its blocks of so many threads.
// No kernel where none has these types.
struct Served {
    FakeQuantKernel<1> alone;
    FakeQuantKernel<kTogether> together;
    int blocks, threads;
};
// Fills in what the kernel has to know.
inline Served served_by(FakeQuant& a, bool backward, Float x, Float other) {
    Served found = {};
    const bool wide = is_wide(a, backward, x, other);
    with_chunk(backward, wide, x, other, [&]<typename Chunk>() {
        const FakeQuantPlan p = plan_of(a, Chunk::kColumns);
        found = {fake_quant_teams<Chunk, 1>, fake_quant_teams<Chunk, kTogether>, p.blocks,
                 p.threads};
        if constexpr (Chunk::kColumns > 1) {
            if (p.groups) {
                found.alone = fake_quant_groups<Chunk, 1>;
                found.together = fake_quant_groups<Chunk, kTogether>;
            }
        }
    });
    return found;
}

// A launch of some matrices, from none on.
class Together {
  public:
    // False where it is full.
    bool add(const FakeQuant& a, int blocks) {
        if (count_ == kTogether || blocks_ > kMostBlocks - blocks) return false;
        all_.each[count_] = a;
        all_.first[count_++] = blocks_;
        blocks_ += blocks;
        return true;
    }
    template <typename F>
    void send(const Served& by, F& launch) {
        if (count_ == 1) {
            launch(by.alone, FakeQuants<1>{{all_.each[0]}, {0}}, blocks_, by.threads);
        } else if (count_ > 1) {
            for (int i = count_; i < kTogether; i++) all_.first[i] = kMostBlocks;
            launch(by.together, all_, blocks_, by.threads);
        }
        count_ = blocks_ = 0;
    }

  private:
    static constexpr int kMostBlocks = 0x7fffffff;
    FakeQuants<kTogether> all_;
    int count_ = 0, blocks_ = 0;
};

// launch(kernel, arguments, blocks, threads) for the count matrices from a on, in as few launches
// as their kernels and threads allow. x: their type; other: y's, or grad's if backward. False, and
// nothing launched, if no kernel has these types.
template <typename F>
bool launch_fake_quants(FakeQuant* a, int count, bool backward, Float x, Float other, F& launch) {
    std::vector<Served> served;
    for (int i = 0; i < count; i++) served.push_back(served_by(a[i], backward, x, other));
    Together together;
    for (int i = 0; i < count; i++) {
        const Served s = served[i];
        if (s.together == nullptr) return false;
        if (s.blocks == 0) continue;  // it went with one before
        for (int j = i; j < count; j++) {
            if (served[j].together != s.together || served[j].threads != s.threads) continue;
            if (together.add(a[j], served[j].blocks)) served[j].blocks = 0;
        }
        together.send(s, launch);
    }
    const Served total = {fake_quant_total<1>, fake_quant_total<kTogether>, 1, 32 * kTeamWarps};
    for (int i = 0; backward && i < count; i++) {
        if (!a[i].per_tensor || together.add(a[i], 1)) continue;
        together.send(total, launch);
        together.add(a[i], 1);
    }
    together.send(total, launch);
    return true;
}

}  // namespace dqw
