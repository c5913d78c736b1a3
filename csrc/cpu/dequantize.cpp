// dqw::dequantize and dqw::quant_embedding on the CPU: packed rows to float32, level * scale.

#include "tensors.h"

namespace dqw {

Packed packed_weight(const Tensor& weight, const Tensor& scale, const Tensor& levels, int64_t rows,
                     int64_t cols, int64_t bits, int64_t group_size) {
    DQW_CHECK(weight.is_cpu() && scale.is_cpu() && levels.is_cpu(),
              "weight, scale and levels of a packed weight must be on the CPU, as the input is");
    DQW_CHECK(bits >= 2 && bits <= 8, "bits must be 2 to 8, got ", bits);
    // Few enough that no product of them overflows.
    DQW_CHECK(rows >= 0 && cols >= 0 && rows <= INT32_MAX && cols <= INT32_MAX,
              "a packed weight has 0 to 2147483647 rows and columns, not ", rows, " and ", cols);
    Packed w{};
    w.bits = static_cast<int>(bits);
    w.rows = rows;
    w.cols = cols;
    w.blocks = (cols + 63) / 64;
    w.row_bytes = w.blocks * 8 * bits;
    DQW_CHECK(weight.scalar_type() == ScalarType::Byte && weight.is_contiguous() &&
                  weight.numel() == rows * w.row_bytes,
              "packed weight has ", weight.numel(), " bytes, but (", rows, ", ", cols, ") at ",
              bits, " bits takes ", rows * w.row_bytes, " bytes of uint8");
    w.data = static_cast<const uint8_t*>(weight.const_data_ptr());

    w.group = group_size;
    w.scale = scale.const_data_ptr();
    if (scale.scalar_type() == ScalarType::Byte) {
        DQW_CHECK(group_size > 0, "scales of uint8 are those of groups, and group_size is 0");
        w.scale_stride = (cols + group_size - 1) / group_size;
        DQW_CHECK(scale.dim() == 1 && scale.numel() == 1 + rows * w.scale_stride,
                  "stored scales have ", scale.numel(), " bytes, but those of (", rows, ", ", cols,
                  ") in groups of ", group_size, " have ", 1 + rows * w.scale_stride);
        const uint8_t* stored = static_cast<const uint8_t*>(w.scale);
        w.scale = stored + 1;
        w.scale_type = ScaleType::byte;
        w.lowest_scale = stored[0] << 23;
    } else {
        const bool half = scale.scalar_type() == ScalarType::Half;
        DQW_CHECK(half || scale.scalar_type() == ScalarType::Float,
                  "scale of a packed weight must be float32, float16, or uint8 as it is stored");
        w.scale_type = half ? ScaleType::f16 : ScaleType::f32;
        w.scale_stride = scale_stride(scale, rows, cols, group_size);
    }

    const int64_t codes = int64_t{1} << bits;
    DQW_CHECK(levels.scalar_type() == ScalarType::Short && levels.numel() == codes,
              "levels must be int16 of ", codes, " entries, one for each code");
    const int16_t* level = static_cast<const int16_t*>(levels.const_data_ptr());
    w.largest = 1;  // without any level, too: a kernel's offset of 0 would mean that it has none
    for (int64_t code = 0; code < codes; code++) {
        DQW_CHECK(level[code] >= -32639 && level[code] <= 32639, "levels holds ", level[code],
                  ", but a level is at most 32639 in magnitude");
        const int low = static_cast<int8_t>(level[code] & 0xff);
        w.low[code] = static_cast<int8_t>(low);
        w.high[code] = static_cast<int8_t>((level[code] - low) / 256);
        // -128 is one plane too, but a kernel may rely on the magnitude: 127 at most.
        w.wide |= w.high[code] != 0 || low == -128;
        w.largest = std::max<int>(w.largest, std::abs(level[code]));
    }
    w.products16 = 32767 / (2 * 128 * 2 * w.largest);
    return w;
}

namespace {

Tensor dequantize(const Tensor& weight, const Tensor& scale_, const Tensor& levels_, int64_t rows,
                  int64_t cols, int64_t bits, int64_t group_size) {
    const Tensor scale = dense(scale_), levels = dense(levels_);
    const Packed w = packed_weight(weight, scale, levels, rows, cols, bits, group_size);
    Tensor y = new_tensor({rows, cols}, ScalarType::Float);
    float* out = static_cast<float*>(y.mutable_data_ptr());
    const auto* kernels = tier().linear;
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(cols, 1));
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) kernels->dequantize(w, r, out + r * cols);
    });
    return y;
}

Tensor quant_embedding(const Tensor& ids_, const Tensor& weight, const Tensor& scale_,
                       const Tensor& levels_, int64_t rows, int64_t cols, int64_t bits,
                       int64_t group_size) {
    const Tensor scale = dense(scale_), levels = dense(levels_);
    const Packed w = packed_weight(weight, scale, levels, rows, cols, bits, group_size);
    const Tensor ids = dense(ids_.scalar_type() == ScalarType::Long
                                 ? ids_
                                 : torch::stable::to(ids_, std::make_optional(ScalarType::Long)));
    const int64_t count = ids.numel();
    const int64_t* id = static_cast<const int64_t*>(ids.const_data_ptr());
    for (int64_t i = 0; i < count; i++) {
        DQW_CHECK(id[i] >= 0 && id[i] < rows, "id ", id[i], " lies outside the embedding's ", rows,
                  " rows");
    }
    const auto shape = ids.sizes();
    std::vector<int64_t> sizes(shape.begin(), shape.end());
    sizes.push_back(cols);
    Tensor y = new_tensor(sizes, ScalarType::Float);
    float* out = static_cast<float*>(y.mutable_data_ptr());
    const auto* kernels = tier().linear;
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(cols, 1));
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) kernels->dequantize(w, id[i], out + i * cols);
    });
    return y;
}

}  // namespace
}  // namespace dqw

STABLE_TORCH_LIBRARY_IMPL(dqw, CPU, m) {
    m.impl("dequantize", TORCH_BOX(&dqw::dequantize));
    m.impl("quant_embedding", TORCH_BOX(&dqw::quant_embedding));
}
