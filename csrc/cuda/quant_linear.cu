// dqw_cuda::gemv: y = x W^T (+ bias, GELU) for up to 32 rows of x and up to 3 packed matrices that
// share x, columns, bits and groups: a projection, or query, key and value in one launch.
//
//   x (m, cols) float16 or bfloat16 · weights packed · scales float32 (rows, 1) or (1, 1), with
//   groups float16 (rows, groups) · levels int16 · biases in x's dtype, empty where there is none
//
// dqw/ops_cuda.py decides when this kernel serves; what it cannot do is an error here, but for
// bfloat16 with 7 and 8 bits, whose levels must be a uniform grid's: others are rounded. PyTorch's
// stable ABI: one build for every torch from 2.10 on.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <string>
#include <vector>

#include "launch.h"
#include "launched.h"

namespace dqw {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool divides(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

Plan forced = {};  // by bench/plans.py; no warps: none

void force_plan(int64_t cluster_shift, int64_t warps) {
    DQW_CHECK(cluster_shift >= 0 && 1 << cluster_shift <= kMostCluster && warps >= 0 &&
                  warps <= kMostWarps,
              "there is no such plan");
    forced = {static_cast<int>(cluster_shift), static_cast<int>(warps)};
}

struct Card {
    int processors;
    // Compiled for sm_90 or later and running there: clusters, and kernels that start before their
    // predecessor ends. Code for sm_80 runs on later cards too, but has neither.
    bool hopper;
};

Card card_of(int device) {
    constexpr int kKnown = 64;  // asking takes microseconds
    static Card known[kKnown];
    static std::atomic<bool> asked[kKnown];
    if (device < kKnown && asked[device].load(std::memory_order_acquire)) return known[device];
    Card card = {};
    int major = 0;
    cudaFuncAttributes code = {};
    cudaDeviceGetAttribute(&card.processors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (cudaFuncGetAttributes(&code, gemv<__half, 4, false, 1>) != cudaSuccess) {
        cudaGetLastError();  // no code for this card: the launch will say so
    }
    card.hopper = major >= 9 && code.ptxVersion >= 90;
    if (device < kKnown) {  // two threads would write the same
        known[device] = card;
        asked[device].store(true, std::memory_order_release);
    }
    return card;
}

Matrix matrix_of(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& bias,
                 int64_t rows, int64_t bits, int64_t group, const Tensor& y) {
    const int64_t cols = x.size(1), groups = group ? (cols + group - 1) / group : 1;
    const bool per_tensor = group == 0 && scale.size(0) == 1;
    const auto here = x.get_device_index();
    DQW_CHECK(weight.get_device_index() == here && scale.get_device_index() == here &&
                  bias.get_device_index() == here,
              "weight, scale and bias must be on the device of x: move the model to it");
    DQW_CHECK(weight.scalar_type() == ScalarType::Byte && weight.is_contiguous() &&
                  weight.numel() == rows * ((cols + 63) / 64) * 8 * bits,
              "packed weight has the wrong size");
    DQW_CHECK(divides(weight.const_data_ptr(), 16), "packed weight must be aligned to 16 bytes");
    DQW_CHECK(scale.is_contiguous() && scale.dim() == 2 && scale.size(1) == groups &&
                  (scale.size(0) == rows || per_tensor),
              "scale has the wrong shape");
    DQW_CHECK(scale.scalar_type() == (group ? ScalarType::Half : ScalarType::Float),
              "scale must be float32, or float16 with groups");
    const bool has_bias = bias.numel() != 0;
    DQW_CHECK(!has_bias || (bias.numel() == rows && bias.is_contiguous() &&
                            bias.scalar_type() == x.scalar_type()),
              "bias must have an entry a row, in x's dtype");
    Matrix m = {};
    m.weight = static_cast<const uint8_t*>(weight.const_data_ptr());
    m.scale = scale.const_data_ptr();
    m.bias = has_bias ? bias.const_data_ptr() : nullptr;
    m.y = y.mutable_data_ptr();
    m.rows = static_cast<int>(rows);
    m.scale_stride = per_tensor ? 0 : static_cast<int>(groups);
    return m;
}

std::vector<Tensor> gemv_operator(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> scales,
                                  Tensor levels, std::vector<Tensor> biases,
                                  std::vector<int64_t> rows, int64_t bits, int64_t group,
                                  bool gelu) {
    const size_t count = weights.size();
    DQW_CHECK(count >= 1 && count <= kMatrices && scales.size() == count &&
                  biases.size() == count && rows.size() == count,
              "one to three matrices, each with a scale, a bias and its rows");
    DQW_CHECK(x.dim() == 2 && x.is_contiguous() && x.size(0) <= kMost, "x must have up to 32 rows");
    DQW_CHECK(levels.numel() == int64_t{1} << bits && levels.is_contiguous() &&
                  levels.scalar_type() == ScalarType::Short,
              "levels must be int16 of 2^bits entries");
    DQW_CHECK(levels.get_device_index() == x.get_device_index(),
              "levels must be on the device of x: move the model to it");
    DQW_CHECK(x.size(1) % 8 == 0 && divides(x.const_data_ptr(), 16),
              "x's columns must divide by 8, and x be aligned to 16 bytes");
    const bool bfloat16 = x.scalar_type() == ScalarType::BFloat16;
    DQW_CHECK(bfloat16 || x.scalar_type() == ScalarType::Half, "x must be float16 or bfloat16");

    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));

    Gemv a = {};
    std::vector<Tensor> ys;
    for (size_t i = 0; i < count; i++) {
        ys.push_back(torch::stable::new_empty(x, std::vector<int64_t>{x.size(0), rows[i]}));
        a.matrix[i] = matrix_of(x, weights[i], scales[i], biases[i], rows[i], bits, group, ys[i]);
    }
    a.levels = static_cast<const int16_t*>(levels.const_data_ptr());
    a.x = x.const_data_ptr();
    a.matrices = static_cast<int>(count);
    a.m = static_cast<int>(x.size(0));
    a.cols = static_cast<int>(x.size(1));
    a.blocks = (a.cols + 63) / 64;
    a.gelu = gelu;
    const int tiles = tiles_of(a);
    if (tiles == 0 || a.m == 0) return ys;

    const Card card = card_of(x.get_device_index());
    const int x_tiles = x_tiles_of(a.m);
    const int most = most_warps(static_cast<int>(bits), x_tiles, group != 0);
    const int clusters = card.hopper ? most_cluster(x_tiles) : 1;
    const Plan plan =
        forced.warps ? forced : plan_of(tiles, a.blocks, most, card.processors, clusters);
    DQW_CHECK(plan.warps <= most && 1 << plan.cluster_shift <= clusters,
              "the forced plan has more warps or blocks than this kernel and card have");
    a.cluster_shift = plan.cluster_shift;
    cudaLaunchConfig_t config = {};
    config.gridDim = tiles << plan.cluster_shift;
    config.blockDim = 32 * plan.warps;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {1u << plan.cluster_shift, 1, 1};
    config.attrs = attributes;
    config.numAttrs = !card.hopper ? 0 : plan.cluster_shift > 0 ? 2 : 1;
    cudaError_t error = cudaSuccess;
    const auto launch = [&](auto kernel) { error = cudaLaunchKernelEx(&config, kernel, a); };
    const int b = static_cast<int>(bits), g = static_cast<int>(group);
    const bool served = bfloat16 ? with_kernel<__nv_bfloat16>(a, b, g, launch)
                                 : with_kernel<__half>(a, b, g, launch);
    DQW_CHECK(served, "no kernel for ", bits, " bits in groups of ", group);
    if (error != cudaSuccess) cudaGetLastError();  // said here, not of torch's next kernel
    check_launch(error, "dqw_cuda::gemv");
    return ys;
}

}  // namespace
}  // namespace dqw

STABLE_TORCH_LIBRARY(dqw_cuda, m) {
    m.def(
        "gemv(Tensor x, Tensor[] weights, Tensor[] scales, Tensor levels, Tensor[] biases, "
        "int[] rows, int bits, int group_size, bool gelu) -> Tensor[]");
    m.def("force_plan(int cluster_shift, int warps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dqw_cuda, CompositeExplicitAutograd, m) {
    m.impl("force_plan", TORCH_BOX(&dqw::force_plan));
}

STABLE_TORCH_LIBRARY_IMPL(dqw_cuda, CUDA, m) { m.impl("gemv", TORCH_BOX(&dqw::gemv_operator)); }
