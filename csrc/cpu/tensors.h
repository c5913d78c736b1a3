// Between torch's tensors and the kernels' plain pointers. Only for files built without special
// flags (see kernels.h). PyTorch's stable ABI: no torch class crosses the library's border.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace dqw {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define DQW_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

inline Tensor dense(const Tensor& t) {
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor as_float(const Tensor& t) {
    return dense(t.scalar_type() == ScalarType::Float
                     ? t
                     : torch::stable::to(t, std::make_optional(ScalarType::Float)));
}

inline Type type_of(const Tensor& t, const char* name) {
    switch (t.scalar_type()) {
        case ScalarType::Float:
            return Type::f32;
        case ScalarType::Half:
            return Type::f16;
        case ScalarType::BFloat16:
            return Type::bf16;
        default:
            break;
    }
    DQW_CHECK(false, name, " must be float32, float16 or bfloat16");
    return Type::f32;
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
    return torch::stable::new_empty(like, sizes, std::make_optional(type));
}

// Memory that each thread keeps between calls, aligned to a cache line: a kernel call allocates
// nothing, and pages are touched once. `slot` tells apart what one call needs at the same time.
template <int slot>
void* scratch(size_t bytes) {
    struct Buffer {
        void* data = nullptr;
        size_t size = 0;
        ~Buffer() { std::free(data); }
    };
    thread_local Buffer buffer;
    if (buffer.size < bytes) {
        std::free(buffer.data);
        buffer.size = (bytes + 4095) / 4096 * 4096;
        buffer.data = std::aligned_alloc(64, buffer.size);
        if (buffer.data == nullptr) {
            buffer.size = 0;
            throw std::bad_alloc();
        }
    }
    return buffer.data;
}

// A scale must be (1, 1), (rows, 1) or (rows, groups); → the step from row to row.
inline int64_t scale_stride(const Tensor& scale, int64_t rows, int64_t cols, int64_t group) {
    const int64_t groups = group > 0 ? (cols + group - 1) / group : 1;
    DQW_CHECK(group >= 0, "group_size must be 0 (no groups) or positive, got ", group);
    DQW_CHECK(scale.dim() == 2 && scale.size(1) == groups &&
                  (scale.size(0) == rows || (group == 0 && scale.size(0) == 1)),
              "scale must have shape (1, 1), (", rows, ", 1) or, with groups, (", rows,
              ", ceil(cols / group_size))");
    return group == 0 && scale.size(0) == 1 ? 0 : groups;
}

// Checked view of a packed weight. `scale` and `levels` must be contiguous and stay alive.
Packed packed_weight(const Tensor& weight, const Tensor& scale, const Tensor& levels, int64_t rows,
                     int64_t cols, int64_t bits, int64_t group_size);

}  // namespace dqw
