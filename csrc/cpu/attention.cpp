// Attention without a mask as an operator: torch.ops.dqw_cpu.attention, for models whose
// layers run one by one (dqw/attention.py). The encoder's own is encoder.cpp's.

#include "attention.h"

namespace dqw {
namespace {

// q (heads…, queries, head_dim), scaled; k and v (heads…, positions, head_dim) → softmax(q kT) v,
// float32, of q's shape. bf16: products may be of bfloat16, where that is faster.
Tensor attention(const Tensor& q_, const Tensor& k_, const Tensor& v_, bool bf16) {
    const Tensor q = as_float(q_), k = as_float(k_), v = as_float(v_);
    const int64_t dims = q.dim();
    DQW_CHECK(dims >= 2, "q must be (heads, queries, head_dim)");
    const int64_t queries = q.size(dims - 2), head_dim = q.size(dims - 1);
    check_heads(head_dim, 1);
    std::vector<int64_t> sizes;
    int64_t heads = 1;
    for (const Tensor& t : {k, v}) {
        bool fits = t.dim() == dims && t.size(dims - 1) == head_dim &&
                    t.size(dims - 2) == k.size(dims - 2) && t.size(dims - 2) > 0;
        for (int64_t i = 0; fits && i < dims - 2; i++) fits = t.size(i) == q.size(i);
        DQW_CHECK(fits, "k and v must have the heads and the width of q, and one position or more");
    }
    for (int64_t i = 0; i < dims; i++) {
        sizes.push_back(q.size(i));
        if (i < dims - 2) heads *= q.size(i);
    }
    Tensor out = new_tensor(sizes, ScalarType::Float);
    if (out.numel() == 0) return out;
    const int64_t positions = k.size(dims - 2);
    const auto data = [](const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); };
    Attention a{.kernel = *tier(bf16).attention,
                .heads = heads,
                .queries = queries,
                .positions = positions,
                .head_dim = head_dim,
                .stride = head_dim,
                .step = positions * head_dim,
                .query_step = queries * head_dim,
                .q = data(q),
                .k = data(k),
                .v = data(v)};
    const int64_t slots = torch::stable::get_num_threads();
    const int64_t packed = heads * a.packed_bytes(), own = a.scratch_bytes();
    a.packed = static_cast<char*>(scratch<2>(packed + slots * own));
    float* to = static_cast<float*>(out.mutable_data_ptr());
    run_team(slots, [&](Member& me) { a(me, a.packed + packed + me.index() * own, to); });
    return out;
}

}  // namespace
}  // namespace dqw

STABLE_TORCH_LIBRARY_FRAGMENT(dqw_cpu, m) {
    m.def("attention(Tensor q, Tensor k, Tensor v, bool bf16=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dqw_cpu, CPU, m) { m.impl("attention", TORCH_BOX(&dqw::attention)); }
