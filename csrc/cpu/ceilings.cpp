// The ceilings that `python -m bench` measures its kernels against, on the tier in use.
//
//   operations = ceiling_multiply(kind, parts, rounds)   kind: float32, bfloat16 or int8
//   bytes      = ceiling_read(x, parts, rounds)          all of x, `rounds` times
//
// Both work on `parts` threads and return what they did; 0 says that the tier has no such
// instruction. The caller holds the clock.

#include "tensors.h"

namespace dqw {
namespace {

struct alignas(64) Sink {
    char bytes[64];
};

int64_t ceiling_multiply(std::string kind, int64_t parts, int64_t rounds) {
    const CeilingKernels& k = *tier().ceilings;
    int64_t (*run)(int64_t, void*) = nullptr;
    if (kind == "float32") run = k.multiply_float;
    if (kind == "int8") run = k.multiply_int8;
    if (kind == "bfloat16") run = k.multiply_bf16;
    if (run == nullptr) return 0;
    std::vector<int64_t> done(parts);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; part++) {
            Sink sink;
            done[part] = run(rounds, &sink);
        }
    });
    int64_t total = 0;
    for (const int64_t n : done) total += n;
    return total;
}

int64_t ceiling_read(const Tensor& x_, int64_t parts, int64_t rounds) {
    DQW_CHECK(x_.is_cpu() && parts > 0, "memory of the CPU is read in one part or more");
    const Tensor x = dense(x_);
    const uint8_t* data = static_cast<const uint8_t*>(x.const_data_ptr());
    const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
    const int64_t share = bytes / parts / 256 * 256;
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; part++) {
            Sink sink;
            for (int64_t r = 0; r < rounds; r++) {
                tier().ceilings->read(data + part * share, share, &sink);
                asm volatile("" : : "r"(&sink) : "memory");
            }
        }
    });
    return share * parts * rounds;
}

}  // namespace
}  // namespace dqw

STABLE_TORCH_LIBRARY_FRAGMENT(dqw_cpu, m) {
    m.def("ceiling_multiply(str kind, int parts, int rounds) -> int");
    m.def("ceiling_read(Tensor x, int parts, int rounds) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(dqw_cpu, CompositeExplicitAutograd, m) {
    m.impl("ceiling_multiply", TORCH_BOX(&dqw::ceiling_multiply));
    m.impl("ceiling_read", TORCH_BOX(&dqw::ceiling_read));
}
