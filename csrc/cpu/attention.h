// Attention without a mask, by the threads of a team: one block of queries of one head at a time,
// with the tier's own kernel (EncoderAttention).
#pragma once

#include <algorithm>

#include "network.h"

namespace dqw {

struct Attention {
    const EncoderAttention& kernel;
    int64_t heads, queries, positions, head_dim;
    int64_t stride;            // from row to row of q, k, v and out
    int64_t step, query_step;  // from head to head: of k and v; of q and out
    const float *q, *k, *v;    // q scaled; heads of `queries`, `positions` and `positions` rows
    char* packed = nullptr;    // packed_bytes() a head

    int64_t packed_bytes() const { return round_up(kernel.packed_bytes(positions, head_dim), 64); }
    int64_t scratch_bytes() const {
        return round_up(kernel.scratch_bytes(positions, head_dim), 64);
    }

    // scratch: scratch_bytes() of each thread. q, k and v must be written by all (a barrier)
    // before, out is after the next barrier.
    void operator()(Member& me, char* scratch, float* out) const {
        const auto head_of = [&](int64_t i) {
            return EncoderHead{
                q + i * query_step,         k + i * step, v + i * step, stride, positions, head_dim,
                packed + i * packed_bytes()};
        };
        me.share(heads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) kernel.pack(head_of(i));
        });
        me.barrier();
        const int64_t rows = kernel.rows, blocks = (queries + rows - 1) / rows;
        me.share(heads * blocks, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                const int64_t t = i % blocks * rows, head = i / blocks;
                kernel.attend(head_of(head), t, std::min(t + rows, queries), scratch,
                              out + head * query_step);
            }
        });
    }
};

}  // namespace dqw
