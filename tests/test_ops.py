"""The operators' contract on whatever backend serves: opcheck, compile, gradients."""

import pytest
import torch
from torch.library import opcheck

from dqw import grids, ops, reference
from dqw.linear import QuantLinear
from dqw.ops_cuda import _check_packed
from dqw.packing import pack
from dqw.recipe import QuantSpec
from tests.kernel_helpers import all_grids


def packed(rows: int, cols: int, bits: int, grid: str = "apot", group_size: int = 0):  # type: ignore[no-untyped-def]
    """A random packed weight: (weight, scale, levels)."""
    codes = torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8)
    groups = -(-cols // group_size) if group_size else 1
    dtype = torch.float16 if group_size else torch.float32
    scale = (torch.rand(rows, groups) * 0.02 + 0.001).to(dtype)
    return pack(codes, bits), scale, grids.levels(grid, bits)


def scale_shape(rows: int, cols: int, granularity: str) -> tuple[tuple[int, int], int]:
    if granularity == "tensor":
        return (1, 1), 0
    if granularity == "channel":
        return (rows, 1), 0
    size = int(granularity)
    return (rows, -(-cols // size)), size


@pytest.mark.parametrize("granularity", ["tensor", "channel", "32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_opcheck_fake_quant(granularity: str, dtype: torch.dtype) -> None:
    shape, size = scale_shape(5, 70, granularity)
    x = torch.randn(5, 70).to(dtype).requires_grad_()
    scale = (torch.rand(shape) * 0.2 + 0.05).requires_grad_()
    bucket = grids.bucket("apot", 4)
    opcheck(ops.fake_quant, (x, scale, bucket, size))
    clip, grad = scale.detach() * 10, torch.randn(5, 70)
    window = torch.tensor([0.06, 0.2]) if size else None
    for other in (torch.float32, torch.bfloat16):
        opcheck(ops.fake_quant_clip, (x.detach(), clip, bucket, window, size, other))
        args = (grad.to(other), x.detach(), clip, bucket, window, size, 0.1)
        opcheck(ops.fake_quant_clip_backward, args)
    many = [x.detach(), x.detach()[:3]], [clip, clip[:3]], [bucket] * 2
    windows = [torch.tensor([0.06, 0.2])] * 2
    opcheck(ops.fake_quant_clips, (*many, windows, [size] * 2, dtype))
    grads = [grad, grad[:3]]
    opcheck(ops.fake_quant_clips_backward, (grads, *many, windows, [size] * 2, [0.1, 0.2]))
    opcheck(ops.quantize, (x.detach(), scale.detach(), bucket, size))


def test_opcheck_the_others() -> None:
    weight, scale, levels = packed(6, 70, 3, group_size=32)
    x, bias = torch.randn(2, 3, 70, requires_grad=True), torch.randn(6, requires_grad=True)
    opcheck(ops.fake_quant_activation, (x,))
    opcheck(ops.dequantize, (weight, scale, levels, 6, 70, 3, 32))
    opcheck(
        torch.ops.dqw.quant_embedding.default,
        (torch.tensor([[0, 5]]), weight, scale, levels, 6, 70, 3, 32),
    )
    for int8 in (False, True):
        for b in (bias, None):
            args = (x, weight, scale, levels, b, 6, 3, 32, int8)
            opcheck(torch.ops.dqw.quant_linear.default, args)


@pytest.mark.parametrize(("grid", "bits"), [g for g in all_grids() if g[1] not in (6, 7)])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "64"])
def test_gradient_is_rcf_in_closed_form(grid: str, bits: int, granularity: str) -> None:
    """dx = g inside the clip; dclip = Σ g × (sign(x) outside, (q - x)/clip inside): RCF."""
    rows, cols = 4, 100
    shape, size = scale_shape(rows, cols, granularity)
    top = grids.level_max(grid, bits)
    x = torch.randn(rows, cols, requires_grad=True)
    clip = (torch.rand(shape) + 0.7).requires_grad_()
    g = torch.randn(rows, cols)
    q = ops.fake_quant(x, clip / top, grids.bucket(grid, bits), size)
    q.backward(g)
    wide = clip.detach().repeat_interleave(size, 1)[:, :cols] if size else clip.detach()
    wide = wide.expand(rows, cols)
    inside = x.detach().abs() <= wide
    assert torch.equal(x.grad, torch.where(inside, g, 0.0))
    per_weight = g * torch.where(inside, (q - x).detach() / wide, x.detach().sign())
    if size:
        pad = torch.nn.functional.pad(per_weight, (0, -cols % size))
        expected = pad.view(rows, -1, size).sum(-1)
    else:
        expected = per_weight.sum(1, keepdim=True) if granularity == "channel" else per_weight.sum()
    torch.testing.assert_close(clip.grad, expected.view(shape), rtol=2e-5, atol=2e-5)


def test_gradient_of_the_clip_by_finite_differences() -> None:
    """The codes fixed, q = level × clip / top is smooth in the clip: central differences agree
    outside the clip, and inside with the straight-through part, -x/clip, taken off."""
    top, bucket = 10, grids.bucket("apot", 4)
    x = torch.tensor([[-2.0, -0.33, 0.02, 0.48, 0.71, 1.7]])
    clip = torch.tensor([[1.0]], requires_grad=True)
    g = torch.randn_like(x)
    ops.fake_quant(x, clip / top, bucket, 0).backward(g)
    h = 1e-3
    low, high = (ops.fake_quant(x, (clip.detach() + d) / top, bucket, 0) for d in (-h, h))
    numeric = (high - low) / (2 * h)
    inside = x.abs() <= 1
    expected = (g * torch.where(inside, numeric - x, numeric)).sum()
    torch.testing.assert_close(clip.grad.sum(), expected, rtol=1e-3, atol=1e-3)


def test_nan_stays_and_infinity_clips() -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.1]])
    y = ops.fake_quant(x, torch.tensor([[0.1]]), grids.bucket("apot", 4), 0)
    assert y[0, 0].isnan() and torch.allclose(y[0, 1:], torch.tensor([1.0, -1.0, 0.1]))


@pytest.mark.parametrize("group_size", [0, 16, 32, 64, 128])
@pytest.mark.parametrize("bits", range(2, 9))
def test_identity_activations_give_the_dequantized_weight(bits: int, group_size: int) -> None:
    weight, scale, levels = packed(7, 129, bits, group_size=group_size)
    w = ops.dequantize(weight, scale, levels, 7, 129, bits, group_size)
    assert torch.equal(w, reference.dequantize(weight, scale, levels, 7, 129, bits, group_size))
    y = ops.quant_linear(torch.eye(129), weight, scale, levels, None, 7, bits, group_size, False)
    assert torch.equal(y, w.T)


def test_quant_linear_passes_gradients_to_input_and_bias() -> None:
    weight, scale, levels = packed(6, 70, 4)
    x, bias = torch.randn(2, 3, 70, requires_grad=True), torch.randn(6, requires_grad=True)
    g = torch.randn(2, 3, 6)
    ops.quant_linear(x, weight, scale, levels, bias, 6, 4, 0, False).backward(g)
    w = ops.dequantize(weight, scale, levels, 6, 70, 4, 0)
    torch.testing.assert_close(x.grad, g @ w)
    torch.testing.assert_close(bias.grad, g.sum((0, 1)))


def test_compiles_whole_and_once_for_all_batch_sizes() -> None:
    weight, scale, levels = packed(6, 70, 4)
    graphs = 0

    def count(graph, inputs):  # type: ignore[no-untyped-def]
        nonlocal graphs
        graphs += 1
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def run(x: torch.Tensor) -> torch.Tensor:
        return ops.quant_linear(x, weight, scale, levels, None, 6, 4, 0, True)

    for m in (11, 3, 17, 64):  # 11: no other size here, which would be taken for the same
        run(torch.randn(m, 70))
    assert graphs == 1


def test_backend_info_names_every_operator() -> None:
    info = ops.backend_info()
    assert set(info) >= {"fake_quant", "quant_linear", "quant_embedding", "dequantize"}
    assert all(row["cpu"] and row["cuda"] for row in info.values())


def test_a_tiny_row_is_a_row_of_zeros() -> None:
    x = torch.full((1, 64), 1e-38)
    assert torch.equal(ops.fake_quant_activation(x), torch.zeros(1, 64))
    assert torch.equal(reference.fake_quant_activation(x), torch.zeros(1, 64))


@pytest.mark.parametrize("gelu", [False, True])
def test_layers_that_share_their_input(gelu: bool) -> None:
    """Query, key and value in one call: the same as three, on every backend."""
    x, parts = torch.randn(2, 70), [packed(n, 70, 4, group_size=32) for n in (6, 3, 9)]
    biases, rows = [torch.randn(6), None, torch.randn(9)], [6, 3, 9]
    weights, scales, levels = [p[0] for p in parts], [p[1] for p in parts], parts[0][2]
    args = (x, weights, scales, levels, biases, rows, 4, 32, gelu)
    for got, (w, s, table), b, n in zip(ops.quant_linears(*args), parts, biases, rows):
        want = ops.quant_linear(x, w, s, table, b, n, 4, 32, False)
        assert torch.equal(got, torch.nn.functional.gelu(want) if gelu else want)
    opcheck(ops.quant_linears, args)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3, 0)])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("group_size", [0, 32])
def test_rows_without_columns_give_the_bias(
    shape: tuple[int, ...], int8: bool, group_size: int
) -> None:
    weight, _, levels = packed(6, 0, 4, group_size=group_size)
    scale, bias = torch.ones(6, 0 if group_size else 1), torch.randn(6)
    for linear in (ops.quant_linear, reference.quant_linear):
        y = linear(torch.ones(shape), weight, scale, levels, bias, 6, 4, group_size, int8)
        assert torch.equal(y, bias.expand(*shape[:-1], 6))


@pytest.mark.parametrize("cols", [69, 71, 128])
def test_a_layer_takes_its_own_width_alone(cols: int) -> None:
    """Rows of 70 are packed as 128."""
    layer = QuantLinear.from_linear(torch.nn.Linear(70, 6), QuantSpec(grid="lloyd"))
    layer.freeze()
    with pytest.raises(RuntimeError, match=f"x has {cols} columns, and the layer takes 70"):
        layer(torch.randn(2, cols))


def test_a_gpu_kernel_reads_one_device_alone() -> None:
    """Checked before a launch; without a GPU, `meta` is another device than the CPU."""
    weight, scale, levels = packed(6, 64, 4)
    sizes = (6, 64, 4, 0)
    _check_packed(weight, scale, levels, *sizes, torch.ones(1, 64), None)
    for tensors in ((scale.to("meta"), levels), (scale, levels.to("meta"))):
        with pytest.raises(ValueError, match="on meta: move the model and its input to one device"):
            _check_packed(weight, *tensors, *sizes)
    with pytest.raises(ValueError, match="to one device"):
        _check_packed(weight, scale, levels, *sizes, torch.ones(1, 64, device="meta"))
    with pytest.raises(ValueError, match="contiguous int16"):
        _check_packed(weight, scale, levels.repeat_interleave(2)[::2], *sizes)
