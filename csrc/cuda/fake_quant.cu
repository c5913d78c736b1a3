// dqw::fake_quant_clip and dqw::fake_quant_clip_backward on CUDA tensors; dqw/reference.py has what
// they compute, fake_quant.h how.
//
//   y = fake_quant_clip(x (rows, cols), clip, bucket, window, group_size, dtype)
//   dx, dclip = fake_quant_clip_backward(grad, x, clip, bucket, window, group_size, gradient_scale)
//
// and the same of lists of matrices, fake_quant_clips and fake_quant_clips_backward: one launch for
// all that have a kernel and a number of threads in common (a clip for a whole tensor: two
// backward), and no Python between the caller and it, as a training step waits for its host.
// Nothing here waits for the GPU, so graphs capture it.
//
//   y = fake_quant_activation(x (..., cols))        see fake_quant_rows.h

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

#include "fake_quant_rows.h"
#include "launched.h"

namespace dqw {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

// Contiguous, of the sizes and on the device of `like`: straight from the allocator, as asking
// through the dispatcher takes as long as a launch.
Tensor empty(const Tensor& like, ScalarType type) {
    const std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
        aoti_torch_device_type_cuda(), like.get_device_index(), &made));
    return Tensor(made);
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
    DQW_CHECK(!window || (float_of(window->scalar_type()) && window->numel() == 2),
              "window must be two floats: the smallest and the largest scale");
    const auto here = x.get_device_index();
    DQW_CHECK(clip.get_device_index() == here && bucket.get_device_index() == here &&
                  (!window || window->get_device_index() == here),
              "clip, bucket and window must be on the device of x: move the model to it");
    Inputs in = {dense(x), dense(clip), dense(bucket), std::nullopt};
    if (window) in.window = dense(as(*window, ScalarType::Float));  // after model.half()
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

// Launches kernels on a device's current stream, and keeps the first error.
class Launcher {
  public:
    explicit Launcher(int32_t device) {
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
        stream_ = static_cast<cudaStream_t>(stream);
    }
    template <typename Kernel, typename Arguments>
    void operator()(Kernel kernel, const Arguments& arguments, int blocks, int threads) {
        cudaLaunchConfig_t config = {};
        config.gridDim = blocks;
        config.blockDim = threads;
        config.stream = stream_;
        const cudaError_t found = cudaLaunchKernelEx(&config, kernel, arguments);
        if (found != cudaSuccess) cudaGetLastError();  // said here, not of torch's next kernel
        if (error_ == cudaSuccess) error_ = found;
    }
    void check(const char* who) const { check_launch(error_, who); }

  private:
    cudaStream_t stream_ = nullptr;
    cudaError_t error_ = cudaSuccess;
};

// Launches what was asked for, of one device and one pair of types; then it is done.
struct Batch {
    bool backward;
    ScalarType x, other;  // other: y's type, or grad's
    int32_t device;
    std::vector<FakeQuant> asked;

    void run() {
        if (asked.empty()) return;
        const torch::stable::accelerator::DeviceGuard guard(device);
        Launcher launch(device);
        const bool served = launch_fake_quants(asked.data(), static_cast<int>(asked.size()),
                                               backward, *float_of(x), *float_of(other), launch);
        asked.clear();
        DQW_CHECK(served, "no kernel for these types");
        launch.check("dqw::fake_quant_clip");
    }
    // Asks for one more, after those before if they are of another kind.
    void add(const FakeQuant& a, ScalarType x_type, ScalarType other_type, int32_t on) {
        if (x_type != x || other_type != other || on != device) run();
        x = x_type, other = other_type, device = on;
        asked.push_back(a);
    }
};

using Tensors = std::vector<Tensor>;
using Windows = std::vector<std::optional<Tensor>>;

// Matrices without groups have no window.
Windows used(const Tensors& window, const std::vector<int64_t>& group) {
    DQW_CHECK(window.size() == group.size(), "each matrix takes a window and a group size");
    Windows found;
    for (size_t i = 0; i < window.size(); i++) {
        found.push_back(group[i] ? std::make_optional(window[i]) : std::nullopt);
    }
    return found;
}

Tensors forward(const Tensors& x, const Tensors& clip, const Tensors& bucket, const Windows& window,
                const std::vector<int64_t>& group, ScalarType dtype) {
    const size_t count = x.size();
    DQW_CHECK(clip.size() == count && bucket.size() == count && window.size() == count &&
                  group.size() == count,
              "each matrix takes a clip, a bucket, a window and a group size");
    std::vector<Inputs> inputs;  // alive until the launch: copies among them are not the caller's
    Tensors ys;
    Batch batch = {};
    for (size_t i = 0; i < count; i++) {
        inputs.push_back(checked(x[i], clip[i], bucket[i], window[i], group[i]));
        // Other than float32 is rounded twice: to x's dtype, and to the one asked for.
        const ScalarType type = x[i].scalar_type();
        const ScalarType written = type == ScalarType::Float && float_of(dtype) ? dtype : type;
        ys.push_back(empty(x[i], written));
        if (ys[i].numel() == 0) continue;
        batch.add(problem(inputs[i], group[i], ys[i]), type, written, x[i].get_device_index());
    }
    batch.run();
    for (Tensor& y : ys) y = as(y, dtype);
    return ys;
}

Tensors backward(const Tensors& grad, const Tensors& x, const Tensors& clip, const Tensors& bucket,
                 const Windows& window, const std::vector<int64_t>& group,
                 const std::vector<double>& gradient_scale) {
    const size_t count = x.size();
    DQW_CHECK(grad.size() == count && clip.size() == count && bucket.size() == count &&
                  window.size() == count && group.size() == count && gradient_scale.size() == count,
              "each matrix takes a gradient, a clip, a bucket, a window, a group size and a scale");
    std::vector<Inputs> inputs;
    Tensors found, dclips, kept;
    Batch batch = {.backward = true};
    for (size_t i = 0; i < count; i++) {
        inputs.push_back(checked(x[i], clip[i], bucket[i], window[i], group[i]));
        DQW_CHECK(grad[i].dim() == 2 && grad[i].size(0) == x[i].size(0) &&
                      grad[i].size(1) == x[i].size(1) &&
                      grad[i].get_device_index() == x[i].get_device_index(),
                  "grad must have the shape of x, on its device");
        // To x's dtype first; the kernel's own widening to float32 is exact.
        const ScalarType type = x[i].scalar_type();
        const bool widened = type == ScalarType::Float && float_of(grad[i].scalar_type());
        kept.push_back(dense(widened ? grad[i] : as(grad[i], type)));
        const Tensor g = kept.back();
        found.push_back(empty(x[i], type));
        if (x[i].numel() == 0) {
            dclips.push_back(torch::stable::new_zeros(clip[i], clip[i].sizes()));
            continue;
        }
        dclips.push_back(empty(clip[i], ScalarType::Float));
        FakeQuant a = problem(inputs[i], group[i], found[i]);
        a.grad = g.const_data_ptr();
        a.dclip = static_cast<float*>(dclips[i].mutable_data_ptr());
        a.factor =
            static_cast<float>(gradient_scale[i] / static_cast<double>(bucket[i].numel() / 2));
        if (a.per_tensor) {
            kept.push_back(torch::stable::new_empty(clip[i], std::vector<int64_t>{x[i].size(0)}));
            a.sums = static_cast<float*>(kept.back().mutable_data_ptr());
        }
        batch.add(a, type, g.scalar_type(), x[i].get_device_index());
    }
    batch.run();
    found.insert(found.end(), dclips.begin(), dclips.end());
    return found;
}

Tensors fake_quant_clips(Tensors x, Tensors clip, Tensors bucket, Tensors window,
                         std::vector<int64_t> group, ScalarType dtype) {
    return forward(x, clip, bucket, used(window, group), group, dtype);
}

Tensors fake_quant_clips_backward(Tensors grad, Tensors x, Tensors clip, Tensors bucket,
                                  Tensors window, std::vector<int64_t> group,
                                  std::vector<double> gradient_scale) {
    return backward(grad, x, clip, bucket, used(window, group), group, gradient_scale);
}

Tensor fake_quant_clip(Tensor x, Tensor clip, Tensor bucket, std::optional<Tensor> window,
                       int64_t group, ScalarType dtype) {
    return forward({x}, {clip}, {bucket}, {window}, {group}, dtype)[0];
}

std::tuple<Tensor, Tensor> fake_quant_clip_backward(Tensor grad, Tensor x, Tensor clip,
                                                    Tensor bucket, std::optional<Tensor> window,
                                                    int64_t group, double gradient_scale) {
    const Tensors found =
        backward({grad}, {x}, {clip}, {bucket}, {window}, {group}, {gradient_scale});
    return {found[0], found[1]};
}

Tensor fake_quant_activation(Tensor x) {
    DQW_CHECK(x.dim() >= 1, "x must have at least one dimension");
    if (x.scalar_type() == ScalarType::Double) {  // computed in float32, as on a CPU
        return as(fake_quant_activation(as(x, ScalarType::Float)), ScalarType::Double);
    }
    const auto type = float_of(x.scalar_type());
    DQW_CHECK(type, "x must be float32, float16 or bfloat16");
    const Tensor in = dense(x), y = empty(x, x.scalar_type());
    const int64_t cols = x.size(x.dim() - 1);
    if (x.numel() == 0) return y;
    DQW_CHECK(cols <= std::numeric_limits<int>::max() &&
                  x.numel() / cols <= std::numeric_limits<int>::max(),
              "x is too large");
    Activation a = {};
    a.x = in.const_data_ptr();
    a.y = y.mutable_data_ptr();
    a.rows = x.numel() / cols;
    a.cols = static_cast<int>(cols);
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    Launcher launch(x.get_device_index());
    launch_fake_quant_rows(a, *type, launch);
    launch.check("dqw::fake_quant_activation");
    return y;
}

}  // namespace
}  // namespace dqw

STABLE_TORCH_LIBRARY_IMPL(dqw, CUDA, m) {
    m.impl("fake_quant_clip", TORCH_BOX(&dqw::fake_quant_clip));
    m.impl("fake_quant_clip_backward", TORCH_BOX(&dqw::fake_quant_clip_backward));
    m.impl("fake_quant_activation", TORCH_BOX(&dqw::fake_quant_activation));
    m.impl("fake_quant_clips", TORCH_BOX(&dqw::fake_quant_clips));
    m.impl("fake_quant_clips_backward", TORCH_BOX(&dqw::fake_quant_clips_backward));
}
