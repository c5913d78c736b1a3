// What became of a launch, for both files of operators.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#define DQW_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

namespace dqw {

// Raises where `error`, of a launch for the operator `who`, is one.
inline void check_launch(cudaError_t error, const char* who) {
    DQW_CHECK(error != cudaErrorNoKernelImageForDevice,
              "the CUDA C++ library has no code for this GPU: install dqw again with "
              "DQW_CUDA_ARCHS of it, or with DQW_CUDA=0");
    DQW_CHECK(error == cudaSuccess, who, ": ", cudaGetErrorString(error));
}

}  // namespace dqw
