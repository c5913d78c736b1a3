// csrc/cuda's kernel on CPU threads, for tests/test_cuda_host.py; built with DQW_CUDA_ON_HOST.
#include "launch.h"

// processors, clusters: as plan_of has them.
extern "C" int dqw_gemv(dqw::Gemv* a, int bits, int group, int bfloat16, int processors,
                        int clusters) {
    const int tiles = dqw::tiles_of(*a);
    const dqw::Plan plan =
        dqw::plan_of(tiles, a->blocks, dqw::most_warps(bits, dqw::x_tiles_of(a->m), group != 0),
                     processors, clusters);
    a->cluster_shift = plan.cluster_shift;
    const auto run = [&](auto kernel) {
        dqw::run_blocks(kernel, *a, tiles, 1 << plan.cluster_shift, 32 * plan.warps);
    };
    return bfloat16 ? dqw::with_kernel<__nv_bfloat16>(*a, bits, group, run)
                    : dqw::with_kernel<__half>(*a, bits, group, run);
}

// → cluster_shift * 100 + warps
extern "C" int dqw_plan(int tiles, int blocks, int most, int processors, int clusters) {
    const dqw::Plan plan = dqw::plan_of(tiles, blocks, most, processors, clusters);
    return plan.cluster_shift * 100 + plan.warps;
}

extern "C" int dqw_gemv_size() { return sizeof(dqw::Gemv); }
