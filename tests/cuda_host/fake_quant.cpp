// csrc/cuda's fake quantization on CPU threads, for tests/test_cuda_fake_quant_host.py; built with
// DQW_CUDA_ON_HOST.
#include "fake_quant_launch.h"

// type, other: as dqw::Float has them. → threads that ran, negative if fake_quant_groups did; 0
// where no kernel has the types.
extern "C" int64_t dqw_fake_quant(const void* x, const void* grad, void* out, const float* clip,
                                  const float* window, const int16_t* bucket, float* dclip,
                                  float* sums, int64_t rows, int64_t cols, int64_t group,
                                  int64_t clip_rows, int64_t entries, float factor, int type,
                                  int other) {
    dqw::FakeQuant a = {};
    dqw::set_sizes(a, rows, cols, group, clip_rows, entries);
    a.x = x, a.grad = grad, a.out = out, a.clip = clip, a.window = window, a.bucket = bucket;
    a.dclip = dclip, a.sums = sums, a.factor = factor;
    int64_t ran = 0;
    const auto run = [&](auto kernel, const dqw::FakeQuant& arguments, int blocks, int threads) {
        dqw::run_blocks(kernel, arguments, blocks, 1, threads);
        ran += blocks * threads;
    };
    const bool served = dqw::launch_fake_quant(a, grad != nullptr, static_cast<dqw::Float>(type),
                                               static_cast<dqw::Float>(other), run);
    return !served ? 0 : a.shift > 0 ? -ran : ran;
}
