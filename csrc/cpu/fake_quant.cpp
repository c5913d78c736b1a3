// dqw::fake_quant, fake_quant_backward, quantize, fake_quant_activation and round_columns on the
// CPU.
//
//   y      = fake_quant(x (rows, cols), scale, bucket, group_size)
//   dx, ds = fake_quant_backward(grad, x, scale, bucket, group_size)
//   levels = quantize(x, scale, bucket, group_size)                    int16
//   y      = fake_quant_activation(x (..., cols))
//   y, d   = round_columns(state (cols, rows), base, divisor, coefficient, scale, bucket)
//
// The rule is that of dqw/reference.py, bit for bit (dscale up to the order of its sum). Rows are
// split over torch's threads. dscale does not depend on their number: every (row, group) is summed
// by one thread, and per tensor those sums are added in the order of the rows.

#include "tensors.h"

namespace dqw {
namespace {

constexpr int64_t kGrain = 16384;  // weights a thread should have to be worth waking

template <class F>
void over_rows(int64_t rows, int64_t cols, const F& f) {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(cols, 1));
    torch::stable::parallel_for(0, rows, grain, f);
}

// The bucket table as the kernels want it; lives as long as the call.
class Table {
  public:
    explicit Table(const Tensor& bucket) : kept_(dense(bucket)) {
        DQW_CHECK(kept_.scalar_type() == ScalarType::Short && kept_.dim() == 1 &&
                      kept_.numel() % 2 == 1 && kept_.numel() > 1,
                  "bucket must be the int16 table of a grid: 2 * level_max + 1 entries");
        const int16_t* entry = static_cast<const int16_t*>(kept_.const_data_ptr());
        const int64_t size = kept_.numel();
        grid.size = static_cast<int>(size);
        bool uniform = true, small = true;
        for (int64_t k = 0; k < size; k++) {
            uniform &= entry[k] == (k + 1) / 2;
            small &= entry[k] >= 0 && entry[k] < 256;
        }
        grid.uniform = uniform;
        if (uniform) return;
        levels_.resize(std::max<int64_t>(size, 32));
        std::copy(entry, entry + size, levels_.begin());
        if (size <= 256) {
            DQW_CHECK(small, "bucket holds a level outside 0 to 255");
            bytes_.resize(256);
            std::copy(entry, entry + size, bytes_.begin());
        }
        grid.levels = levels_.data();
        grid.bytes = bytes_.data();
    }

    Grid grid{};

  private:
    Tensor kept_;
    std::vector<float> levels_;
    std::vector<uint8_t> bytes_;
};

FakeQuant problem(const Tensor& x, const Tensor& scale, const Table& table, int64_t group_size) {
    FakeQuant a{};
    a.x = x.const_data_ptr();
    a.type = type_of(x, "x");
    a.cols = x.size(1);
    a.group = group_size > 0 ? group_size : std::max<int64_t>(a.cols, 1);
    a.scale = static_cast<const float*>(scale.const_data_ptr());
    a.scale_stride = scale_stride(scale, x.size(0), a.cols, group_size);
    a.grid = table.grid;
    return a;
}

void check_matrix(const Tensor& x) {
    DQW_CHECK(x.dim() == 2, "x must have two dimensions (rows, cols), got ", x.dim());
}

Tensor fake_quant(const Tensor& x_, const Tensor& scale_, const Tensor& bucket,
                  int64_t group_size) {
    check_matrix(x_);
    const Tensor x = dense(x_), scale = as_float(scale_);
    const Table table(bucket);
    FakeQuant a = problem(x, scale, table, group_size);
    Tensor y = new_tensor({x.size(0), x.size(1)}, x.scalar_type());
    a.y = y.mutable_data_ptr();
    const auto* kernels = tier().fake_quant;
    over_rows(x.size(0), a.cols, [&](int64_t r0, int64_t r1) { kernels->forward(a, r0, r1); });
    return y;
}

Tensor quantize(const Tensor& x_, const Tensor& scale_, const Tensor& bucket, int64_t group_size) {
    check_matrix(x_);
    const Tensor x = dense(x_), scale = as_float(scale_);
    const Table table(bucket);
    FakeQuant a = problem(x, scale, table, group_size);
    Tensor y = new_tensor({x.size(0), x.size(1)}, ScalarType::Short);
    a.y = y.mutable_data_ptr();
    const auto* kernels = tier().fake_quant;
    over_rows(x.size(0), a.cols, [&](int64_t r0, int64_t r1) { kernels->quantize(a, r0, r1); });
    return y;
}

std::tuple<Tensor, Tensor> fake_quant_backward(const Tensor& grad_, const Tensor& x_,
                                               const Tensor& scale_, const Tensor& bucket,
                                               int64_t group_size) {
    check_matrix(x_);
    const Tensor x = dense(x_), scale = as_float(scale_);
    const Table table(bucket);
    FakeQuant a = problem(x, scale, table, group_size);
    DQW_CHECK(grad_.dim() == 2 && grad_.size(0) == x.size(0) && grad_.size(1) == x.size(1),
              "grad must have the shape of x");
    const Tensor grad = dense(grad_.scalar_type() == x.scalar_type()
                                  ? grad_
                                  : torch::stable::to(grad_, std::make_optional(x.scalar_type())));
    Tensor dx = new_tensor({x.size(0), x.size(1)}, x.scalar_type());
    Tensor dscale = new_tensor({scale.size(0), scale.size(1)}, ScalarType::Float);
    const bool per_tensor = group_size <= 0 && a.scale_stride == 0;  // no columns: no groups, too
    std::vector<float> rows(per_tensor ? x.size(0) : 0);
    float* result = static_cast<float*>(dscale.mutable_data_ptr());
    a.grad = grad.const_data_ptr();
    a.y = dx.mutable_data_ptr();
    a.dscale = per_tensor ? rows.data() : result;
    if (a.cols == 0)
        std::fill(a.dscale, a.dscale + (per_tensor ? x.size(0) : dscale.numel()), 0.0f);
    const auto* kernels = tier().fake_quant;
    over_rows(x.size(0), a.cols, [&](int64_t r0, int64_t r1) { kernels->backward(a, r0, r1); });
    if (per_tensor) {
        double total = 0;
        for (const float row : rows) total += row;
        *result = static_cast<float>(total);
    }
    if (scale_.scalar_type() != ScalarType::Float) {
        dscale = torch::stable::to(dscale, std::make_optional(scale_.scalar_type()));
    }
    return {dx, dscale};
}

Tensor fake_quant_activation(const Tensor& x_) {
    DQW_CHECK(x_.dim() >= 1, "x must have at least one dimension");
    const Tensor x = dense(x_);
    FakeQuant a{};
    a.x = x.const_data_ptr();
    a.type = type_of(x, "x");
    a.cols = x.size(x.dim() - 1);
    const auto sizes = x.sizes();
    Tensor y = new_tensor(std::vector<int64_t>(sizes.begin(), sizes.end()), x.scalar_type());
    a.y = y.mutable_data_ptr();
    const auto* kernels = tier().fake_quant;
    over_rows(a.cols ? x.numel() / a.cols : 0, a.cols,
              [&](int64_t r0, int64_t r1) { kernels->activation(a, r0, r1); });
    return y;
}

std::tuple<Tensor, Tensor> round_columns(const Tensor& state_, const std::optional<Tensor>& base_,
                                         const Tensor& divisor_, const Tensor& coefficient_,
                                         const Tensor& scale_, const Tensor& bucket) {
    check_matrix(state_);
    const int64_t cols = state_.size(0), rows = state_.size(1);
    DQW_CHECK(cols <= kMostColumns, "at most ", kMostColumns, " columns at once, got ", cols);
    const auto has = [](const Tensor& t, int64_t first, int64_t second) {
        return t.dim() == 2 && t.size(0) == first && t.size(1) == second;
    };
    DQW_CHECK(has(scale_, cols, rows) && (!base_ || has(*base_, cols, rows)),
              "scale and base must have the shape of state, (", cols, ", ", rows, ")");
    DQW_CHECK(divisor_.numel() == cols && has(coefficient_, cols, cols), "divisor must have ", cols,
              " entries, and coefficient ", cols, " times as many");
    const Tensor state = as_float(state_), divisor = as_float(divisor_), scale = as_float(scale_),
                 coefficient = as_float(coefficient_), base = base_ ? as_float(*base_) : state;
    const Table table(bucket);
    Tensor rounded = new_tensor({cols, rows}, ScalarType::Float);
    Tensor delta = new_tensor({cols, rows}, ScalarType::Float);
    const auto data = [](const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); };
    Columns a{cols,
              rows,
              data(state),
              base_ ? data(base) : nullptr,
              data(divisor),
              data(coefficient),
              data(scale),
              static_cast<float*>(rounded.mutable_data_ptr()),
              static_cast<float*>(delta.mutable_data_ptr()),
              table.grid};
    constexpr int64_t unit = 16;  // no register holds more rows
    const auto* kernels = tier().fake_quant;
    over_rows((rows + unit - 1) / unit, unit * cols * cols / 2, [&](int64_t begin, int64_t end) {
        kernels->columns(a, begin * unit, std::min(end * unit, rows));
    });
    return {rounded, delta};
}

}  // namespace
}  // namespace dqw

STABLE_TORCH_LIBRARY_IMPL(dqw, CPU, m) {
    m.impl("fake_quant", TORCH_BOX(&dqw::fake_quant));
    m.impl("fake_quant_backward", TORCH_BOX(&dqw::fake_quant_backward));
    m.impl("quantize", TORCH_BOX(&dqw::quantize));
    m.impl("fake_quant_activation", TORCH_BOX(&dqw::fake_quant_activation));
    m.impl("round_columns", TORCH_BOX(&dqw::round_columns));
}
