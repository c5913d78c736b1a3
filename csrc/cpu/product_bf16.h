// y (m, rows) = x (m, cols) W^T + bias in bfloat16, sums in float32: in which order, and which part
// is whose.
//
// A panel of W, as much as stays in a core's second cache, is decoded once and met by block after
// block of 32 rows of x, converted on the way and kept in the first cache. Nothing is shared: a
// thread decodes what it needs, which costs about what fetching it from another core would.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace dqw {

constexpr int64_t kStripRows = 32, kBlockRows = 32;      // of W, of x
constexpr int64_t kBlockBytes = kStripRows * 64 * 2;     // 64 columns of either
constexpr int64_t kPanelBytes = 1 << 19, kDeepest = 24;  // blocks

// Panels are so many blocks of 64 columns deep and so many strips wide.
inline int64_t panel_blocks(const Packed& w) {
    const int64_t chunks = std::max<int64_t>((w.blocks + kDeepest - 1) / kDeepest, 1);
    return (w.blocks + chunks - 1) / chunks;
}
inline int64_t panel_strips(const Packed& w) {
    return std::max<int64_t>(kPanelBytes / kBlockBytes / std::max<int64_t>(panel_blocks(w), 1), 1);
}
inline int64_t strip_count(const Packed& w) { return (w.rows + kStripRows - 1) / kStripRows; }

// Rows of x and strips of W are each cut into so many parts: a thread for every pair.
struct Parts {
    int64_t rows, strips;
};
inline Parts parts_of(const Bf16Kernels& k, const Packed& w, int64_t m, int64_t threads) {
    // Cycles of one core: decoding 64 columns of a strip, and reading those of 32 rows of x.
    constexpr int64_t kDecode = 500, kConvert = 600;
    const int64_t blocks = (m + kBlockRows - 1) / kBlockRows, strips = strip_count(w);
    Parts best{1, 1};
    int64_t least = INT64_MAX;
    for (int64_t n = 1; n <= threads; n++) {
        if (threads % n) continue;
        const int64_t s = (strips + n - 1) / n, r = (blocks + threads / n - 1) / (threads / n);
        const int64_t panels = (s + panel_strips(w) - 1) / panel_strips(w);
        const int64_t cost = s * (kDecode + r * k.cycles) + r * panels * kConvert;
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
    Type x_type;  // float32 or bfloat16
    int64_t m;
    void* y;
    Type y_type;  // the same
};

// Bytes of scratch for a part of so many rows.
inline int64_t scratch_bytes(const Packed& w, Type y_type, int64_t rows) {
    const int64_t blocks = panel_blocks(w), strips = std::min(panel_strips(w), strip_count(w));
    const int64_t groups = w.group ? blocks * 64 / w.group + 2 : 1;
    const int64_t kept = blocks < w.blocks ? (rows + kBlockRows - 1) / kBlockRows : 1;
    const int64_t sums = y_type == Type::bf16 ? kept * kBlockRows * strips * kStripRows * 4 : 0;
    return (strips + 1) * (blocks * kBlockBytes + kStripRows * 4) + groups * kStripRows * 4 + sums +
           64;
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
    const int64_t deep = panel_blocks(w), wide = std::min(panel_strips(w), strips);
    uint16_t* panel = reinterpret_cast<uint16_t*>(scratch);
    uint16_t* converted = panel + wide * deep * (kBlockBytes / 2);
    float* bias = reinterpret_cast<float*>(converted + deep * (kBlockBytes / 2));
    float* own_sums = bias + (wide + 1) * kStripRows;
    const int64_t kept = p.y_type == Type::bf16 ? (deep < w.blocks ? m1 - m0 : kBlockRows) : 0;
    float* scales =
        own_sums + (kept + kBlockRows - 1) / kBlockRows * kBlockRows * wide * kStripRows;
    const int64_t x_bytes = p.x_type == Type::bf16 ? 2 : 4;
    if (m0 >= m1) return;
    for (int64_t s = strips * j / parts.strips; s < end; s += wide) {
        const int64_t s1 = std::min(s + wide, end), n = s * kStripRows;
        const int64_t width = std::min(s1 * kStripRows, w.rows) - n;
        for (int64_t c = 0; c < (s1 - s) * kStripRows && p.bias; c++) {
            bias[c] = c < width ? p.bias[n + c] : 0.0f;
        }
        for (int64_t b = 0; b < w.blocks; b += deep) {
            const int64_t b1 = std::min(b + deep, w.blocks);
            for (int64_t t = s; t < s1; t++) {
                p.k.decode(w, t, b, b1, scales, panel + (t - s) * (b1 - b) * (kBlockBytes / 2));
            }
            for (int64_t m = m0; m < m1; m += kBlockRows) {
                Bf16Block block{converted, panel, std::min(kBlockRows, m1 - m), b1 - b, width};
                block.bias = p.bias ? bias : nullptr;
                block.more = b > 0;
                if (p.y_type == Type::f32) {
                    block.sums = static_cast<float*>(p.y) + m * w.rows + n;
                    block.stride = w.rows;
                } else {
                    block.stride = wide * kStripRows;
                    block.sums = own_sums + (deep < w.blocks ? m - m0 : 0) * block.stride;
                }
                p.k.convert(static_cast<const char*>(p.x) + m * w.cols * x_bytes, p.x_type,
                            block.rows, w.cols, b, b1, converted);
                p.k.multiply(block);
                if (b1 < w.blocks) continue;
                if (p.y_type == Type::bf16) {
                    p.k.round(block, static_cast<uint16_t*>(p.y) + m * w.rows + n, w.rows);
                }
                on(m, m + block.rows, n, n + width);
            }
        }
    }
}

}  // namespace dqw
