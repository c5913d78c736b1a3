// dqw::quant_linear on the CPU: y = x W^T + bias with packed W.
//
//   x (..., K) float32/float16/bfloat16, W (rows, K) packed at 2 to 8 bits, y (..., rows) as x
//
//                       few rows of x             many
//   float activations   gemv: widen in registers  gemm: decode a tile of W, FMA register block
//   int8 activations    gemv: table, dot product  gemm: the same with integer dot products
//   bfloat16 x, floats  gemv                      product_bf16.h, on the tiers that have it
//   any x, with tiles   as above                  product_bf16.h: int8, or bfloat16 in terms
//
// Exact where the reference is: int8 sums are integers, float weights are level * scale rounded
// once. What a tier has no kernel for goes through torch's matmul on the unpacked matrix: many rows
// without vector instructions, and in int8 group sizes that are no multiple of 16 and rows longer
// than the int32 sums allow.

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "product_bf16.h"
#include "tensors.h"

namespace dqw {
namespace {

// Products (codes times rows of x) that are worth a thread: 5 microseconds of AVX2. With threads
// awake, 1 x 512 -> 2048 takes 20 us on two and 29 us on one; 1 x 512 -> 512 gains nothing.
constexpr int64_t kInt8Grain = 1 << 18, kFloatGrain = 1 << 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Items a thread should have, if each is so many products.
int64_t grain_of(bool int8, int64_t products) {
    return std::max<int64_t>(1, (int8 ? kInt8Grain : kFloatGrain) / std::max<int64_t>(products, 1));
}

// What the activations need in memory, carved from one scratch block.
void place_activations(Linear& a, bool int8) {
    const int64_t padded = a.w.blocks * 64;
    const int64_t groups = a.w.group ? ceil_div(a.w.cols, a.w.group) : 1;
    if (!int8) {
        a.x = static_cast<float*>(scratch<0>((a.m * padded + 64) * sizeof(float)));
        return;
    }
    const int64_t rows = a.m * std::max(a.planes, 1);
    const size_t q = (rows * padded + 63) / 64 * 64, lanes = q, sums = rows * groups * 4;
    char* p = static_cast<char*>(scratch<0>(q + lanes + sums + a.m * 4 + 64));
    a.q = reinterpret_cast<int8_t*>(p);
    a.lane_start = reinterpret_cast<int32_t*>(p + q);
    a.row_start = reinterpret_cast<int32_t*>(p + q + lanes);
    a.row_scale = reinterpret_cast<float*>(p + q + lanes + sums);
}

void gemv(Linear& a, const void* x, bool int8, const LinearKernels& k) {
    place_activations(a, int8);
    (int8 ? k.prepare_int8 : k.prepare_float)(a, x, 0, a.m);
    const int64_t unit = 16, units = ceil_div(a.w.rows, unit);
    const int64_t rows = a.m * std::max(a.planes, 1);
    const int64_t grain = grain_of(int8, rows * a.w.blocks * 64 * unit);
    torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
        (int8 ? k.gemv_int8 : k.gemv_float)(a, begin * unit, std::min(end * unit, a.w.rows));
    });
}

void gemm(Linear& a, const void* x, bool int8, const LinearKernels& k) {
    const int64_t planes = std::max(a.planes, 1);
    const int64_t block = rows_of_block(a, int8, k);
    a.block_rows = block * planes;
    place_activations(a, int8);
    torch::stable::parallel_for(
        0, ceil_div(a.m, block), std::max<int64_t>(1, 16384 / (a.block_rows * a.w.blocks * 64 + 1)),
        [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; b++) {
                const int64_t m0 = b * block, m1 = std::min(m0 + block, a.m);
                (int8 ? k.block_int8 : k.block_float)(a, x, m0, m1);
            }
        });
    // Tasks: tiles of W, and where those are fewer than twice the threads, parts of x as well
    // (each part decodes its tile again).
    const int64_t tiles = ceil_div(a.w.rows, k.tile_rows);
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t row_blocks = ceil_div(a.m, block);
    const int64_t parts =
        std::clamp<int64_t>(ceil_div(2 * threads, tiles), 1, ceil_div(row_blocks, 4));
    const int64_t part_rows = ceil_div(row_blocks, parts) * block;
    const int64_t groups = a.w.group ? ceil_div(a.w.cols, a.w.group) : 1;
    const size_t tile_bytes = a.w.blocks * 64 * k.tile_rows * (int8 ? (a.w.wide ? 2 : 1) : 4) +
                              groups * k.tile_rows * sizeof(float) + 64;
    const int64_t grain = grain_of(int8, part_rows * planes * k.tile_rows * a.w.blocks * 64);
    torch::stable::parallel_for(0, tiles * parts, grain, [&](int64_t begin, int64_t end) {
        void* tile = scratch<1>(tile_bytes);
        for (int64_t task = begin; task < end; task++) {
            const int64_t n = task / parts * k.tile_rows, m0 = task % parts * part_rows;
            const int64_t m1 = std::min(m0 + part_rows, a.m);
            if (m0 >= m1) continue;
            (int8 ? k.fill_int8 : k.fill_float)(a.w, n, tile);
            (int8 ? k.gemm_int8 : k.gemm_float)(a, n, m0, m1, tile);
        }
    });
}

// Whether no scale has more than 9 significant bits: with a level of 7, two terms hold the product.
bool has_short_scales(const Packed& w) {
    const int64_t count = w.rows * w.scale_stride;
    uint32_t lost = w.scale_type == ScaleType::byte ? 0 : 1;
    if (w.scale_type == ScaleType::f16) {
        const uint16_t* s = static_cast<const uint16_t*>(w.scale);
        uint16_t seen = 0;
        for (int64_t i = 0; i < count; i++) {
            // 11 bits; those without an exponent have up to 10.
            const uint16_t dropped = s[i] & 0x7c00 ? 3 : s[i] >> 9;
            seen |= s[i] & dropped;
        }
        lost = seen;
    } else if (w.scale_type == ScaleType::f32) {
        const uint32_t* s = static_cast<const uint32_t*>(w.scale);
        lost = 0;
        for (int64_t i = 0; i < count; i++) lost |= s[i] & 0x7fff;
    }
    return lost == 0;
}

// How product_bf16.h may multiply many rows of x; nothing where it may not.
std::optional<Factors> factors_of(const Linear& a, bool int8, const LinearKernels& k) {
    const bool grouped = a.w.group > 0;
    if (k.bf16 == nullptr || a.w.cols == 0) return std::nullopt;
    if (a.m <= (int8 && grouped ? k.bf16->few_grouped : k.bf16->few)) return std::nullopt;
    if (!int8 && a.type == Type::bf16) return Factors{};
    if (!k.bf16->tiles || (int8 && a.w.cols > kLongestInt8Row)) return std::nullopt;
    if (grouped && (a.w.wide || !has_short_scales(a.w))) return std::nullopt;
    if (!int8) {
        const int x = a.type == Type::f16 ? 2 : 3, w = grouped || a.w.wide ? 2 : 1;
        return Factors{.scaled = grouped, .x = x, .w = w, .type = a.type};
    }
    if (grouped) return Factors{.w = 2, .codes = true};
    if (a.w.wide) return std::nullopt;
    return Factors{.bytes = true, .scaled = false, .codes = true};
}

void product_by_factors(Linear& a, const void* x, const Factors& f, const LinearKernels& k) {
    const int64_t threads = torch::stable::get_num_threads(), rows = a.w.rows;
    Bf16Product p{*k.bf16, a.w, a.bias, x, f, a.m, a.y, a.type};
    if (f.codes) {
        place_activations(a, true);
        torch::stable::parallel_for(
            0, a.m, 8, [&](int64_t begin, int64_t end) { k.quantize_rows(a, x, begin, end); });
        p.x = a.q;
        p.row_scale = a.row_scale;
    }
    if (!f.scaled) {
        float* scale = static_cast<float*>(scratch<2>(rows * sizeof(float)));
        for (int64_t n = 0; n < rows; n++) scale[n] = k.scale(a.w, n, 0);
        p.scale = scale;
    }
    const Parts parts = parts_of(*k.bf16, a.w, a.m, threads, f);
    torch::stable::parallel_for(0, parts.rows * parts.strips, 1, [&](int64_t begin, int64_t end) {
        char* own = static_cast<char*>(scratch<1>(scratch_bytes(*k.bf16, a.w, a.type, a.m, f)));
        for (int64_t i = begin; i < end; i++) {
            product_bf16(p, parts, i, own, [](int64_t, int64_t, int64_t, int64_t) {});
        }
    });
}

// out (m, rows) = some columns of a (m, cols) and b (rows, cols), all of one type. Not through the
// dispatcher: autocast, which is still on in here, would have the product in 16 bits.
void product(const Tensor& out, const Tensor& a, const Tensor& b, int64_t begin, int64_t length) {
    Tensor left = a, right = b;
    left = torch::stable::narrow(left, 1, begin, length);
    right = torch::stable::narrow(right, 1, begin, length);
    right = torch::stable::transpose(right, 0, 1);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
}

Tensor cast(const Tensor& t, ScalarType type) {
    return t.scalar_type() == type ? t : torch::stable::to(t, std::make_optional(type));
}

// y (m, rows) float32 by torch's matmul.
Tensor matmul_float(Linear& a, const Tensor& x, const LinearKernels& k) {
    Tensor w = new_tensor({a.w.rows, a.w.cols}, ScalarType::Float);
    float* out = static_cast<float*>(w.mutable_data_ptr());
    torch::stable::parallel_for(0, a.w.rows, 16, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; n++) k.dequantize(a.w, n, out + n * a.w.cols);
    });
    Tensor y = new_tensor({a.m, a.w.rows}, ScalarType::Float);
    product(y, as_float(x), w, 0, a.w.cols);
    float* result = static_cast<float*>(y.mutable_data_ptr());
    for (int64_t i = 0; a.bias && i < a.m * a.w.rows; i++) result[i] += a.bias[i % a.w.rows];
    return y;
}

// The same with int8 activations: sums are integers, exact in float32 while they stay below 2^24
// and else in float64, whatever order torch adds in.
Tensor matmul_int8(Linear& a, const Tensor& x, const LinearKernels& k) {
    const int64_t cols = a.w.cols, rows = a.w.rows, padded = a.w.blocks * 64;
    const int64_t group = a.w.group ? a.w.group : std::max<int64_t>(cols, 1);
    const int64_t groups = ceil_div(cols, group);
    int64_t largest = 0;
    for (int i = 0; i < 256; i++) {
        largest = std::max<int64_t>(largest, std::abs(a.w.low[i] + 256 * a.w.high[i]));
    }
    // 256: exact also where torch was told to multiply float32 in bfloat16.
    const bool single = largest <= 256 && std::min(group, cols) * 127 * largest < (1 << 24);
    const ScalarType type = single ? ScalarType::Float : ScalarType::Double;

    place_activations(a, true);
    Tensor q = new_tensor({a.m, cols}, ScalarType::Float);
    Tensor w = new_tensor({rows, cols}, ScalarType::Short);
    float* q_out = static_cast<float*>(q.mutable_data_ptr());
    int16_t* w_out = static_cast<int16_t*>(w.mutable_data_ptr());
    k.quantize_rows(a, x.const_data_ptr(), 0, a.m);
    for (int64_t m = 0; m < a.m; m++) {
        std::copy(a.q + m * padded, a.q + m * padded + cols, q_out + m * cols);
    }
    torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
        std::vector<int16_t> level(padded);
        for (int64_t n = begin; n < end; n++) {
            k.levels(a.w, n, level.data());
            std::copy(level.begin(), level.begin() + cols, w_out + n * cols);
        }
    });
    q = cast(q, type);
    w = cast(w, type);

    Tensor y = new_tensor({a.m, rows}, ScalarType::Float);
    float* out = static_cast<float*>(y.mutable_data_ptr());
    std::fill(out, out + a.m * rows, 0.0f);
    std::vector<float> scale(rows);
    const Tensor sums = new_tensor({a.m, rows}, type);
    for (int64_t g = 0; g < groups; g++) {
        const int64_t begin = g * group;
        product(sums, q, w, begin, std::min(group, cols - begin));
        const void* sum = sums.const_data_ptr();
        for (int64_t n = 0; n < rows; n++) {
            scale[n] = k.scale(a.w, n, g);
        }
        for (int64_t m = 0; m < a.m; m++) {
            for (int64_t n = 0; n < rows; n++) {
                const int64_t i = m * rows + n;
                const float exact = single ? static_cast<const float*>(sum)[i]
                                           : static_cast<float>(static_cast<const double*>(sum)[i]);
                out[i] += exact * (a.w.group ? scale[n] : a.row_scale[m] * scale[n]);
            }
        }
    }
    for (int64_t i = 0; i < a.m * rows; i++) {
        if (a.w.group) out[i] *= a.row_scale[i / rows];
        if (a.bias) out[i] += a.bias[i % rows];
    }
    return y;
}

Tensor quant_linear(const Tensor& x_, const Tensor& weight, const Tensor& scale_,
                    const Tensor& levels_, const std::optional<Tensor>& bias_, int64_t rows,
                    int64_t bits, int64_t group_size, bool int8_activations) {
    DQW_CHECK(x_.dim() >= 1, "x must have at least one dimension");
    const Tensor x = dense(x_), scale = dense(scale_), levels = dense(levels_);
    const int64_t cols = x.size(x.dim() - 1);
    Linear a{};
    a.type = type_of(x, "x");
    a.w = packed_weight(weight, scale, levels, rows, cols, bits, group_size);
    std::optional<Tensor> bias;
    if (bias_.has_value()) {
        bias = as_float(*bias_);
        DQW_CHECK(bias->is_cpu(), "bias must be on the CPU, as x is");
        DQW_CHECK(bias->numel() == rows, "bias must have ", rows, " entries, got ", bias->numel());
        a.bias = static_cast<const float*>(bias->const_data_ptr());
    }
    const auto shape = x.sizes();
    std::vector<int64_t> sizes(shape.begin(), shape.end());
    sizes.back() = rows;
    Tensor y = new_tensor(sizes, x.scalar_type());
    a.m = 1;
    for (size_t i = 0; i + 1 < sizes.size(); i++) a.m *= sizes[i];
    if (a.m == 0 || rows == 0) return y;
    const LinearKernels& k = *tier().linear;
    const void* source = x.const_data_ptr();
    a.y = y.mutable_data_ptr();

    if (const auto factors = factors_of(a, int8_activations, k)) {
        product_by_factors(a, source, *factors, k);
        return y;
    }
    const bool odd_groups = a.w.group % 16 != 0, too_long = cols > kLongestInt8Row;
    // Float activations as digits of integers, where that is faster.
    if (!int8_activations && !odd_groups && !too_long && a.m <= k.planes_limit &&
        k.takes_planes(a.w)) {
        a.planes = 3;
    }
    const bool int8 = int8_activations || a.planes > 1;
    // The float gemv has no second plane of levels; no gemv has scales that change inside 16
    // columns.
    const bool gemv_can = int8 ? !(odd_groups || too_long) : !(odd_groups || a.w.wide);
    const bool gemm_can = k.gemm_int8 && !(int8 && (odd_groups || too_long));
    const int64_t limit = int8 ? k.int8_gemv_limit : k.float_gemv_limit;
    const bool few = a.m * std::max(a.planes, 1) <= limit;
    if (!(few && gemv_can) && gemm_can) {
        gemm(a, source, int8, k);
        return y;
    }
    if (!(few && gemv_can)) {
        const Tensor flat = torch::stable::view(x, {a.m, cols});
        const Tensor result = (int8_activations ? matmul_int8 : matmul_float)(a, flat, k);
        return torch::stable::view(cast(result, x.scalar_type()), sizes);
    }
    const int64_t rows_of_x = k.gemv_rows / std::max(a.planes, 1);
    const size_t row_bytes = cols * x.element_size(), out_bytes = rows * x.element_size();
    for (int64_t left = a.m, m = 0; left > 0; left -= a.m, m += a.m) {
        a.m = std::min<int64_t>(left, rows_of_x);
        a.y = static_cast<char*>(y.mutable_data_ptr()) + m * out_bytes;
        gemv(a, static_cast<const char*>(source) + m * row_bytes, int8, k);
    }
    return y;
}

}  // namespace
}  // namespace dqw

STABLE_TORCH_LIBRARY_IMPL(dqw, CPU, m) { m.impl("quant_linear", TORCH_BOX(&dqw::quant_linear)); }
