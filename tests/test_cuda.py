"""Everything that needs a GPU: the cases of cuda_cases.py, and torch's own checks on CUDA tensors.

Skipped where there is none. `make gpu` runs this file, the bench, and compute-sanitizer.
"""

import pytest
import torch
from conftest import make_tiny_whisper
from cuda_cases import CASES
from kernel_helpers import random_scale, random_weight
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import dqw
from dqw import grids, ops
from dqw.recipe import Recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("case", CASES)
def test_case(case: str) -> None:
    CASES[case]("cuda")


def arguments(bits: int, granularity: str, int8: bool, m: int, dtype: torch.dtype) -> tuple:
    levels = grids.levels("apot", bits)
    weight, _ = random_weight(64, 192, bits, levels)
    scale, group = random_scale(64, 192, granularity, 0.1)
    x, bias = torch.randn(m, 192).to(dtype), torch.randn(64).to(dtype)
    tensors = [t.cuda() for t in (x, weight, scale, levels, bias)]
    return (*tensors, 64, bits, group, int8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 8, 9, 64, 65, 1500])
@pytest.mark.parametrize("granularity", ["channel", "64"])
def test_opcheck(granularity: str, m: int, dtype: torch.dtype) -> None:
    for int8 in (False, True):
        torch.library.opcheck(
            torch.ops.dqw.quant_linear.default, arguments(4, granularity, int8, m, dtype)
        )


@pytest.mark.parametrize("m", [1, 8, 16, 64, 300])
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
    for m in (2, 3, 9, 100):
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
        static = moved.generate(
            features.cuda().to(dtype), max_new_tokens=8, cache_implementation="static"
        )
    assert (got.float().cpu() - want).abs().max() < 0.05 * want.abs().max()
    assert static.shape[0] == 1


def test_a_training_step_compiles_whole() -> None:
    linear = torch.nn.Linear(128, 64).cuda()
    layer = dqw.QuantLinear.from_linear(linear)
    step = torch.compile(lambda x: layer(x).square().sum(), fullgraph=True)
    x = torch.randn(5, 128, device="cuda")
    step(x).backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
    assert layer.quantizer is not None and layer.quantizer.clip.grad is not None
