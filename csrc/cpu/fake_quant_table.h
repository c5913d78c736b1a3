// One tier's fake quantization kernels as a table of functions: types and lookups resolved.
#pragma once

namespace dqw {
namespace {

void run_forward(const FakeQuant& a, int64_t r0, int64_t r1) {
    with_type(a.type, [&]<Type T>() {
        with_lookup(a.grid, [&](auto level) { forward<T>(a, level, r0, r1); });
    });
}
void run_backward(const FakeQuant& a, int64_t r0, int64_t r1) {
    with_type(a.type, [&]<Type T>() {
        with_lookup(a.grid, [&](auto level) { backward<T>(a, level, r0, r1); });
    });
}
void run_quantize(const FakeQuant& a, int64_t r0, int64_t r1) {
    with_type(a.type, [&]<Type T>() {
        with_lookup(a.grid, [&](auto level) { quantize<T>(a, level, r0, r1); });
    });
}
void run_activation(const FakeQuant& a, int64_t r0, int64_t r1) {
    with_type(a.type, [&]<Type T>() { activation<T>(a, r0, r1); });
}
void run_columns(const Columns& a, int64_t r0, int64_t r1) {
    with_lookup(a.grid, [&](auto level) { round_columns(a, level, r0, r1); });
}

constexpr FakeQuantKernels kFakeQuantKernels = {run_forward, run_backward, run_quantize,
                                                run_activation, run_columns};

}  // namespace
}  // namespace dqw
