// Whisper's encoder as one operator: torch.ops.dqw_cpu.encoder.
//
//   floats of the network   for each layer the weights and biases of its two norms, then the last
//                           norm's, then the positions (positions, width)
//   weights                 for each layer q k v out fc1 fc2, then the two convolutions (rows of
//                           in x 3), whose steps are 1 and 2
//
// A convolution is a matrix product of neighbouring columns; attention is attention.h's.

#include "attention.h"

namespace dqw {
namespace {

constexpr int kNorms = 4, kWeights = 6;

void check_encoder(const Network& net, int64_t mels, int64_t positions) {
    const size_t last = kWeights * net.layers;
    DQW_CHECK(net.weights.size() == last + 2 &&
                  net.floats.size() == static_cast<size_t>(kNorms * net.layers + 3),
              "not an encoder's network");
    for (int64_t i = 0; i < kNorms * net.layers + 2; i++) {
        DQW_CHECK(net.sizes[i] == net.width, "norm tensor ", i, " of the encoder has ",
                  net.sizes[i], " elements, not ", net.width);
    }
    for (size_t i = 0; i < last; i++) {
        const Packed& w = net.weights[i].w;
        const bool fc1 = i % kWeights == 4, fc2 = i % kWeights == 5;
        DQW_CHECK((fc2 || w.cols == net.width) && (fc1 || w.rows == net.width), "matrix ", i,
                  " of the encoder has an unfitting shape");
        DQW_CHECK(!fc2 || w.cols == net.weights[i - 1].w.rows, "fc2 does not fit fc1");
    }
    const Packed &conv1 = net.weights[last].w, &conv2 = net.weights[last + 1].w;
    DQW_CHECK(conv1.rows == net.width && conv2.rows == net.width && conv2.cols == 3 * net.width,
              "the convolutions do not fit");
    DQW_CHECK(conv1.cols == 3 * mels, "features have ", mels, " mel bins, and conv1 takes ",
              conv1.cols / 3);
    DQW_CHECK(net.sizes.back() >= positions * net.width, "features are longer than the ",
              net.sizes.back() / net.width, " positions of the encoder");
}

struct Encoder {
    const Network& net;
    const LinearKernels& linear;
    const WhisperKernels& kernels;
    const EncoderAttention& attends;
    int64_t clips, mels, frames, positions;  // frames of the features, positions behind conv2
    const float* features;                   // (clips, mels, frames)
    float* out;                              // (clips, positions, width)

    // scratch, shared
    float *normed, *q, *k, *v, *hidden, *columns, *first, *spectra, *zeros;
    char *product_area, *packed;
    // scratch, each thread's
    char* own_area;
    size_t own_bytes, own_product_bytes;

    size_t place(Pieces& p) {
        const int64_t d = net.width;
        size_t shared = 0;
        int64_t inner = d;
        own_product_bytes = 0;
        for (size_t i = 0; i < net.weights.size(); i++) {
            const Weight& w = net.weights[i];
            const int64_t m = i + 2 == net.weights.size() ? frames : positions;
            inner = std::max(inner, i + 2 < net.weights.size() ? w.w.rows : 0);
            shared = std::max(shared, product_shared_bytes(w, m, linear));
            own_product_bytes = std::max(own_product_bytes, product_own_bytes(w, m, linear));
        }
        own_product_bytes = round_up(own_product_bytes, 64);
        const Attention attention = attention_of(nullptr, nullptr, nullptr, nullptr);
        own_bytes = own_product_bytes + attention.scratch_bytes();
        own_area = p.take<char>(own_bytes * torch::stable::get_num_threads());
        product_area = p.take<char>(shared);
        zeros = p.take<float>(std::max(d, mels));
        // The convolutions are done before the layers start: they share memory.
        Pieces convolutions = p;
        columns = convolutions.take<float>(std::max(frames * 3 * mels, positions * 3 * d));
        first = convolutions.take<float>(frames * d);
        spectra = convolutions.take<float>(frames * mels);
        normed = p.take<float>(positions * d);
        q = p.take<float>(positions * d);
        // Nothing of attention is wanted any more where fc1 writes.
        Pieces mlp = p;
        hidden = mlp.take<float>(positions * inner);
        k = p.take<float>(positions * d);
        v = p.take<float>(positions * d);
        packed = p.take<char>(attention.packed_bytes() * net.heads);
        return std::max({p.used, mlp.used, convolutions.used});
    }

    // Every position attends to every other; heads lie side by side in the rows.
    Attention attention_of(const float* q, const float* k, const float* v, char* packed) const {
        const int64_t head_dim = net.head_dim();
        return {.kernel = attends,
                .heads = net.heads,
                .queries = positions,
                .positions = positions,
                .head_dim = head_dim,
                .stride = net.width,
                .step = head_dim,
                .query_step = head_dim,
                .q = q,
                .k = k,
                .v = v,
                .packed = packed};
    }

    void operator()(Member& me) const {
        for (int64_t clip = 0; clip < clips; clip++) {
            float* x = out + clip * positions * net.width;
            char* own = own_area + me.index() * own_bytes;
            const Area area{product_area, own, own_product_bytes};
            convolve(me, area, features + clip * mels * frames, x);
            for (int64_t layer = 0; layer < net.layers; layer++) run_layer(me, area, layer, x);
            normalize(me, net.floats.data() + net.layers * kNorms, x, x);
        }
    }

    void normalize(Member& me, const float* const* norm, const float* from, float* to) const {
        const int64_t d = net.width;
        me.share(positions, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; t++) {
                kernels.layer_norm(from + t * d, norm[0], norm[1], kEpsilon, d, to + t * d);
            }
        });
        me.barrier();
    }

    // y = gelu(y), for what a product has just written of y (…, width).
    auto activate(float* y, int64_t width) const {
        return [=, this](int64_t m0, int64_t m1, int64_t begin, int64_t end) {
            for (int64_t t = m0; t < m1; t++) kernels.gelu(y + t * width + begin, end - begin);
        };
    }

    // columns (rows, width x 3): of each row t the rows step t - 1 … step t + 1 of x (frames,
    // width), side by side, zeros outside.
    void gather(Member& me, const float* x, int64_t width, int64_t rows, int64_t step) const {
        me.share(rows, [&](int64_t begin, int64_t end) {
            const auto row = [&](int64_t t) {
                return t >= 0 && t < frames ? x + t * width : zeros;
            };
            for (int64_t t = begin; t < end; t++) {
                kernels.interleave(row(step * t - 1), row(step * t), row(step * t + 1), width,
                                   columns + t * width * 3);
            }
        });
        me.barrier();
    }

    void convolve(Member& me, const Area& area, const float* mel, float* x) const {
        const int64_t d = net.width;
        const Weight* conv = net.weights.data() + net.weights.size() - 2;
        me.share(frames, [&](int64_t begin, int64_t end) {
            for (int64_t some = begin; some < end; some += 16) {  // rows that stay in the cache
                for (int64_t c = 0; c < mels; c++) {
                    for (int64_t t = some; t < std::min(some + 16, end); t++) {
                        spectra[t * mels + c] = mel[c * frames + t];
                    }
                }
            }
        });
        me.barrier();
        gather(me, spectra, mels, frames, 1);
        product(me, conv[0], linear, area, columns, frames, first, activate(first, d));
        me.barrier();
        gather(me, first, d, positions, 2);
        const float* table = net.floats.back();
        product(me, conv[1], linear, area, columns, positions, x,
                [&](int64_t m0, int64_t m1, int64_t begin, int64_t end) {
                    for (int64_t t = m0; t < m1; t++) {
                        kernels.gelu(x + t * d + begin, end - begin);
                        kernels.add(x + t * d + begin, table + t * d + begin, end - begin);
                    }
                });
        me.barrier();
    }

    void run_layer(Member& me, const Area& area, int64_t layer, float* x) const {
        const int64_t d = net.width;
        const Weight* w = net.weights.data() + layer * kWeights;
        const float* const* norm = net.floats.data() + layer * kNorms;
        const auto nothing = [](int64_t, int64_t, int64_t, int64_t) {};
        const float scale = 1.0f / std::sqrt(static_cast<float>(net.head_dim()));

        normalize(me, norm, x, normed);
        product(me, w[0], linear, area, normed, positions, q,
                [&](int64_t m0, int64_t m1, int64_t begin, int64_t end) {
                    for (int64_t t = m0; t < m1; t++) {
                        for (int64_t i = begin; i < end; i++) q[t * d + i] *= scale;
                    }
                });
        product(me, w[1], linear, area, normed, positions, k, nothing);
        product(me, w[2], linear, area, normed, positions, v, nothing);
        me.barrier();
        attention_of(q, k, v, packed)(me, area.own + area.own_bytes, normed);
        me.barrier();

        float* y = q;
        const auto residual = [&](int64_t m0, int64_t m1, int64_t begin, int64_t end) {
            for (int64_t t = m0; t < m1; t++) {
                kernels.add(x + t * d + begin, y + t * d + begin, end - begin);
            }
        };
        product(me, w[3], linear, area, normed, positions, y, residual);
        me.barrier();
        normalize(me, norm + 2, x, normed);
        const int64_t inner = w[4].w.rows;
        product(me, w[4], linear, area, normed, positions, hidden, activate(hidden, inner));
        me.barrier();
        product(me, w[5], linear, area, hidden, positions, y, residual);
        me.barrier();
    }
};

// features (clips, mels, frames) float32, frames even → states (clips, frames / 2, width). bf16:
// products may be of bfloat16, where that is faster.
Tensor encoder(int64_t handle, const Tensor& features_, bool bf16) {
    const std::shared_ptr<const Network> net = network(handle);
    const Tensor features = as_float(features_);
    DQW_CHECK(features.dim() == 3 && features.size(2) % 2 == 0,
              "features must be (clips, mel bins, frames), with an even number of frames");
    const Tier& t = tier(bf16);
    Encoder e{*net, *t.linear, *t.whisper, *t.attention};
    e.clips = features.size(0);
    e.mels = features.size(1);
    e.frames = features.size(2);
    e.positions = e.frames / 2;
    check_encoder(*net, e.mels, e.positions);
    Tensor out = new_tensor({e.clips, e.positions, net->width}, ScalarType::Float);
    if (out.numel() == 0) return out;
    e.features = static_cast<const float*>(features.const_data_ptr());
    e.out = static_cast<float*>(out.mutable_data_ptr());
    Pieces count{nullptr};
    Pieces memory{static_cast<char*>(scratch<2>(e.place(count)))};
    e.place(memory);
    std::fill(e.zeros, e.zeros + std::max(net->width, e.mels), 0.0f);
    run_team(torch::stable::get_num_threads(), e);
    return out;
}

}  // namespace
}  // namespace dqw

STABLE_TORCH_LIBRARY_FRAGMENT(dqw_cpu, m) {
    m.def("encoder(int network, Tensor features, bool bf16=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dqw_cpu, CPU, m) { m.impl("encoder", TORCH_BOX(&dqw::encoder)); }
