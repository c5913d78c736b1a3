// Between torch's tensors and the kernels' plain pointers. Only for files built without special
// flags (see kernels.h). PyTorch's stable ABI: no torch class crosses the library's border.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
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

// Rows of x in a register block of the gemm, all of one size: 16 rows are 8 + 8, not 12 + 4.
inline int64_t rows_of_block(const Linear& a, bool int8, const LinearKernels& k) {
    const int64_t most = !int8       ? k.float_block_rows
                         : a.w.group ? k.group_block_rows
                                     : k.int8_block_rows;
    const int64_t each = most / std::max(a.planes, 1), blocks = (a.m + each - 1) / each;
    return (a.m + blocks - 1) / blocks;
}

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

// What is too large for malloc to keep comes new from the system, a page fault for every 4 KiB:
// three times as slow as writing it. Pages of 2 MiB take that away where the system has them, and
// read 1.1 to 1.4 times as fast: the cross-attention cache of a clip is 18 MiB a token.
inline void use_large_pages(void* data, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t page = 1 << 21;
    if (bytes < 4 * static_cast<int64_t>(page)) return;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// With DQW_POISON set, memory that nothing has written shows: as floats it is NaN. For the tests.
inline void poison(void* data, size_t bytes) {
    static const bool wanted = std::getenv("DQW_POISON") != nullptr;
    if (wanted && bytes > 0) std::memset(data, 0xff, bytes);
}

// An empty, contiguous CPU tensor, without the dispatcher's 0.7 microseconds.
inline Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType type) {
    std::vector<int64_t> strides(sizes.size());
    int64_t step = 1;
    for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(sizes[i], 1)) {
        strides[i] = step;
    }
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
        static_cast<int32_t>(type), aoti_torch_device_type_cpu(), 0, &handle));
    Tensor t(handle);
    const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
    use_large_pages(t.mutable_data_ptr(), bytes);
    poison(t.mutable_data_ptr(), static_cast<size_t>(bytes));
    return t;
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
        use_large_pages(buffer.data, static_cast<int64_t>(buffer.size));
    }
    poison(buffer.data, bytes);
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
