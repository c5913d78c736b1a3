"""``FakeQuantize``: its scale, the gradients in closed form, and how few operations they take."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dqw import reference
from dqw.embedding import QuantEmbedding
from dqw.fake_quant import FakeQuantize
from dqw.linear import QuantLinear
from dqw.packing import SMALLEST_SCALE, pack_scales
from dqw.recipe import QuantSpec

ROWS, COLS = 12, 70
KINDS = {
    "tensor": QuantSpec(group_size=None, per_tensor=True),
    "row": QuantSpec(group_size=None),
    "row, norm": QuantSpec(group_size=None, weight_norm=True),
    "groups": QuantSpec(group_size=16),
    "groups, norm": QuantSpec(group_size=32, weight_norm=True),
    "lloyd": QuantSpec(bits=3, grid="lloyd", group_size=64),
}


def quantizer_with_odd_clips(kind: str) -> tuple[FakeQuantize, Tensor]:
    """Clips that give all sorts of scales: at SMALLEST_SCALE, one float32 to either side of it,
    none, a negative one, and 40 octaves around the window of groups; and the weight."""
    weight = torch.randn(ROWS, COLS)
    quantizer = FakeQuantize(KINDS[kind], weight)
    unit = quantizer.level_max if quantizer.deviation is None else 1.0
    if quantizer.deviation is not None:  # so that clip × deviation / level_max is exact, too
        quantizer.deviation.fill_(quantizer.level_max)
    with torch.no_grad():
        clip = quantizer.clip
        clip.mul_(torch.exp2(torch.randn_like(clip)))
        odd = torch.tensor([1.0, 1 - 2**-22, 1 + 2**-22, 0.0, -1.0, 0.25, 2.0**6, 2.0**32])
        if clip.numel() > 1:
            clip.view(-1)[: len(odd)] = odd * SMALLEST_SCALE * unit
    return quantizer, weight


def exact_scale(quantizer: FakeQuantize) -> Tensor:
    deviation = 1.0 if quantizer.deviation is None else quantizer.deviation
    return quantizer.clip.detach() * deviation / quantizer.level_max


@pytest.mark.parametrize("kind", KINDS)
def test_scale_is_the_exact_one_as_it_is_stored(kind: str) -> None:
    quantizer, _ = quantizer_with_odd_clips(kind)
    exact, scale = exact_scale(quantizer), quantizer.scale()
    assert scale.dtype == torch.float32 and scale.shape == quantizer.clip.shape
    if not quantizer.group_size:
        assert torch.equal(scale, exact.clamp(min=SMALLEST_SCALE))
        return
    low, high = quantizer.window.tolist()
    assert low > SMALLEST_SCALE and (scale == low).any() and (scale == high).any()
    kept = exact.clamp(low, high)
    assert ((scale - kept).abs() <= kept * 2**-5).all()  # the nearest with 4 bits of mantissa
    pack_scales(scale.half())  # raises for one that it cannot store


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_closed_form(kind: str) -> None:
    """dclip = dscale × deviation / level_max / sqrt(weights per clip × level_max), nothing where
    SMALLEST_SCALE stands in; neither rounding nor the window of groups stops it."""
    quantizer, weight = quantizer_with_odd_clips(kind)
    weight.requires_grad_()
    g = torch.randn(ROWS, COLS)
    rounded = quantizer(weight)
    rounded.backward(g)
    args = (weight.detach(), quantizer.scale(), quantizer.bucket, quantizer.group_size)
    assert torch.equal(rounded, reference.fake_quant(*args))
    dx, dscale = reference.fake_quant_backward(g, *args)
    assert torch.equal(weight.grad, dx)
    top = quantizer.level_max
    damping = (weight.numel() / quantizer.clip.numel() * top) ** -0.5
    deviation = 1.0 if quantizer.deviation is None else quantizer.deviation
    want = dscale * damping * deviation / top
    stopped = exact_scale(quantizer) < SMALLEST_SCALE
    assert quantizer.clip.numel() == 1 or stopped.sum() == 4
    assert torch.equal(quantizer.clip.grad == 0, stopped)
    torch.testing.assert_close(
        quantizer.clip.grad, torch.where(stopped, 0.0, want), rtol=1e-4, atol=1e-5
    )


def test_a_clip_of_some_rows_alone_learns() -> None:
    """An embedding rounds the rows it looks up; one that is looked up twice gets both gradients."""
    table = QuantEmbedding.from_embedding(torch.nn.Embedding(ROWS, COLS), QuantSpec(group_size=16))
    ids, g = torch.tensor([[3, 5], [5, 0]]), torch.randn(2, 2, COLS)
    table(ids).backward(g)
    assert table.quantizer is not None
    some = table.quantizer.clip.grad.clone()
    table.zero_grad()
    whole = torch.zeros(ROWS, COLS).index_add(0, ids.flatten(), g.flatten(0, 1))
    table.fake_quantized_weight().backward(whole)
    torch.testing.assert_close(some, table.quantizer.clip.grad)
    assert torch.equal(some.abs().sum(1) > 0, whole.abs().sum(1) > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpus_nan_stays_one(kind: str) -> None:
    """0x7fffffff: rounding its bits as if it were a number gives -0, and a weight of zeros."""
    quantizer, weight = quantizer_with_odd_clips(kind)
    with torch.no_grad():
        quantizer.clip.view(torch.int32).fill_(0x7FFFFFFF)
    assert quantizer.scale().isnan().all() and quantizer(weight).isnan().all()


@pytest.mark.parametrize("weights", [torch.float32, torch.float16])
@pytest.mark.parametrize("product", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_another_dtype_is_a_cast(kind: str, product: torch.dtype, weights: torch.dtype) -> None:
    """Also under autocast, which has nothing left to cast; the gradients too, bit for bit."""
    torch.manual_seed(1)
    layer = QuantLinear.from_linear(torch.nn.Linear(COLS, ROWS), KINDS[kind]).to(weights)
    assert layer.quantizer is not None
    x, g = torch.randn(5, COLS), torch.randn(5, ROWS).to(product)
    found = []
    for cast in (True, False):
        layer.zero_grad()
        with torch.autocast("cpu", product):
            if cast:
                weight = layer.fake_quantized_weight().to(product)
            else:
                weight = layer.weight_for(x)
                assert torch.equal(layer(x), torch.nn.functional.linear(x, weight, layer.bias))
        assert weight.dtype == product
        (x.to(product) @ weight.T).backward(g)
        found.append([weight, layer.weight.grad, layer.quantizer.clip.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert layer.weight_for(x).dtype == torch.float32
    assert layer.weight_for(x.double()).dtype == torch.float64
    with torch.autocast("cpu", product):
        assert layer.weight_for(x.double()).dtype == torch.float64  # which autocast leaves alone


class Operations(TorchDispatchMode):
    """Counts what would be launched on a GPU: every operation that is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.found[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "most"), [("tensor", 2), ("row", 2), ("row, norm", 4),
                                            ("groups", 2)])  # fmt: skip
def test_few_operations(kind: str, most: int) -> None:
    """A training step on a GPU waits for Python's launches: 13 a layer and 15 with groups were
    2500 a step for whisper-small."""
    layer = QuantLinear.from_linear(torch.nn.Linear(COLS, ROWS), KINDS[kind])
    with Operations() as counted:
        layer.fake_quantized_weight().backward(torch.ones(ROWS, COLS))
    counted.found -= Counter({"aten::ones": 1, "aten::detach": 2})
    assert counted.found.total() <= most, counted.found
    x, casts = torch.randn(5, COLS), []
    for module in (torch.nn.Linear(COLS, ROWS), layer):
        with Operations() as counted, torch.autocast("cpu", torch.bfloat16):
            module(x).float().sum().backward()
        casts.append(counted.found["aten::_to_copy"])
    assert casts[1] == casts[0] - 2  # the weight's, there and back


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("kind", ["row, norm", "groups"])
def test_compiles_whole(kind: str, lowered: bool) -> None:
    layer = QuantLinear.from_linear(torch.nn.Linear(COLS, ROWS), KINDS[kind])
    x, found = torch.randn(5, COLS), []
    torch._dynamo.reset()
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            y = call(x)
        y.float().square().sum().backward()
        found.append([y, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))
