// dqw::fake_quant_clip and dqw::fake_quant_clip_backward on CUDA tensors; dqw/reference.py has what
// they compute, fake_quant.h how.
//
//   y = fake_quant_clip(x (rows, cols), clip, bucket, window, group_size, dtype)
//   dx, dclip = fake_quant_clip_backward(grad, x, clip, bucket, window, group_size, gradient_scale)
//
// and the same of a list of matrices, fake_quant_clips and fake_quant_clips_backward.
//
// One launch each (a clip for the whole tensor: two backward), and no Python between the caller and
// it: a training step waits for its host. Nothing here waits for the GPU, so graphs capture it.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "fake_quant_launch.h"

namespace dqw {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define DQW_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

std::optional<Float> float_of(ScalarType type) {
    if (type == ScalarType::Float) return Float::kFloat;
    if (type == ScalarType::Half) return Float::kHalf;
    if (type == ScalarType::BFloat16) return Float::kBFloat16;
    return std::nullopt;
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor as(const Tensor& t, ScalarType type) {
    return t.scalar_type() == type ? t : torch::stable::to(t, std::make_optional(type));
}

Tensor empty(const Tensor& like, ScalarType type) {
    return torch::stable::new_empty(like, like.sizes(), std::make_optional(type));
}

// Tensors that the kernel reads as they are.
struct Inputs {
    Tensor x, clip, bucket;
    std::optional<Tensor> window;
};

Inputs checked(const Tensor& x, const Tensor& clip, const Tensor& bucket,
               const std::optional<Tensor>& window, int64_t group) {
    DQW_CHECK(x.dim() == 2, "x must have two dimensions (rows, cols), got ", x.dim());
    DQW_CHECK(float_of(x.scalar_type()), "x must be float32, float16 or bfloat16");
    const int64_t rows = x.size(0), cols = x.size(1),
                  groups = group ? (cols + group - 1) / group : 1;
    constexpr int64_t kMost = std::numeric_limits<int>::max();
    DQW_CHECK(group >= 0 && cols <= kMost && rows * groups <= kMost, "x is too large");
    DQW_CHECK(clip.dim() == 2 && clip.scalar_type() == ScalarType::Float &&
                  clip.size(1) == groups &&
                  (clip.size(0) == rows || (group == 0 && clip.size(0) == 1)),
              "clip must be float32, (1, 1), (rows, 1) or (rows, groups)");
    DQW_CHECK(bucket.scalar_type() == ScalarType::Short && bucket.dim() == 1 &&
                  bucket.numel() % 2 == 1 && bucket.numel() > 1 && bucket.numel() <= 1 << 16,
              "bucket must be the int16 table of a grid: 2 * level_max + 1 entries");
    DQW_CHECK(!window || (window->scalar_type() == ScalarType::Float && window->numel() == 2),
              "window must be float32: the smallest and the largest scale");
    const auto here = x.get_device_index();
    DQW_CHECK(clip.get_device_index() == here && bucket.get_device_index() == here &&
                  (!window || window->get_device_index() == here),
              "clip, bucket and window must be on the device of x: move the model to it");
    Inputs in = {dense(x), dense(clip), dense(bucket), std::nullopt};
    if (window) in.window = dense(*window);
    return in;
}

FakeQuant problem(const Inputs& in, int64_t group, const Tensor& out) {
    FakeQuant a = {};
    set_sizes(a, in.x.size(0), in.x.size(1), group, in.clip.size(0), in.bucket.numel());
    a.x = in.x.const_data_ptr();
    a.clip = static_cast<const float*>(in.clip.const_data_ptr());
    a.window = in.window ? static_cast<const float*>(in.window->const_data_ptr()) : nullptr;
    a.bucket = static_cast<const int16_t*>(in.bucket.const_data_ptr());
    a.out = out.mutable_data_ptr();
    return a;
}

void run(FakeQuant& a, const Tensor& x, bool backward, ScalarType other) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    cudaError_t error = cudaSuccess;
    const auto launch = [&](auto kernel, const FakeQuant& arguments, int blocks, int threads) {
        cudaLaunchConfig_t config = {};
        config.gridDim = blocks;
        config.blockDim = threads;
        config.stream = static_cast<cudaStream_t>(stream);
        const cudaError_t found = cudaLaunchKernelEx(&config, kernel, arguments);
        if (error == cudaSuccess) error = found;
    };
    const bool served =
        launch_fake_quant(a, backward, *float_of(x.scalar_type()), *float_of(other), launch);
    DQW_CHECK(served, "no kernel for these types");
    DQW_CHECK(
        error != cudaErrorNoKernelImageForDevice,
        "the CUDA C++ library has no code for this GPU: install dqw again with DQW_CUDA_ARCHS "
        "of it, or with DQW_CUDA=0");
    DQW_CHECK(error == cudaSuccess, "dqw::fake_quant_clip: ", cudaGetErrorString(error));
}

Tensor fake_quant_clip(Tensor x, Tensor clip, Tensor bucket, std::optional<Tensor> window,
                       int64_t group, ScalarType dtype) {
    const Inputs in = checked(x, clip, bucket, window, group);
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    // Other than float32 is rounded twice: to x's dtype, and to the one asked for.
    const ScalarType type = x.scalar_type();
    const ScalarType written = type == ScalarType::Float && float_of(dtype) ? dtype : type;
    Tensor y = empty(x, written);
    if (y.numel() != 0) {
        FakeQuant a = problem(in, group, y);
        run(a, in.x, false, written);
    }
    return as(y, dtype);
}

std::tuple<Tensor, Tensor> fake_quant_clip_backward(Tensor grad, Tensor x, Tensor clip,
                                                    Tensor bucket, std::optional<Tensor> window,
                                                    int64_t group, double gradient_scale) {
    const Inputs in = checked(x, clip, bucket, window, group);
    DQW_CHECK(grad.dim() == 2 && grad.size(0) == x.size(0) && grad.size(1) == x.size(1) &&
                  grad.get_device_index() == x.get_device_index(),
              "grad must have the shape of x, on its device");
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    // To x's dtype first; the kernel's own widening to float32 is exact.
    const ScalarType type = x.scalar_type();
    const bool widened = type == ScalarType::Float && float_of(grad.scalar_type());
    const Tensor g = dense(widened ? grad : as(grad, type));
    Tensor dx = empty(x, type);
    if (dx.numel() == 0) {
        return {dx, torch::stable::new_zeros(clip, clip.sizes())};
    }
    Tensor dclip = empty(clip, ScalarType::Float);
    FakeQuant a = problem(in, group, dx);
    a.grad = g.const_data_ptr();
    a.dclip = static_cast<float*>(dclip.mutable_data_ptr());
    a.factor = static_cast<float>(gradient_scale / static_cast<double>(bucket.numel() / 2));
    std::optional<Tensor> sums;
    if (a.per_tensor) {
        sums = torch::stable::new_empty(clip, std::vector<int64_t>{x.size(0)});
        a.sums = static_cast<float*>(sums->mutable_data_ptr());
    }
    run(a, in.x, true, g.scalar_type());
    return {dx, dclip};
}

std::optional<Tensor> window_of(const Tensor& window, int64_t group) {
    return group ? std::make_optional(window) : std::nullopt;
}

std::vector<Tensor> fake_quant_clips(std::vector<Tensor> x, std::vector<Tensor> clip,
                                     std::vector<Tensor> bucket, std::vector<Tensor> window,
                                     std::vector<int64_t> group, ScalarType dtype) {
    const size_t count = x.size();
    DQW_CHECK(clip.size() == count && bucket.size() == count && window.size() == count &&
                  group.size() == count,
              "each matrix takes a clip, a bucket, a window and a group size");
    std::vector<Tensor> ys;
    ys.reserve(count);
    for (size_t i = 0; i < count; i++) {
        ys.push_back(fake_quant_clip(x[i], clip[i], bucket[i], window_of(window[i], group[i]),
                                     group[i], dtype));
    }
    return ys;
}

std::vector<Tensor> fake_quant_clips_backward(std::vector<Tensor> grad, std::vector<Tensor> x,
                                              std::vector<Tensor> clip, std::vector<Tensor> bucket,
                                              std::vector<Tensor> window,
                                              std::vector<int64_t> group,
                                              std::vector<double> gradient_scale) {
    const size_t count = x.size();
    DQW_CHECK(grad.size() == count && clip.size() == count && bucket.size() == count &&
                  window.size() == count && group.size() == count &&
                  gradient_scale.size() == count,
              "each matrix takes a gradient, a clip, a bucket, a window, a group size and a scale");
    std::vector<Tensor> found, dclips;
    found.reserve(2 * count);
    dclips.reserve(count);
    for (size_t i = 0; i < count; i++) {
        auto [dx, dclip] =
            fake_quant_clip_backward(grad[i], x[i], clip[i], bucket[i],
                                     window_of(window[i], group[i]), group[i], gradient_scale[i]);
        found.push_back(dx);
        dclips.push_back(dclip);
    }
    found.insert(found.end(), dclips.begin(), dclips.end());
    return found;
}

}  // namespace
}  // namespace dqw

STABLE_TORCH_LIBRARY_IMPL(dqw, CUDA, m) {
    m.impl("fake_quant_clip", TORCH_BOX(&dqw::fake_quant_clip));
    m.impl("fake_quant_clip_backward", TORCH_BOX(&dqw::fake_quant_clip_backward));
    m.impl("fake_quant_clips", TORCH_BOX(&dqw::fake_quant_clips));
    m.impl("fake_quant_clips_backward", TORCH_BOX(&dqw::fake_quant_clips_backward));
}
