// The registry of networks: torch.ops.dqw_cpu.network_new and network_free.

#include "network.h"

#include <unordered_map>

namespace dqw {
namespace {

std::mutex mutex;
std::unordered_map<int64_t, std::shared_ptr<const Network>> networks;
int64_t last_handle = 0;

// floats: any float32 tensors (norms, positions). packed: weight, scale, levels and bias (empty for
// none) of each packed matrix; layout: its rows, cols, bits, group_size and whether its activations
// are int8. The tensors' memory is used as it is and kept alive until network_free.
int64_t network_new(std::vector<Tensor> floats, std::vector<Tensor> packed,
                    std::vector<int64_t> layout, int64_t heads, int64_t layers, int64_t width) {
    DQW_CHECK(layout.size() * 4 == packed.size() * 5, "five numbers for every packed matrix");
    DQW_CHECK(layers > 0, "a network has layers");
    check_heads(width, heads);
    auto made = std::make_shared<Network>();
    made->heads = heads;
    made->layers = layers;
    made->width = width;
    for (const Tensor& t : floats) {
        DQW_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous(),
                  "floats must be contiguous float32 on the CPU");
        made->kept.push_back(t);
        made->floats.push_back(static_cast<const float*>(t.const_data_ptr()));
        made->sizes.push_back(t.numel());
    }
    for (size_t i = 0; i < layout.size() / 5; i++) {
        const int64_t* n = layout.data() + 5 * i;
        const Tensor* t = packed.data() + 4 * i;
        const Tensor scale = dense(t[1]), levels = dense(t[2]);
        Weight w{};
        w.w = packed_weight(t[0], scale, levels, n[0], n[1], n[2], n[3]);
        w.int8 = n[4] != 0;
        DQW_CHECK(n[0] > 0, "weight ", i, " has no rows");
        DQW_CHECK(w.w.group % 16 == 0, "groups must be multiples of 16, not ", w.w.group);
        DQW_CHECK(n[1] <= kLongestInt8Row, "rows must be at most ", kLongestInt8Row, " long, not ",
                  n[1]);
        DQW_CHECK(w.int8 || !w.w.wide, "levels beyond int8 take int8 activations");
        DQW_CHECK(t[3].is_cpu() && t[3].scalar_type() == ScalarType::Float &&
                      t[3].is_contiguous() && (t[3].numel() == 0 || t[3].numel() == n[0]),
                  "bias must be contiguous float32 on the CPU, one a row");
        w.bias = t[3].numel() ? static_cast<const float*>(t[3].const_data_ptr()) : nullptr;
        made->weights.push_back(w);
        made->kept.insert(made->kept.end(), {t[0], scale, levels, t[3]});
    }
    const std::lock_guard<std::mutex> lock(mutex);
    networks[++last_handle] = made;
    return last_handle;
}

void network_free(int64_t handle) {
    const std::lock_guard<std::mutex> lock(mutex);
    networks.erase(handle);
}

}  // namespace

std::shared_ptr<const Network> network(int64_t handle) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = networks.find(handle);
    DQW_CHECK(found != networks.end(), "network ", handle, " was freed or never made");
    return found->second;
}

}  // namespace dqw

STABLE_TORCH_LIBRARY_FRAGMENT(dqw_cpu, m) {
    m.def(
        "network_new(Tensor[] floats, Tensor[] packed, int[] layout, int heads, int layers, "
        "int width) -> int");
    m.def("network_free(int handle) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dqw_cpu, CompositeExplicitAutograd, m) {
    m.impl("network_new", TORCH_BOX(&dqw::network_new));
    m.impl("network_free", TORCH_BOX(&dqw::network_free));
}
