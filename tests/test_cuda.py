"""Everything that needs a GPU: the cases of cuda_cases.py, and torch's own checks on CUDA tensors.

Skipped where there is none. `make gpu` runs this file, the bench, and compute-sanitizer.
"""

import copy

import pytest
import torch
from conftest import make_tiny_whisper
from cuda_cases import CASES
from kernel_helpers import random_scale, random_weight
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import dqw
from dqw import grids, ops, ops_cuda, packing, reference
from dqw.recipe import QuantConfig, QuantSpec, Recipe
from dqw.together import forget_together
from dqw.whisper.fast_model import speed_up

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_the_kernels_serve() -> None:
    """Else all the others would pass on the PyTorch reference."""
    assert not ops_cuda.reason and not ops_cuda.library_reason, ops_cuda.library_reason
    for name in ops_cuda.IN_LIBRARY:
        assert ops_cuda.kernel_of(name) == "CUDA C++"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dqw::{name}", "CUDA")


@pytest.mark.parametrize("case", CASES)
def test_case(case: str) -> None:
    CASES[case]("cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [0, 16, 32, 64, 128])
def test_case_gemv(group: int, dtype: torch.dtype) -> None:
    """CUDA C++: rows of the identity give the exact weights of three matrices, rounded once."""
    rows, cols = [24, 9, 51], 200
    kinds = [(bits, "apot") for bits in range(2, 9 if dtype == torch.float16 else 7)]
    for bits, grid in [*kinds, *((bits, "uniform") for bits in range(5, 9))]:
        levels = grids.levels(grid, bits).cuda()
        weights = [random_weight(n, cols, bits, levels.cpu())[0] for n in rows]
        scales = [random_scale(n, cols, str(group) if group else "channel")[0] for n in rows]
        scales = [packing.round_scales(s).half() if group else s for s in scales]
        w = [
            reference.dequantize(w, s, levels.cpu(), n, cols, bits, group)
            for w, s, n in zip(weights, scales, rows, strict=True)
        ]
        weights, scales = [t.cuda() for t in weights], [t.cuda() for t in scales]
        for start, rows_of_x in ((12, 32), (44, 16), (60, 24), (192, 16)):
            x = torch.eye(cols, dtype=dtype)[start : start + rows_of_x].cuda()
            assert ops_cuda.gemv_serves(x, weights, scales, levels, bits, group)
            found = ops.quant_linears(
                x, weights, scales, levels, [None] * 3, rows, bits, group, False
            )
            for y, exact in zip(found, w, strict=True):
                assert torch.equal(y.cpu(), exact.T[start : start + rows_of_x].to(dtype))


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("m", [1, 5, 8, 9, 16, 17, 32])
def test_case_gemv_error(m: int, gelu: bool) -> None:
    """At most twice the error of the plain computation in float16, with bias and GELU."""
    x, weight, scale, levels, bias, rows, bits, group, _ = arguments(
        4, "64", False, m, torch.float16
    )
    w = reference.dequantize(weight.cpu(), scale.cpu(), levels.cpu(), rows, 192, bits, group)
    (y,) = ops.quant_linears(x, [weight], [scale], levels, [bias], [rows], bits, group, gelu)
    exact = x.cpu().double() @ w.double().T + bias.cpu().double()
    plain = torch.nn.functional.linear(x, w.cuda().half(), bias)
    if gelu:
        exact, plain = (torch.nn.functional.gelu(t) for t in (exact, plain))
    off, allowed = ((t.cpu() - exact).abs().max() for t in (y, plain))
    assert off <= 2 * allowed + torch.finfo(torch.float16).eps * exact.abs().max() / 2


@pytest.mark.parametrize("m", [1, 16])
def test_case_gemv_plans(m: int) -> None:
    """Columns shared by one block or up to eight, in one round or several, of three matrices."""
    bits, cols, rows, levels = 4, 2624, [96, 40, 33], grids.levels("apot", 4)
    weights = [random_weight(n, cols, bits, levels)[0].cuda() for n in rows]
    scales = [packing.round_scales(random_scale(n, cols, "64", 0.1)[0]).half() for n in rows]
    scales, x = [s.cuda() for s in scales], torch.randn(m, cols).half().cuda()
    args = (x, weights, scales, levels.cuda(), [None] * 3, rows, bits, 64, False)
    plans = [(0, 0), (0, 8), (0, 5), (1, 8), (2, 3), (3, 1), (3, 3)]
    try:
        for plan in plans:
            torch.ops.dqw_cuda.force_plan(*plan)
            for y, w, s, n in zip(ops.quant_linears(*args), weights, scales, rows, strict=True):
                matrix = reference.dequantize(w.cpu(), s.cpu(), levels, n, cols, bits, 64)
                exact = x.cpu().double() @ matrix.double().T
                plain = torch.nn.functional.linear(x, matrix.half().cuda())
                off, allowed = ((t.cpu() - exact).abs().max() for t in (y, plain))
                floor = torch.finfo(torch.float16).eps * exact.abs().max() / 2
                assert off <= 2 * allowed + floor, (plan, n)
    finally:
        torch.ops.dqw_cuda.force_plan(0, 0)


def test_case_gemv_after_gemv() -> None:
    """A chain in a graph, where each starts before the one whose y it reads has ended."""
    levels = grids.levels("apot", 4)
    layers = [
        (random_weight(64, 64, 4, levels)[0].cuda(), torch.full((64, 1), 0.03).cuda())
        for _ in range(20)
    ]
    x, table = torch.randn(1, 64).half().cuda(), levels.cuda()

    def chain(wait: bool) -> Tensor:
        y = x
        for w, s in layers:
            y = ops.quant_linear(y, w, s, table, None, 64, 4, 0, False)
            if wait:
                torch.cuda.synchronize()
        return y

    want = chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(False)
    for _ in range(10):
        got.zero_()
        graph.replay()
        assert torch.equal(got, want) and got.isfinite().all()


def arguments(bits: int, granularity: str, int8: bool, m: int, dtype: torch.dtype) -> tuple:
    levels = grids.levels("apot", bits)
    weight, _ = random_weight(64, 192, bits, levels)
    scale, group = random_scale(64, 192, granularity, 0.1)
    scale = scale.half() if group else scale  # as frozen modules have them on a GPU
    x, bias = torch.randn(m, 192).to(dtype), torch.randn(64).to(dtype)
    tensors = [t.cuda() for t in (x, weight, scale, levels, bias)]
    return (*tensors, 64, bits, group, int8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 8, 16, 17, 64, 65, 1500])
@pytest.mark.parametrize("granularity", ["channel", "64"])
def test_opcheck(granularity: str, m: int, dtype: torch.dtype) -> None:
    for int8 in (False, True):
        torch.library.opcheck(
            torch.ops.dqw.quant_linear.default, arguments(4, granularity, int8, m, dtype)
        )


@pytest.mark.parametrize("granularity", ["tensor", "channel", "16"])
def test_fake_quant_from_the_clip(granularity: str) -> None:
    """opcheck, and a graph of both ways: what it gives is what the operators do."""
    clip, group = random_scale(96, 768, granularity)
    window = torch.tensor([0.03, 0.2]).cuda() if group else None
    clip, bucket = clip.cuda(), grids.bucket("apot", 4).cuda()
    x, grad = torch.randn(96, 768).cuda(), torch.randn(96, 768).cuda().bfloat16()
    forward = (x, clip, bucket, window, group, torch.bfloat16)
    backward = (grad, x, clip, bucket, window, group, 0.1)
    torch.library.opcheck(ops.fake_quant_clip, forward)
    torch.library.opcheck(ops.fake_quant_clip_backward, backward)
    want = [ops.fake_quant_clip(*forward), *ops.fake_quant_clip_backward(*backward)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [ops.fake_quant_clip(*forward), *ops.fake_quant_clip_backward(*backward)]
    for t in got:
        t.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_lowered_model_learns(dtype: torch.dtype) -> None:
    """``model.half()`` takes clips and windows along; a window's ends lose nothing."""
    spec = QuantSpec(bits=4, grid="apot", group_size=16)
    exact = dqw.QuantLinear.from_linear(torch.nn.Linear(64, 32), spec).cuda()
    lower = copy.deepcopy(exact).to(dtype)
    assert lower.quantizer.window.dtype == dtype
    assert torch.equal(lower.quantizer.window.float(), exact.quantizer.window)
    lower(torch.randn(3, 64, dtype=dtype).cuda()).sum().backward()
    assert lower.quantizer.clip.grad.isfinite().all()


def test_tensors_of_two_devices() -> None:
    for dtype in (torch.float32, torch.float16):
        x, weight, scale, levels, bias, *rest = arguments(4, "channel", False, 2, dtype)
        with pytest.raises(ValueError, match="move the model"):
            ops.quant_linear(x, weight, scale, levels.cpu(), bias, *rest)


def test_fake_quant_of_several() -> None:
    """In as few launches as they go, in a graph too: what each gives on its own."""
    kinds = [("tensor", 96), ("channel", 96), ("16", 96), ("channel", 3072), ("16", 40), ("64", 0)]
    tensors: list[list[Tensor]] = [[], [], [], [], []]
    groups = []
    for granularity, cols in kinds * 4:
        clip, group = random_scale(9, cols, granularity)
        window = torch.tensor([0.03, 0.2])
        x, grad = torch.randn(9, cols), torch.randn(9, cols).bfloat16()
        found = (grad, x, clip, grids.bucket("apot", 4), window)
        for into, t in zip(tensors, found, strict=True):
            into.append(t.cuda())
        groups.append(group)
    grads, xs, clips, buckets, windows = tensors
    alone = list(zip(xs, clips, buckets, [w if g else None for w, g in zip(windows, groups)],
                     groups, strict=True))  # fmt: skip
    want = [ops.fake_quant_clip(*one, torch.bfloat16) for one in alone]
    pairs = [ops.fake_quant_clip_backward(g, *one, 0.1) for g, one in zip(grads, alone)]
    want += [dx for dx, _ in pairs] + [dclip for _, dclip in pairs]
    forward = (xs, clips, buckets, windows, groups)
    torch.library.opcheck(ops.fake_quant_clips, (*forward, torch.bfloat16))
    backward = (grads, *forward, [0.1] * len(xs))
    torch.library.opcheck(ops.fake_quant_clips_backward, backward)

    def both() -> list[Tensor]:
        return ops.fake_quant_clips(*forward, torch.bfloat16) + ops.fake_quant_clips_backward(
            *backward
        )

    assert all(torch.equal(a, b) for a, b in zip(both(), want, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both()
    for t in got:
        t.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_layer_learns_as_its_modules_do(bits: int) -> None:
    """Weights rounded together, in bfloat16: bit for bit those of each, and so is the loss.
    Attention's gradients are sums in no fixed order."""
    losses = []
    grads: list[dict[str, Tensor]] = []
    for together in (True, False):
        torch.manual_seed(0)
        model = make_tiny_whisper().cuda().train()
        dqw.quantize(model, Recipe(quant=QuantConfig(bits=bits, grid="apot", embedding_bits=8)))
        if not together:
            forget_together(model)
        features = torch.randn(2, 80, 3000, device="cuda")
        ids = torch.randint(0, 50, (2, 9), device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            losses.append(model(input_features=features, labels=ids).loss)
        losses[-1].backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if "layers" in n})
    assert torch.equal(losses[0], losses[1])
    for name, grad in grads[0].items():
        off = (grad - grads[1][name]).abs().max()
        assert off <= 0.02 * grad.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_activations_as_on_a_cpu(dtype: torch.dtype) -> None:
    for shape in ((1,), (3, 7), (2, 3, 768), (9, 5120), (0, 5), (5, 0), (4, 9000)):
        x = (torch.randn(shape) * 3).to(dtype)
        torch.library.opcheck(ops.fake_quant_activation, (x.cuda().requires_grad_(),))
        assert torch.equal(ops.fake_quant_activation(x.cuda()).cpu(), ops.fake_quant_activation(x))
        y = ops.fake_quant_activation(x.cuda().T if x.dim() == 2 else x.cuda())
        assert torch.equal(y.cpu(), ops.fake_quant_activation(x.T if x.dim() == 2 else x))
    x = torch.randn(6, 64).to(dtype)
    x[0, 3], x[1], x[2, 0], x[3] = torch.nan, 0, torch.inf, 1e-39
    got, want = ops.fake_quant_activation(x.cuda()).cpu(), ops.fake_quant_activation(x)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


def test_a_gpu_divides_clips_as_a_cpu_does() -> None:
    """What was trained on one is frozen on the other, bit for bit."""
    clip, bucket = torch.rand(4096, 1) + 0.1, grids.bucket("apot", 4)
    x = torch.randn(4096, 8)
    want = ops.fake_quant_clip(x, clip, bucket, None, 0, torch.float32)
    args = [t.cuda() for t in (x, clip, bucket)]
    assert torch.equal(ops.fake_quant_clip(*args, None, 0, torch.float32).cpu(), want)
    got = reference.exact_scale(*args[1:]).cpu()
    assert torch.equal(got, reference.exact_scale(clip, bucket))


@pytest.mark.parametrize("m", [1, 8, 16, 40, 300])
def test_cuda_graph_replays(m: int) -> None:
    args = arguments(4, "64", False, m, torch.float16)
    want = ops.quant_linear(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.quant_linear(*args)
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)


def test_compiles_whole_and_once_for_all_rows() -> None:
    x, *rest = arguments(4, "64", False, 300, torch.float16)

    def layer(x: Tensor) -> Tensor:
        return ops.quant_linear(x.relu(), *rest) + 1

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for m in (2, 3, 9, 17, 100):
        torch.testing.assert_close(compiled(x[:m]), layer(x[:m]))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_whisper_on_the_gpu_says_what_it_says_on_the_cpu(dtype: torch.dtype) -> None:
    model = make_tiny_whisper()
    dqw.quantize(model, Recipe())
    dqw.freeze(model)
    features, ids = torch.randn(1, 80, 3000), torch.tensor([[1, 5, 9]])
    with torch.inference_mode():
        want = model(input_features=features, decoder_input_ids=ids).logits
        moved = model.to("cuda", dtype)
        got = moved(input_features=features.cuda().to(dtype), decoder_input_ids=ids.cuda()).logits
        assert (got.float().cpu() - want).abs().max() < 0.05 * want.abs().max()
        static = moved.generate(
            features.cuda().to(dtype), max_new_tokens=8, cache_implementation="static"
        )
    assert static.shape[0] == 1


@pytest.mark.parametrize("count", [1, 3, 20])
def test_generate_replays_graphs(count: int) -> None:
    """Step by step the logits of the plain modules; sequences padded to 1, 4 and 32."""
    model = make_tiny_whisper()
    dqw.freeze(dqw.quantize(model, Recipe()))
    speed_up(model)
    model.eval().to("cuda", torch.float16)
    features = torch.randn(count, 80, 3000, device="cuda").half()
    ids = torch.randint(0, 50, (count, 9), device="cuda")
    with torch.no_grad():
        states = model.model.encoder(features)[0]
        want = model(encoder_outputs=(states,), decoder_input_ids=ids).logits.float()
        assert model.generate(features, max_new_tokens=8).shape[0] == count
        graphs = model._dqw_graphs[1]
        off = (graphs.encode(features) - states).abs().max()
        assert off < 0.02 * states.abs().max()
        session = graphs.session(states)
        for n in (3, 4, 9):
            logits = session.step(ids[:, session.length : n])
            assert (logits - want[:, n - 1]).abs().max() < 0.03 * want.abs().max()
        session.keep(torch.tensor([count - 1], device="cuda"))
        assert session.step(ids[-1:, :1]).shape == (1, want.shape[2])


def test_a_training_step_compiles_whole() -> None:
    linear = torch.nn.Linear(128, 64).cuda()
    layer = dqw.QuantLinear.from_linear(linear)
    step = torch.compile(lambda x: layer(x).square().sum(), fullgraph=True)
    x = torch.randn(5, 128, device="cuda")
    step(x).backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
    assert layer.quantizer is not None and layer.quantizer.clip.grad is not None
