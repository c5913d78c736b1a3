// Second moments of what a layer is given, as an operator: torch.ops.dqw_cpu.add_moment. Calibrated
// rounding (dqw/compensate.py) spends most of its products on them.
//
// Columns of x and y go through in strips of 32, `kChunk` rows at a time, as pairs of rows. Four
// strips of y (256 KB) stay in a core's second cache while all of x pass by. Without y the sum is
// symmetric: tiles on and above the diagonal are worked out, the others are their mirror images.

#include "bf16.h"
#include "team.h"

namespace dqw {
namespace {

constexpr int64_t kStrip = 32, kChunk = 1024, kGroup = 4;

struct Moment {
    const Bf16Kernels& kernels;
    const uint16_t *y, *x;  // (rows, cols); y null: x
    int64_t rows, cols;
    float* sum;      // (cols, cols)
    float* columns;  // (cols), for the sums of y's columns, or null
    uint16_t *y_strips, *x_strips;

    int64_t strips() const { return (cols + kStrip - 1) / kStrip; }
    static int64_t strip_size() { return kChunk * kStrip; }

    void pack(Member& me, const uint16_t* from, int64_t first, uint16_t* to, bool adds) const {
        const int64_t some = std::min(kChunk, rows - first);
        me.share(strips(), [&](int64_t begin, int64_t end) {
            for (int64_t s = begin; s < end; s++) {
                kernels.pack_pairs(from + first * cols, some, cols, s * kStrip,
                                   to + s * strip_size());
                if (!adds) continue;
                kernels.add_columns(to + s * strip_size(), (some + 1) / 2,
                                    std::min(kStrip, cols - s * kStrip), columns + s * kStrip);
            }
        });
    }

    // The first strip of x that a group of y's strips is multiplied by.
    int64_t start(int64_t group) const { return y == nullptr ? group * kGroup : 0; }

    void multiply(Member& me, int64_t pairs) const {
        const int64_t n = strips(), groups = (n + kGroup - 1) / kGroup;
        int64_t steps = 0;
        for (int64_t g = 0; g < groups; g++) steps += n - start(g);
        const uint16_t* left = y == nullptr ? x_strips : y_strips;
        me.share(steps, [&](int64_t begin, int64_t end) {
            for (int64_t g = 0, at = 0; g < groups; at += n - start(g), g++) {
                for (int64_t t = std::max(begin - at, int64_t{0}) + start(g);
                     t < std::min(end - at + start(g), n); t++) {
                    for (int64_t s = g * kGroup; s < std::min((g + 1) * kGroup, n); s++) {
                        if (y == nullptr && s > t) break;
                        kernels.add_moment(left + s * strip_size(), x_strips + t * strip_size(),
                                           pairs, std::min(kStrip, cols - s * kStrip),
                                           std::min(kStrip, cols - t * kStrip),
                                           sum + s * kStrip * cols + t * kStrip, cols);
                    }
                }
            }
        });
    }

    // Tile by tile, as each column's numbers lie in lines of their own.
    void mirror(Member& me) const {
        me.share(strips(), [&](int64_t begin, int64_t end) {
            for (int64_t s = begin; s < end; s++) {
                for (int64_t t = 0; t <= s; t++) mirror_tile(s * kStrip, t * kStrip);
            }
        });
    }

    void mirror_tile(int64_t row, int64_t column) const {
        for (int64_t i = row; i < std::min(row + kStrip, cols); i++) {
            for (int64_t j = column; j < std::min(column + kStrip, i); j++) {
                sum[i * cols + j] = sum[j * cols + i];
            }
        }
    }

    void operator()(Member& me) const {
        for (int64_t first = 0; first < rows; first += kChunk) {
            pack(me, x, first, x_strips, columns != nullptr && y == nullptr);
            if (y != nullptr) pack(me, y, first, y_strips, columns != nullptr);
            me.barrier();
            multiply(me, (std::min(kChunk, rows - first) + 1) / 2);
            me.barrier();
        }
        if (y == nullptr) mirror(me);
    }
};

// sum (cols, cols) float32 += yT x of bfloat16 rows (rows, cols); without y, xT x, and sum must be
// symmetric. columns (cols) float32 += the sums of y's columns, without y of x's. → whether this
// processor has it: if not, nothing is added.
bool add_moment(const Tensor& sum, const Tensor& x_, const std::optional<Tensor>& y_,
                const std::optional<Tensor>& columns) {
    const Bf16Kernels* kernels = tier().linear->bf16;
    if (kernels == nullptr || kernels->add_moment == nullptr) return false;
    DQW_CHECK(x_.dim() == 2 && x_.scalar_type() == ScalarType::BFloat16,
              "x must be (rows, cols) of bfloat16");
    const int64_t rows = x_.size(0), cols = x_.size(1);
    DQW_CHECK(sum.dim() == 2 && sum.size(0) == cols && sum.size(1) == cols && sum.is_contiguous() &&
                  sum.scalar_type() == ScalarType::Float,
              "sum must be contiguous (", cols, ", ", cols, ") float32");
    DQW_CHECK(!y_ || (y_->dim() == 2 && y_->size(0) == rows && y_->size(1) == cols &&
                      y_->scalar_type() == ScalarType::BFloat16),
              "y must be what x is");
    DQW_CHECK(!columns || (columns->dim() == 1 && columns->size(0) == cols &&
                           columns->is_contiguous() && columns->scalar_type() == ScalarType::Float),
              "columns must be contiguous (", cols, ") float32");
    if (rows == 0 || cols == 0) return true;
    const Tensor x = dense(x_), y = y_ ? dense(*y_) : x;
    const auto data = [](const Tensor& t) {
        return static_cast<const uint16_t*>(t.const_data_ptr());
    };
    const auto floats = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
    Moment m{*kernels,
             y_ ? data(y) : nullptr,
             data(x),
             rows,
             cols,
             floats(sum),
             columns ? floats(*columns) : nullptr,
             nullptr,
             nullptr};
    const int64_t size = m.strips() * Moment::strip_size();
    m.x_strips = static_cast<uint16_t*>(scratch<2>((y_ ? 2 : 1) * size * sizeof(uint16_t)));
    m.y_strips = m.x_strips + size;
    run_team(torch::stable::get_num_threads(), m);
    return true;
}

}  // namespace
}  // namespace dqw

STABLE_TORCH_LIBRARY_FRAGMENT(dqw_cpu, m) {
    m.def("add_moment(Tensor(a!) sum, Tensor x, Tensor? y=None, Tensor(b!)? columns=None) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(dqw_cpu, CPU, m) { m.impl("add_moment", TORCH_BOX(&dqw::add_moment)); }
