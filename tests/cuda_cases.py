"""What the GPU's kernels must do, on a GPU or in Triton's interpreter.

`python tests/cuda_cases.py NAME cpu` runs one case in the interpreter (TRITON_INTERPRET=1, which
must be set before Triton is imported: that is why these are not tests themselves), `… NAME cuda` on
a GPU. Small shapes: the interpreter is slow.
"""

import sys

import decoder_step_cases
import torch
from kernel_helpers import random_scale, random_weight
from torch import Tensor

from dqw import grids, ops_cuda, packing, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ON_CPU = {
    "fake_quant": ops_cuda.fake_quant,
    "fake_quant_clip": ops_cuda.fake_quant_clip,
    "fake_quant_backward": ops_cuda.fake_quant_backward,
    "fake_quant_clip_backward": ops_cuda.fake_quant_clip_backward,
    "quant_linear": ops_cuda.quant_linear,
    "dequantize": ops_cuda.dequantize,
    "quant_embedding": ops_cuda.quant_embedding,
}


def call(name: str, device: str, *args: object):  # type: ignore[no-untyped-def]
    """The operator on ``device``; in the interpreter the function that CUDA tensors would reach."""
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    function = ON_CPU[name] if device == "cpu" else getattr(torch.ops.dqw, name)
    found = function(*moved)
    return found.cpu() if isinstance(found, Tensor) else tuple(t.cpu() for t in found)


def close(got: Tensor, want: Tensor, device: str) -> None:
    """Equal; the interpreter cuts bfloat16 off where a GPU rounds: one unit in the last place."""
    if device == "cpu" and got.dtype == torch.bfloat16:
        torch.testing.assert_close(got, want, rtol=2**-7, atol=0.0)
    else:
        assert torch.equal(got, want)


def identity(device: str) -> None:
    """Identity activations give the exact weights, rounded once, whatever kernel serves."""
    for bits in range(2, 9):
        levels = grids.levels("apot", bits)
        for dtype in DTYPES:
            for granularity in ("channel", "16", "64", "32" if bits % 2 else "96"):
                rows, cols = 19, 70
                weight, _ = random_weight(rows, cols, bits, levels)
                scale, group = random_scale(rows, cols, granularity)
                w = reference.dequantize(weight, scale, levels, rows, cols, bits, group)
                for part in (slice(0, 1), slice(62, 70)):
                    x = torch.eye(cols, dtype=dtype)[part]
                    y = call("quant_linear", device, x, weight, scale, levels, None, rows, bits,
                             group, False)  # fmt: skip
                    close(y, w.T[part].to(dtype), device)


def error(device: str) -> None:
    """At most twice the error of the plain computation in the same dtype, against float64."""
    shapes = [(1, 33, 1023), (7, 20, 130), (17, 9, 200), (64, 5, 7), (65, 7, 64), (130, 3, 65)]
    for n, (m, rows, cols) in enumerate(shapes):
        for dtype in DTYPES:
            bits, granularity = 2 + (n + 2) % 7, ("channel", "16", "tensor", "64", "24")[n % 5]
            levels = grids.levels("apot", bits)
            weight, _ = random_weight(rows, cols, bits, levels)
            scale, group = random_scale(rows, cols, granularity, 0.1)
            w = reference.dequantize(weight, scale, levels, rows, cols, bits, group)
            x, bias = torch.randn(m, cols).to(dtype), torch.randn(rows).to(dtype)
            exact = x.double() @ w.double().T + bias.double()
            plain = torch.nn.functional.linear(x, w.to(dtype), bias)
            y = call("quant_linear", device, x, weight, scale, levels, bias, rows, bits, group,
                     False)  # fmt: skip
            off, allowed = (y - exact).abs().max(), 2 * (plain - exact).abs().max()
            floor = torch.finfo(dtype).eps * exact.abs().max() * (1 if device == "cpu" else 0.5)
            assert off <= allowed + floor, (m, rows, cols, dtype, off, allowed)


def int8(device: str) -> None:
    """Integer sums: bit for bit the reference's without groups, a few units off with them."""
    for bits, grid in ((2, "apot"), (4, "apot"), (5, "pot"), (8, "apot")):
        levels = grids.levels(grid, bits)
        for m, rows, cols, kind in (
            (1, 17, 700, "channel"), (5, 9, 65, "channel"), (33, 20, 7, "channel"),
            (3, 5, 200, "64"), (3, 5, 200, "16"), (130, 70, 64, "channel"),
        ):  # fmt: skip
            weight, _ = random_weight(rows, cols, bits, levels)
            scale, group = random_scale(rows, cols, kind, 0.1)
            x, bias = torch.randn(m, cols), torch.randn(rows)
            args = (x, weight, scale, levels, bias, rows, bits, group, True)
            want, got = reference.quant_linear(*args), call("quant_linear", device, *args)
            if group:
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max())
            else:
                assert torch.equal(got, want), (bits, m, (got - want).abs().max())


def edges(device: str) -> None:
    """No rows, no columns, other shapes and strides, NaN and infinity, an odd group in int8."""
    levels = grids.levels("apot", 4)
    weight, _ = random_weight(9, 40, 4, levels)
    scale, _ = random_scale(9, 40, "channel")
    rest = (weight, scale, levels, None, 9, 4, 0)
    for x in (torch.randn(40), torch.randn(2, 3, 40), torch.randn(40, 5).T, torch.randn(2, 0, 40)):
        for int8_activations in (False, True):
            got = call("quant_linear", device, x, *rest, int8_activations)
            want = reference.quant_linear(x, *rest, int8_activations)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    x = torch.randn(4, 40)
    x[0, 3], x[1, 39] = float("nan"), float("inf")
    for int8_activations in (False, True):
        got = call("quant_linear", device, x, *rest, int8_activations)
        assert got[0].isnan().all() and not got[1].isfinite().any() and got[2:].isfinite().all()
    zeros = call("quant_linear", device, torch.zeros(2, 40), *rest, True)
    assert torch.equal(zeros, torch.zeros(2, 9))
    none = call("quant_linear", device, torch.randn(3, 40), weight[:0], scale[:0], levels, None, 0,
                4, 0, False)  # fmt: skip
    assert none.shape == (3, 0)
    bias = torch.randn(9)
    for int8_activations in (False, True):
        empty = call("quant_linear", device, torch.randn(3, 0), weight[:0], scale, levels, bias, 9,
                     4, 0, int8_activations)  # fmt: skip
        assert torch.equal(empty, bias.expand(3, 9))
    every_other = torch.randn(18)[::2]
    x = torch.randn(2, 40)
    args = (weight, scale, levels, every_other, 9, 4, 0, False)
    want = reference.quant_linear(x, *args)
    torch.testing.assert_close(call("quant_linear", device, x, *args), want, rtol=1e-5, atol=1e-5)
    for wrong in ({0: weight[:-1]}, {1: torch.ones(9, 2)}, {2: levels[:8]}, {3: torch.ones(8)}):
        args = [wrong.get(i, value) for i, value in enumerate(rest)]
        try:
            call("quant_linear", device, torch.randn(2, 40), *args, False)
        except ValueError:
            continue
        raise AssertionError(wrong)


def tables(device: str) -> None:
    """dequantize and quant_embedding: bit for bit, any group size; an unknown id is NaN."""
    for bits in range(2, 9):
        levels = grids.levels("pot", bits)
        for granularity in ("tensor", "channel", "16", "32", "24"):
            weight, _ = random_weight(9, 130, bits, levels)
            scale, group = random_scale(9, 130, granularity)
            args = (weight, scale, levels, 9, 130, bits, group)
            assert torch.equal(call("dequantize", device, *args), reference.dequantize(*args))
            ids = torch.tensor([[3, 0], [8, 3]])
            want = reference.quant_embedding(ids, *args)
            assert torch.equal(call("quant_embedding", device, ids, *args), want)
            odd = call("quant_embedding", device, torch.tensor([9, -1, 8]), *args)
            assert odd[:2].isnan().all() and torch.equal(odd[2], want[1, 0])
    assert call("quant_embedding", device, ids[:0], *args).shape == (0, 2, 130)


def fake_quant(device: str) -> None:
    """Forward bit for bit, NaN, infinity and signs too; dx exactly; dscale the same every time."""
    kinds = [("apot", 4, torch.float32), ("apot", 3, torch.float16), ("pot", 5, torch.float32),
             ("uniform", 8, torch.bfloat16), ("lloyd", 3, torch.float32)]  # fmt: skip
    for grid, bits, dtype in kinds:
        bucket, top = grids.bucket(grid, bits), grids.level_max(grid, bits)
        shapes = [(3, 7, "channel"), (3, 9, "tensor"), (2, 65, "16"), (2, 65, "32"),
                  (1, 130, "64"), (2, 1030, "channel"), (1, 9001, "tensor")]  # fmt: skip
        if bits in (4, 8):
            # Units across rows: the last program is not full, one begins within a row or a segment.
            shapes += [(37, 65, "16"), (5, 384, "channel"), (3, 3072, "channel"), (2, 7000, "3000"),
                       (43, 192, "48")]  # fmt: skip
        for rows, cols, granularity in shapes:
            scale, group = random_scale(rows, cols, granularity, 1 / top)
            x, grad = torch.randn(rows, cols).to(dtype), torch.randn(rows, cols).to(dtype)
            x[0, :4] = torch.tensor([0.0, float("inf"), -float("inf"), -0.0])
            nan = x.clone()
            nan[0, 5] = float("nan")
            large = device == "cpu" and x.numel() > 200  # the interpreter takes its time
            for value in (nan,) if large else (x, nan, x.T.contiguous().T):
                args = (value, scale, bucket, group)
                got, want = call("fake_quant", device, *args), reference.fake_quant(*args)
                known = ~value.isnan()
                close(got[known], want[known], device)
                assert got[~known].isnan().all()
                assert torch.equal(got[known].signbit(), want[known].signbit())
                dx, ds = call("fake_quant_backward", device, grad, *args)
                want_dx, want_ds = reference.fake_quant_backward(grad, *args)
                assert torch.equal(dx, want_dx)
                slack = 1e-4 * top * cols**0.5
                torch.testing.assert_close(ds, want_ds, rtol=1e-4, atol=slack, equal_nan=True)
                again = call("fake_quant_backward", device, grad, *args)[1]
                assert torch.equal(again.nan_to_num(), ds.nan_to_num())


def odd_clips(scale: Tensor, bucket: Tensor, group: int) -> tuple[Tensor, Tensor | None]:
    """Clips whose scales are ``scale`` but for a few: beside and below SMALLEST_SCALE, negative,
    NaN; and the window of groups, which cuts both ends off."""
    top = bucket.numel() // 2
    clip, window = scale * top, None
    if group:
        window = torch.stack([scale.quantile(0.2), scale.quantile(0.8)])
    odd = torch.tensor([1.0, 1 - 2**-22, 1 + 2**-22, 0.0, -1.0, 2.0**-9])
    last = clip.view(-1)[-len(odd) :]
    if clip.numel() > 1:
        last.copy_(odd[: last.numel()] * packing.SMALLEST_SCALE * top)
    if clip.numel() > 8:
        clip.view(-1)[1] = float("nan")
    return clip, window


def fake_quant_clip(device: str) -> None:
    """Forward and dx bit for bit, whatever dtypes come and are asked for; dclip up to the order of
    its sum, and the same every time."""
    shapes = [(3, 7, "channel"), (5, 9, "tensor"), (9, 65, "16"), (5, 130, "48"), (12, 64, "32")]
    if device != "cpu":  # the interpreter takes its time
        shapes += [(0, 768, "channel"), (4, 0, "channel"), (4, 0, "16"), (37, 768, "channel"),
                   (37, 768, "16"), (130, 768, "64"), (67, 1280, "128"), (9, 3072, "channel"),
                   (6, 5120, "channel"), (1, 1023, "64"), (2, 40000, "channel"), (5, 768, "256"),
                   (1030, 384, "tensor"), (3, 9001, "tensor")]  # fmt: skip
    grid_kinds = [("apot", 4), ("lloyd", 4), ("uniform", 8), ("apot", 8), ("pot", 5)]
    kinds = [(a, b) for a in DTYPES for b in DTYPES]
    for n, (rows, cols, granularity) in enumerate(shapes):
        grid, bits = grid_kinds[n % 5]
        bucket, top = grids.bucket(grid, bits), grids.level_max(grid, bits)
        scale, group = random_scale(rows, cols, granularity, 1 / top)
        clip, window = odd_clips(scale, bucket, group) if scale.numel() else (scale, None)
        for dtype, other in kinds if device != "cpu" else kinds[n :: len(shapes)]:
            x, grad = torch.randn(rows, cols).to(dtype), torch.randn(rows, cols).to(other)
            if x.numel():
                x[0, :6] = torch.tensor([0.0, torch.inf, -torch.inf, -0.0, torch.nan, 1e-30])
                if granularity == "tensor":  # or its one sum would be NaN
                    x[0, 4] = 0.5
            args = (clip, bucket, window, group)
            want = reference.fake_quant_clip(x, *args, other)
            want_dx, want_dclip = reference.fake_quant_clip_backward(grad, x, *args, 0.25)
            got = call("fake_quant_clip", device, x, *args, other)
            assert got.dtype == other and torch.equal(got.isnan(), want.isnan())
            cut = device == "cpu" and torch.bfloat16 in (dtype, other)  # as in close
            torch.testing.assert_close(
                got, want, rtol=2**-7 if cut else 0.0, atol=0.0, equal_nan=True
            )
            assert torch.equal(got.signbit()[~got.isnan()], want.signbit()[~got.isnan()])
            dx, dclip = call("fake_quant_clip_backward", device, grad, x, *args, 0.25)
            where = (rows, cols, granularity, dtype, other)
            assert dx.dtype == dtype and torch.equal(dx, want_dx), where
            slack = 1e-4 * cols**0.5
            torch.testing.assert_close(
                dclip, want_dclip, rtol=1e-4, atol=slack, equal_nan=True, msg=str(where)
            )
            assert torch.equal(dclip == 0, want_dclip == 0), where
            again = call("fake_quant_clip_backward", device, grad, x.T.contiguous().T, *args, 0.25)
            assert all(
                torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(again, (dx, dclip))
            )


CASES = {f.__name__: f for f in (fake_quant, fake_quant_clip, identity, error, int8, edges, tables)}
CASES |= decoder_step_cases.CASES

if __name__ == "__main__":
    torch.manual_seed(0)
    CASES[sys.argv[1]](sys.argv[2])
    print("same")
