// Whisper's decoder as one operator a step: torch.ops.dqw_cpu.decoder_step and decoder_cross.
//
// A step takes rows, each a token of some sequence at some position, and gives the logits of those
// that are wanted. One row of each sequence is decoding; all tokens of a prompt at once are rows
// like any other, since every row's keys and values are in the cache before any row attends.
//
//   floats of the network   for each layer the weights and biases of its three norms, then the last
//                           norm's, then the positions (positions, width)
//   weights                 for each layer q k v out · cross q k v out · fc1 fc2, then the
//   embedding

#include "network.h"

namespace dqw {
namespace {

constexpr int kNorms = 6, kWeights = 10;
constexpr int64_t kFewRows = 4;  // so many every thread normalizes for itself, without a barrier

int64_t padded_positions(int64_t positions) { return round_up(positions, 16); }

template <class T>
const T* integers(const Tensor& t, ScalarType type, int64_t count, const char* name) {
    DQW_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == count, name,
              " must be contiguous, of the schema's type, with ", count, " entries");
    return static_cast<const T*>(t.const_data_ptr());
}

CrossType cross_type(int64_t type) {
    DQW_CHECK(type >= 0 && type <= 2, "the cross-attention cache is 0 int8, 1 bfloat16, 2 float32");
    return static_cast<CrossType>(type);
}

void check_decoder(const Network& net) {
    DQW_CHECK(net.weights.size() == static_cast<size_t>(kWeights * net.layers + 1) &&
                  net.floats.size() == static_cast<size_t>(kNorms * net.layers + 3),
              "not a decoder's network");
    for (size_t i = 0; i < net.weights.size(); i++) {
        const Packed& w = net.weights[i].w;
        const bool last = i + 1 == net.weights.size(), fc1 = i % kWeights == 8 && !last;
        const bool fc2 = i % kWeights == 9 && !last;
        DQW_CHECK((fc2 || w.cols == net.width) && (fc1 || last || w.rows == net.width), "matrix ",
                  i, " of the decoder has an unfitting shape");
        DQW_CHECK(!fc2 || w.cols == net.weights[i - 1].w.rows, "fc2 does not fit fc1");
    }
    for (int64_t i = 0; i < kNorms * net.layers + 2; i++) {
        DQW_CHECK(net.sizes[i] == net.width, "norm ", i, " of the decoder has an unfitting size");
    }
}

struct Step {
    const Network& net;
    const LinearKernels& linear;
    const WhisperKernels& kernels;
    int64_t rows, wanted;        // tokens, and those whose logits are wanted
    const int64_t* ids;          // (rows)
    const int32_t* positions;    // (rows)
    const int32_t* clips;        // (rows): whose audio
    const int32_t* sources;      // (rows, longest): the cache's row of each token up to this one
    const int32_t* wanted_rows;  // (wanted)
    int64_t longest, slots;
    float* cache;    // (layers, 2, slots, longest, width)
    uint8_t* cross;  // (clips, layers, heads, head bytes)
    CrossHead head;  // without data
    float* logits;   // (wanted, vocabulary)

    // scratch, shared
    float *x, *normed, *q, *k, *v, *context, *y, *hidden;
    char* product_area;
    // scratch, each thread's
    char* own_area;
    size_t own_bytes, own_product_bytes;

    size_t place(Pieces& p) {
        const int64_t d = net.width;
        int64_t widest = 0;
        size_t shared = 0;
        own_product_bytes = 0;
        for (size_t i = 0; i < net.weights.size(); i++) {
            const Weight& w = net.weights[i];
            const int64_t m = i + 1 == net.weights.size() ? wanted : rows;
            if (i + 1 < net.weights.size()) widest = std::max(widest, w.w.rows);
            shared = std::max(shared, product_shared_bytes(w, m, linear));
            own_product_bytes = std::max(own_product_bytes, product_own_bytes(w, m, linear));
        }
        own_product_bytes = round_up(own_product_bytes, 64);
        x = p.take<float>(rows * d);
        normed = p.take<float>(rows * d);
        q = p.take<float>(rows * d);
        k = p.take<float>(rows * d);
        v = p.take<float>(rows * d);
        context = p.take<float>(rows * d);
        y = p.take<float>(rows * d);
        hidden = p.take<float>(rows * widest);
        product_area = p.take<char>(shared);
        const int64_t scores = std::max(head.padded, round_up(longest, 16));
        own_bytes = own_product_bytes + round_up(kFewRows * d * 4, 64) + scores * 4 +
                    round_up(2 * (head.padded + head.head_dim), 64);
        own_area = p.take<char>(own_bytes * torch::stable::get_num_threads());
        return p.used;
    }

    void operator()(Member& me) const {
        const int64_t d = net.width;
        char* own = own_area + me.index() * own_bytes;
        const Area area{product_area, own, own_product_bytes};
        float* few = reinterpret_cast<float*>(own + own_product_bytes);
        float* scores = few + round_up(kFewRows * d, 16);
        int8_t* bytes =
            reinterpret_cast<int8_t*>(scores + std::max(head.padded, round_up(longest, 16)));
        const Weight& embedding = net.weights.back();
        const float* table = net.floats.back();

        me.share(rows, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; r++) {
                linear.dequantize(embedding.w, ids[r], x + r * d);
                kernels.add(x + r * d, table + positions[r] * d, d);
            }
        });
        me.barrier();
        for (int64_t layer = 0; layer < net.layers; layer++) {
            const Weight* w = net.weights.data() + layer * kWeights;
            const float* const* norm = net.floats.data() + layer * kNorms;
            const auto residual = [&](int64_t m0, int64_t m1, int64_t begin, int64_t end) {
                for (int64_t r = m0; r < m1; r++) {
                    kernels.add(x + r * d + begin, y + r * d + begin, end - begin);
                }
            };
            const float scale = 1.0f / std::sqrt(static_cast<float>(net.head_dim()));
            const auto scaled = [&](int64_t m0, int64_t m1, int64_t begin, int64_t end) {
                for (int64_t r = m0; r < m1; r++) {
                    for (int64_t i = begin; i < end; i++) q[r * d + i] *= scale;
                }
            };

            const float* h = normalize(me, norm, few);
            product(me, w[0], linear, area, h, rows, q, scaled);
            float* keys = cache + (2 * layer) * slots * longest * d;
            float* values = keys + slots * longest * d;
            const auto keep = [&](const float* from, float* to) {
                return [=, this](int64_t m0, int64_t m1, int64_t begin, int64_t end) {
                    for (int64_t r = m0; r < m1; r++) {
                        const int64_t t = positions[r], slot = sources[r * longest + t];
                        std::copy(from + r * d + begin, from + r * d + end,
                                  to + (slot * longest + t) * d + begin);
                    }
                };
            };
            product(me, w[1], linear, area, h, rows, k, keep(k, keys));
            product(me, w[2], linear, area, h, rows, v, keep(v, values));
            me.barrier();
            attend(me, [&](int64_t r, int64_t at) {
                kernels.self_attention({q + r * d + at, keys + at, values + at,
                                        sources + r * longest, longest * d, d, positions[r] + 1,
                                        net.head_dim(), scores, context + r * d + at});
            });
            product(me, w[3], linear, area, context, rows, y, residual);
            me.barrier();

            h = normalize(me, norm + 2, few);
            product(me, w[4], linear, area, h, rows, q, scaled);
            me.barrier();
            attend(me, [&](int64_t r, int64_t at) {
                CrossHead here = head;
                const int64_t index =
                    (clips[r] * net.layers + layer) * net.heads + at / net.head_dim();
                here.data = cross + index * cross_head_bytes(head.type, head.padded, head.head_dim);
                kernels.cross_attention(
                    {here, q + r * d + at, scores, bytes, context + r * d + at});
            });
            product(me, w[7], linear, area, context, rows, y, residual);
            me.barrier();

            h = normalize(me, norm + 4, few);
            const int64_t inner = w[8].w.rows;
            product(me, w[8], linear, area, h, rows, hidden,
                    [&](int64_t m0, int64_t m1, int64_t begin, int64_t end) {
                        for (int64_t r = m0; r < m1; r++) {
                            kernels.gelu(hidden + r * inner + begin, end - begin);
                        }
                    });
            me.barrier();
            product(me, w[9], linear, area, hidden, rows, y, residual);
            me.barrier();
        }
        const float* const* norm = net.floats.data() + net.layers * kNorms;
        me.share(wanted, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                kernels.layer_norm(x + wanted_rows[i] * d, norm[0], norm[1], kEpsilon, d,
                                   normed + i * d);
            }
        });
        me.barrier();
        product(me, embedding, linear, area, normed, wanted, logits,
                [](int64_t, int64_t, int64_t, int64_t) {});
    }

    // x by a norm, readable by this thread.
    const float* normalize(Member& me, const float* const* norm, float* few) const {
        const int64_t d = net.width;
        float* out = rows <= kFewRows ? few : normed;
        const auto part = [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; r++) {
                kernels.layer_norm(x + r * d, norm[0], norm[1], kEpsilon, d, out + r * d);
            }
        };
        if (rows <= kFewRows) {
            part(0, rows);
        } else {
            me.share(rows, part);
            me.barrier();
        }
        return out;
    }

    // f(row, first column) for every row and head, then a barrier.
    template <class F>
    void attend(Member& me, const F& f) const {
        me.share(rows * net.heads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                f(i / net.heads, i % net.heads * net.head_dim());
            }
        });
        me.barrier();
    }
};

Tensor decoder_step(int64_t handle, const Tensor& ids, const Tensor& positions, const Tensor& clips,
                    const Tensor& sources, Tensor cache, const Tensor& cross, int64_t audio,
                    int64_t type, const Tensor& wanted) {
    const std::shared_ptr<const Network> net = network(handle);
    check_decoder(*net);
    const int64_t vocabulary = net->weights.back().w.rows, rows = ids.numel();
    Step s{*net, *tier(false).linear, whisper_kernels(), rows, wanted.numel()};
    DQW_CHECK(cache.scalar_type() == ScalarType::Float && cache.is_contiguous() &&
                  cache.dim() == 5 && cache.size(0) == net->layers && cache.size(1) == 2 &&
                  cache.size(4) == net->width,
              "cache must be float32 (layers, 2, slots, longest, width)");
    s.slots = cache.size(2);
    s.longest = cache.size(3);
    s.ids = integers<int64_t>(ids, ScalarType::Long, rows, "ids");
    s.positions = integers<int32_t>(positions, ScalarType::Int, rows, "positions");
    s.clips = integers<int32_t>(clips, ScalarType::Int, rows, "clips");
    s.sources = integers<int32_t>(sources, ScalarType::Int, rows * s.longest, "sources");
    s.wanted_rows = integers<int32_t>(wanted, ScalarType::Int, s.wanted, "wanted");
    DQW_CHECK(audio > 0 && audio <= kLongestInt8Row, "audio of ", audio, " positions");
    s.head = {cross_type(type), audio, padded_positions(audio), net->head_dim(), nullptr};
    const int64_t head_bytes = cross_head_bytes(s.head.type, s.head.padded, s.head.head_dim);
    DQW_CHECK(cross.scalar_type() == ScalarType::Byte && cross.is_contiguous() &&
                  cross.numel() % (net->layers * net->heads * head_bytes) == 0,
              "cross must be what decoder_cross gave for ", audio, " positions and this type");
    const int64_t clip_count = cross.numel() / (net->layers * net->heads * head_bytes);
    const int64_t table = net->sizes.back() / net->width;
    for (int64_t r = 0; r < rows; r++) {
        DQW_CHECK(s.ids[r] >= 0 && s.ids[r] < vocabulary, "id ", s.ids[r], " of row ", r,
                  " lies outside the vocabulary");
        DQW_CHECK(s.positions[r] >= 0 && s.positions[r] < std::min(s.longest, table), "position ",
                  s.positions[r], " of row ", r, " lies outside the cache");
        DQW_CHECK(s.clips[r] >= 0 && s.clips[r] < clip_count, "clip ", s.clips[r], " is not there");
        for (int64_t t = 0; t <= s.positions[r]; t++) {
            const int32_t slot = s.sources[r * s.longest + t];
            DQW_CHECK(slot >= 0 && slot < s.slots, "slot ", slot, " of row ", r, " is not there");
        }
    }
    for (int64_t i = 0; i < s.wanted; i++) {
        DQW_CHECK(s.wanted_rows[i] >= 0 && s.wanted_rows[i] < rows, "row ", s.wanted_rows[i],
                  " is wanted but not there");
    }
    Tensor logits = new_tensor({s.wanted, vocabulary}, ScalarType::Float);
    if (rows == 0) return logits;
    DQW_CHECK(s.wanted <= rows, "more rows are wanted than there are");
    s.cache = static_cast<float*>(cache.mutable_data_ptr());
    s.cross = static_cast<uint8_t*>(const_cast<void*>(cross.const_data_ptr()));
    s.logits = static_cast<float*>(logits.mutable_data_ptr());
    Pieces count{nullptr};
    s.place(count);
    Pieces memory{static_cast<char*>(scratch<2>(count.used))};
    s.place(memory);
    run_team(torch::stable::get_num_threads(), s);
    return logits;
}

// The audio's keys and values for every layer and head, from the encoder's states (clips,
// positions, width) float32. type: 0 int8, 1 bfloat16, 2 float32.
Tensor decoder_cross(int64_t handle, const Tensor& states_, int64_t type, bool bf16) {
    const std::shared_ptr<const Network> net = network(handle);
    check_decoder(*net);
    const Tensor states = as_float(states_);
    const int64_t d = net->width;
    DQW_CHECK(states.dim() == 3 && states.size(2) == d, "states must be (clips, positions, ", d,
              ")");
    const int64_t clips = states.size(0), positions = states.size(1);
    const CrossHead head{cross_type(type), positions, padded_positions(positions), net->head_dim(),
                         nullptr};
    const int64_t head_bytes = cross_head_bytes(head.type, head.padded, head.head_dim);
    Tensor cross = new_tensor({clips, net->layers, net->heads, head_bytes}, ScalarType::Byte);
    if (cross.numel() == 0) return cross;
    uint8_t* out = static_cast<uint8_t*>(cross.mutable_data_ptr());
    const float* x = static_cast<const float*>(states.const_data_ptr());
    const LinearKernels& linear = *tier(bf16).linear;
    const WhisperKernels& kernels = whisper_kernels();
    const int64_t slots = torch::stable::get_num_threads();
    size_t shared = 0, own = 0;
    for (int64_t layer = 0; layer < net->layers; layer++) {
        for (int i = 5; i <= 6; i++) {
            const Weight& w = net->weights[layer * kWeights + i];
            shared = std::max(shared, product_shared_bytes(w, positions, linear));
            own = std::max(own, product_own_bytes(w, positions, linear));
        }
    }
    own = round_up(own, 64);
    const auto place = [&](Pieces p, float*& keys, float*& values, char*& area, char*& owns) {
        keys = p.take<float>(positions * d);
        values = p.take<float>(positions * d);
        area = p.take<char>(shared);
        owns = p.take<char>(own * slots);
        return p.used;
    };
    float *keys, *values;
    char *area, *owns;
    const size_t bytes = place(Pieces{nullptr}, keys, values, area, owns);
    place(Pieces{static_cast<char*>(scratch<2>(bytes))}, keys, values, area, owns);
    run_team(slots, [&](Member& me) {
        const Area mine{area, owns + me.index() * own, own};
        for (int64_t clip = 0; clip < clips; clip++) {
            const float* source = x + clip * positions * d;
            for (int64_t layer = 0; layer < net->layers; layer++) {
                const Weight* w = net->weights.data() + layer * kWeights;
                const auto nothing = [](int64_t, int64_t, int64_t, int64_t) {};
                product(me, w[5], linear, mine, source, positions, keys, nothing);
                product(me, w[6], linear, mine, source, positions, values, nothing);
                me.barrier();
                me.share(net->heads, [&](int64_t begin, int64_t end) {
                    for (int64_t h = begin; h < end; h++) {
                        CrossHead here = head;
                        const int64_t index = (clip * net->layers + layer) * net->heads + h;
                        here.data = out + index * head_bytes;
                        kernels.pack_cross(here, keys + h * head.head_dim,
                                           values + h * head.head_dim, d);
                    }
                });
                me.barrier();
            }
        }
    });
    return cross;
}

}  // namespace
}  // namespace dqw

STABLE_TORCH_LIBRARY_FRAGMENT(dqw_cpu, m) {
    m.def(
        "decoder_step(int network, Tensor ids, Tensor positions, Tensor clips, Tensor sources, "
        "Tensor(a!) cache, Tensor cross, int audio, int type, Tensor wanted) -> Tensor");
    m.def("decoder_cross(int network, Tensor states, int type, bool bf16=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dqw_cpu, CPU, m) {
    m.impl("decoder_step", TORCH_BOX(&dqw::decoder_step));
    m.impl("decoder_cross", TORCH_BOX(&dqw::decoder_cross));
}
