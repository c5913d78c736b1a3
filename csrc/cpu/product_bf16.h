// y (m, rows) = x (m, cols) W^T + bias by products of bfloat16 or int8: in which order, and which
// part is whose.
//
// A panel of W, as much as stays in a core's second cache, is decoded once and met by block after
// block of 32 rows of x, converted on the way and kept in the first cache. Nothing is shared: a
// thread decodes what it needs, which costs about what fetching it from another core would.
#pragma once

#include <algorithm>

#include "bf16.h"

namespace dqw {

constexpr int64_t kStripRows = 32, kBlockRows = 32;  // of W, of x
constexpr int64_t kDeepest = 24;                     // blocks of a panel

inline int64_t strip_count(const Packed& w) { return (w.rows + kStripRows - 1) / kStripRows; }

// Panels are so many blocks of 64 columns deep and so many strips wide.
inline int64_t panel_blocks(const Packed& w) {
    const int64_t chunks = std::max<int64_t>((w.blocks + kDeepest - 1) / kDeepest, 1);
    return (w.blocks + chunks - 1) / chunks;
}
inline int64_t panel_strips(const Bf16Kernels& k, const Packed& w, const Factors& f = {}) {
    const int64_t bytes = 2 * block_of_w(f) * std::max<int64_t>(panel_blocks(w), 1);
    return std::clamp<int64_t>(k.panel_bytes / bytes, 1, std::max<int64_t>(strip_count(w), 1));
}

// Rows of x and strips of W are each cut into so many parts: a thread for every pair.
struct Parts {
    int64_t rows, strips;
};
inline Parts parts_of(const Bf16Kernels& k, const Packed& w, int64_t m, int64_t threads,
                      const Factors& f = {}) {
    // Cycles of one core: decoding 64 columns of a strip, and reading those of 32 rows of x.
    constexpr int64_t kDecode = 500, kConvert = 600;
    const int64_t cycles = f.bytes ? k.cycles / 2 : k.cycles * products_of(f);
    const int64_t blocks = (m + kBlockRows - 1) / kBlockRows, strips = strip_count(w);
    Parts best{1, 1};
    int64_t least = INT64_MAX;
    for (int64_t n = 1; n <= threads; n++) {
        if (threads % n) continue;
        const int64_t s = (strips + n - 1) / n, r = (blocks + threads / n - 1) / (threads / n);
        const int64_t panels = (s + panel_strips(k, w, f) - 1) / panel_strips(k, w, f);
        const int64_t cost = s * (kDecode * f.w + r * cycles) + r * panels * kConvert * f.x;
        if (cost < least) {
            least = cost;
            best = {threads / n, n};
        }
    }
    return best;
}

struct Bf16Product {
    const Bf16Kernels& k;
    const Packed& w;
    const float* bias;  // or null
    const void* x;
    Factors factors;
    int64_t m;
    void* y;
    Type y_type;
    const float* row_scale = nullptr;  // (m), of int8 x; null: ones
    const float* scale = nullptr;      // (rows of W), where W is levels
};

inline const float kOnes[kBlockRows] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                        1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// Whether sums are scaled once they are complete, and whether they are kept apart from y until
// then.
inline bool scales_sums(const Factors& f) { return f.codes || !f.scaled; }
inline bool keeps_apart(const Factors& f, Type y) {
    return y != Type::f32 || scales_sums(f) || products_of(f) > 1;
}

// Bytes of scratch for a part of so many rows.
inline int64_t scratch_bytes(const Bf16Kernels& k, const Packed& w, Type y_type, int64_t rows,
                             const Factors& f = {}) {
    const int64_t blocks = panel_blocks(w), strips = panel_strips(k, w, f);
    const int64_t groups = w.group ? blocks * 64 / w.group + 2 : 1;
    const int64_t kept = blocks < w.blocks ? (rows + kBlockRows - 1) / kBlockRows : 1;
    const int64_t sums = keeps_apart(f, y_type) ? kept * kBlockRows * strips * kStripRows * 4 : 0;
    return 2 * blocks * (strips * block_of_w(f) + 2 * block_of_x(f)) +
           (2 * strips + groups) * kStripRows * 4 + sums;
}

// Part `part` of parts.rows * parts.strips; on(m begin, m end, n begin, n end) follows every block
// of y that is ready.
template <class F>
void product_bf16(const Bf16Product& p, const Parts& parts, int64_t part, char* scratch,
                  const F& on) {
    const Packed& w = p.w;
    const int64_t row_blocks = (p.m + kBlockRows - 1) / kBlockRows, strips = strip_count(w);
    const int64_t i = part / parts.strips, j = part % parts.strips;
    const int64_t m0 = row_blocks * i / parts.rows * kBlockRows;
    const int64_t m1 = std::min(row_blocks * (i + 1) / parts.rows * kBlockRows, p.m);
    const int64_t end = strips * (j + 1) / parts.strips;
    if (m0 >= m1) return;
    const Factors& f = p.factors;
    const int64_t deep = panel_blocks(w), wide = panel_strips(p.k, w, f);
    const int64_t w_block = block_of_w(f), x_block = block_of_x(f);
    const bool apart = keeps_apart(f, p.y_type), parts_of_sums = deep < w.blocks;
    uint16_t* panel = reinterpret_cast<uint16_t*>(scratch);
    uint16_t* converted[2] = {panel + wide * deep * w_block,
                              panel + wide * deep * w_block + deep * x_block};
    float* bias = reinterpret_cast<float*>(converted[1] + deep * x_block);
    float* factors = bias + wide * kStripRows;
    float* sums = factors + wide * kStripRows;
    const int64_t kept = !apart ? 0 : parts_of_sums ? (m1 - m0 + 31) / 32 * 32 : kBlockRows;
    float* scales = sums + kept * wide * kStripRows;
    const int64_t cols = f.codes ? w.blocks * 64 : w.cols;
    const int64_t row_bytes = cols * (f.codes ? 1 : f.type == Type::f32 ? 4 : 2);
    for (int64_t s = strips * j / parts.strips; s < end; s += wide) {
        const int64_t s1 = std::min(s + wide, end), n = s * kStripRows;
        const int64_t width = std::min(s1 * kStripRows, w.rows) - n;
        for (int64_t c = 0; c < (s1 - s) * kStripRows && p.bias; c++) {
            bias[c] = c < width ? p.bias[n + c] : 0.0f;
        }
        for (int64_t c = 0; c < (s1 - s) * kStripRows && scales_sums(f); c++) {
            factors[c] = p.scale == nullptr ? 1.0f : p.scale[std::min(n + c, w.rows - 1)];
        }
        for (int64_t b = 0; b < w.blocks; b += deep) {
            const int64_t b1 = std::min(b + deep, w.blocks);
            for (int64_t t = s; t < s1; t++) {
                p.k.decode(w, f, t, b, b1, scales, panel + (t - s) * (b1 - b) * w_block);
            }
            const auto rows_at = [&](int64_t m, int which) {
                return Bf16Rows{static_cast<const char*>(p.x) + m * row_bytes,
                                f,
                                std::min(kBlockRows, m1 - m),
                                cols,
                                b,
                                b1,
                                converted[which]};
            };
            const Bf16Rows first = rows_at(m0, 0);
            p.k.convert(first, 0, first.rows);
            int which = 0;
            for (int64_t m = m0; m < m1; m += kBlockRows, which ^= 1) {
                Bf16Block block{f,    converted[which], panel, std::min(kBlockRows, m1 - m), b1 - b,
                                width};
                block.bias = p.bias ? bias : nullptr;
                block.more = b > 0;
                block.y_stride = w.rows;
                block.y_type = p.y_type;
                const int64_t y_bytes = p.y_type == Type::f32 ? 4 : 2;
                char* y = static_cast<char*>(p.y) + (m * w.rows + n) * y_bytes;
                if (apart) {
                    block.sums = sums + (parts_of_sums ? m - m0 : 0) * wide * kStripRows;
                    block.stride = kStripRows;
                    block.strip_stride = kBlockRows * kStripRows;
                    if (b1 == w.blocks) block.y = y;
                } else {
                    block.sums = reinterpret_cast<float*>(y);
                    block.stride = w.rows;
                    block.strip_stride = kStripRows;
                }
                if (scales_sums(f)) {
                    block.row_scale = p.row_scale ? p.row_scale + m : kOnes;
                    block.scale = factors;
                }
                const Bf16Rows next = rows_at(m + kBlockRows, which ^ 1);
                if (m + kBlockRows < m1) block.next = &next;
                p.k.multiply(block);
                if (b1 == w.blocks) on(m, m + block.rows, n, n + width);
            }
        }
    }
}

}  // namespace dqw
