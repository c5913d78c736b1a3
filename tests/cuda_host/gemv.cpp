// csrc/cuda's kernel on CPU threads, for tests/test_cuda_host.py; built with DQW_CUDA_ON_HOST.
#include "launch.h"

extern "C" int dqw_gemv(dqw::Gemv* a, int bits, int group, int bfloat16) {
    const auto run = [&](auto kernel, int warps) {
        dqw::run_blocks(kernel, *a, dqw::blocks_of(*a), 32 * warps);
    };
    return bfloat16 ? dqw::with_kernel<__nv_bfloat16, false>(*a, bits, group, run)
                    : dqw::with_kernel<__half, true>(*a, bits, group, run);
}

extern "C" int dqw_gemv_size() { return sizeof(dqw::Gemv); }
