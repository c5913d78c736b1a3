// y (m, rows) = x (m, cols) W^T + bias in bfloat16, sums in float32: in which order, and which part
// is whose.
//
// A panel of W, as much as stays in a core's second cache, is decoded once and met by block after
// block of 32 rows of x, converted on the way and kept in the first cache. Nothing is shared: a
// thread decodes what it needs, which costs about what fetching it from another core would.
#pragma once

#include <algorithm>

#include "bf16.h"

namespace dqw {

constexpr int64_t kStripRows = 32, kBlockRows = 32;   // of W, of x
constexpr int64_t kBlockBytes = kStripRows * 64 * 2;  // 64 columns of either
constexpr int64_t kDeepest = 24;                      // blocks of a panel

inline int64_t strip_count(const Packed& w) { return (w.rows + kStripRows - 1) / kStripRows; }

// Panels are so many blocks of 64 columns deep and so many strips wide.
inline int64_t panel_blocks(const Packed& w) {
    const int64_t chunks = std::max<int64_t>((w.blocks + kDeepest - 1) / kDeepest, 1);
    return (w.blocks + chunks - 1) / chunks;
}
inline int64_t panel_strips(const Bf16Kernels& k, const Packed& w) {
    const int64_t bytes = kBlockBytes * std::max<int64_t>(panel_blocks(w), 1);
    return std::clamp<int64_t>(k.panel_bytes / bytes, 1, std::max<int64_t>(strip_count(w), 1));
}

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
        const int64_t panels = (s + panel_strips(k, w) - 1) / panel_strips(k, w);
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
inline int64_t scratch_bytes(const Bf16Kernels& k, const Packed& w, Type y_type, int64_t rows) {
    const int64_t blocks = panel_blocks(w), strips = panel_strips(k, w);
    const int64_t groups = w.group ? blocks * 64 / w.group + 2 : 1;
    const int64_t kept = blocks < w.blocks ? (rows + kBlockRows - 1) / kBlockRows : 1;
    const int64_t sums = y_type == Type::bf16 ? kept * kBlockRows * strips * kStripRows * 4 : 0;
    return (strips + 2) * blocks * kBlockBytes + (strips + groups) * kStripRows * 4 + sums;
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
    const int64_t deep = panel_blocks(w), wide = panel_strips(p.k, w);
    const int64_t block_size = kBlockBytes / 2;  // numbers
    const bool rounds = p.y_type == Type::bf16, parts_of_sums = deep < w.blocks;
    uint16_t* panel = reinterpret_cast<uint16_t*>(scratch);
    uint16_t* converted[2] = {panel + wide * deep * block_size,
                              panel + (wide + 1) * deep * block_size};
    float* bias = reinterpret_cast<float*>(panel + (wide + 2) * deep * block_size);
    float* sums = bias + wide * kStripRows;
    const int64_t kept = !rounds ? 0 : parts_of_sums ? (m1 - m0 + 31) / 32 * 32 : kBlockRows;
    float* scales = sums + kept * wide * kStripRows;
    const int64_t row_bytes = w.cols * (p.x_type == Type::bf16 ? 2 : 4);
    for (int64_t s = strips * j / parts.strips; s < end; s += wide) {
        const int64_t s1 = std::min(s + wide, end), n = s * kStripRows;
        const int64_t width = std::min(s1 * kStripRows, w.rows) - n;
        for (int64_t c = 0; c < (s1 - s) * kStripRows && p.bias; c++) {
            bias[c] = c < width ? p.bias[n + c] : 0.0f;
        }
        for (int64_t b = 0; b < w.blocks; b += deep) {
            const int64_t b1 = std::min(b + deep, w.blocks);
            for (int64_t t = s; t < s1; t++) {
                p.k.decode(w, t, b, b1, scales, panel + (t - s) * (b1 - b) * block_size);
            }
            const auto rows_at = [&](int64_t m, int which) {
                return Bf16Rows{static_cast<const char*>(p.x) + m * row_bytes,
                                p.x_type,
                                std::min(kBlockRows, m1 - m),
                                w.cols,
                                b,
                                b1,
                                converted[which]};
            };
            const Bf16Rows first = rows_at(m0, 0);
            p.k.convert(first, 0, first.rows);
            int which = 0;
            for (int64_t m = m0; m < m1; m += kBlockRows, which ^= 1) {
                Bf16Block block{converted[which], panel, std::min(kBlockRows, m1 - m), b1 - b,
                                width};
                block.bias = p.bias ? bias : nullptr;
                block.more = b > 0;
                if (rounds) {
                    block.stride = wide * kStripRows;
                    block.sums = sums + (parts_of_sums ? m - m0 : 0) * block.stride;
                    block.y_stride = w.rows;
                    if (b1 == w.blocks) block.y = static_cast<uint16_t*>(p.y) + m * w.rows + n;
                } else {
                    block.stride = w.rows;
                    block.sums = static_cast<float*>(p.y) + m * w.rows + n;
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
