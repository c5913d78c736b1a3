// A tile of W: kTileRows packed rows, transposed so that a register holds the same columns of W
// (lanes) of them.
#pragma once

namespace dqw {
namespace {

constexpr int kTileRows = kTileVectors * W;

// Decode rows n … n + kTileRows: for every 4 columns, a register with a lane of 4 bytes for each of
// W rows. `level` turns the codes of a block into bytes; `put(unit, t, bytes)` gets columns
// 4 unit … 4 unit + 3 of rows n + t W …
//
// At 4 bits whole registers of packed codes are transposed, half as many as decoded ones: a lane
// then holds the columns of two units, as lower and as upper halves of its bytes.
template <int B, class Level, class Put>
DQW_INLINE void fill_tile(const Packed& w, int64_t n, const Level& level, const Put& put) {
    constexpr int kWhole = B == 4 ? W / 8 : 0;  // blocks of a register of packed codes
    for (int t = 0; t < kTileVectors; t++) {
        const uint8_t* row[W];
        for (int r = 0; r < W; r++) {
            const int64_t i = n + t * W + r;
            row[r] = w.data + (i < w.rows ? i : w.rows - 1) * w.row_bytes;
        }
        int64_t b = 0;
        if constexpr (kWhole > 0) {
            for (; b + kWhole <= w.blocks; b += kWhole) {
                i32 v[W];
                unroll<W>([&](auto r)
                              DQW_INLINED { v[r.value] = load_int(row[r.value] + b * 8 * B); });
                transpose(v);
                unroll<W>([&](auto i) DQW_INLINED {
                    const int64_t unit = (b + i.value / 8) * 16 + i.value % 8;
                    put(unit, t, level.packed_low(v[i.value]));
                    put(unit + 8, t, level.packed_high(v[i.value]));
                });
            }
        }
        for (; b < w.blocks; b++) {
            i32 v[kParts][W];
            unroll<W>([&](auto r) DQW_INLINED {
                const Bytes decoded = level(codes<B>(row[r.value] + b * 8 * B));
                unroll<kParts>([&](auto p)
                                   DQW_INLINED { v[p.value][r.value] = decoded.part[p.value]; });
            });
            unroll<kParts>([&](auto p) DQW_INLINED {
                transpose(v[p.value]);
                unroll<W>([&](auto i) DQW_INLINED {
                    put((b * kParts + p.value) * W + i.value, t, v[p.value][i.value]);
                });
            });
        }
    }
}

}  // namespace
}  // namespace dqw
