// csrc/cuda's fake quantization on CPU threads, for tests/test_cuda_fake_quant_host.py; built with
// DQW_CUDA_ON_HOST.
#include "fake_quant_rows.h"

namespace {
std::vector<dqw::FakeQuant> asked;
}

// Keeps a matrix for dqw_fake_quants.
extern "C" void dqw_fake_quant_add(const void* x, const void* grad, void* out, const float* clip,
                                   const float* window, const int16_t* bucket, float* dclip,
                                   float* sums, int64_t rows, int64_t cols, int64_t group,
                                   int64_t clip_rows, int64_t entries, float factor) {
    dqw::FakeQuant a = {};
    dqw::set_sizes(a, rows, cols, group, clip_rows, entries);
    a.x = x, a.grad = grad, a.out = out, a.clip = clip, a.window = window, a.bucket = bucket;
    a.dclip = dclip, a.sums = sums, a.factor = factor;
    asked.push_back(a);
}

// Runs what was kept. type, other: as dqw::Float has them. → threads that ran, negative if
// fake_quant_groups did for the first; 0 where no kernel has the types. launches: how many it took.
extern "C" int64_t dqw_fake_quants(bool backward, int type, int other, int* launches) {
    std::vector<dqw::FakeQuant> all;
    all.swap(asked);
    int64_t ran = 0;
    *launches = 0;
    const auto run = [&](auto kernel, const auto& arguments, int blocks, int threads) {
        dqw::run_blocks(kernel, arguments, blocks, 1, threads);
        ran += blocks * threads;
        *launches += 1;
    };
    const bool served =
        dqw::launch_fake_quants(all.data(), static_cast<int>(all.size()), backward,
                                static_cast<dqw::Float>(type), static_cast<dqw::Float>(other), run);
    return !served ? 0 : all[0].shift > 0 ? -ran : ran;
}

// y = fake_quant_activation(x). → threads that ran
extern "C" int64_t dqw_fake_quant_rows(const void* x, void* y, int64_t rows, int64_t cols,
                                       int type) {
    dqw::Activation a = {x, y, rows, static_cast<int>(cols), 0, 0};
    int64_t ran = 0;
    const auto run = [&](auto kernel, const dqw::Activation& arguments, int blocks, int threads) {
        dqw::run_blocks(kernel, arguments, blocks, 1, threads);
        ran += blocks * threads;
    };
    dqw::launch_fake_quant_rows(a, static_cast<dqw::Float>(type), run);
    return ran;
}
