"""What is different on a GPU: clocks, graphs, caches, ceilings, and the packages to compare with.

A call is timed inside a CUDA graph of at least 20 calls, between two events, so that neither Python
nor launches from it are measured; a call that waits for the GPU, which no graph can hold, is timed
one after the other and named in ``not_graphed``. With --cold the graph goes round copies of the
weights that exceed the L2 cache by half; without it the weights stay where they were, in L2 if they
fit.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from bench.calls import Builder
from bench.packages import Unfit
from bench.rows import Problem
from bench.timing import Call, Candidate

Data = tuple[Tensor, Tensor]
GROUP = 64
IN_A_GRAPH = 20
not_graphed: dict[str, str] = {}  # call → why


def candidate(call: Call, name: str = "a call", graphed: bool = True) -> Candidate:
    """repeats → seconds of so many calls, by events around replays of a graph."""
    if not graphed:  # not tried: torch 2.11 leaks memory where a capture fails
        not_graphed[name] = "it waits for the GPU"
        return timed(call, 1)
    copies = getattr(call, "copies", 1)
    count = copies * -(-IN_A_GRAPH // copies)  # whole rounds: each copy is as cold as the others
    before, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    try:
        aside.wait_stream(before)
        with torch.cuda.stream(aside):  # what compiles or allocates does so before the capture
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):
            for _ in range(count):
                call()
    except Exception as error:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own
        torch.cuda.synchronize()
        not_graphed[name] = (str(error).splitlines() or [type(error).__name__])[0][:120]
        return timed(call, 1)
    return timed(graph.replay, count, held=call)


def timed(call: Callable[[], object], count: int, held: object = None) -> Candidate:
    """``call`` makes ``count`` calls; seconds are scaled to the repeats that were asked for. held:
    what owns the memory that a graph reads and writes, which would go back to the driver."""

    def run(repeats: int) -> float:
        turns = -(-repeats // count)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(turns):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 * repeats / (turns * count)

    run.held = held  # type: ignore[attr-defined]
    return run


def copy_gbps(size: int) -> float:
    """GB/s, read and written together, of copying so that both arrays make up ``size`` bytes."""
    x = torch.zeros(max(size // 8, 1), device="cuda")
    y = torch.empty_like(x)
    run = candidate(lambda: y.copy_(x))
    run(100)
    return 2 * x.numel() * 4 / min(run(100) / 100 for _ in range(5)) / 1e9


def matmul_gops(kind: str, size: int = 8192) -> float:
    """Billions of operations a second of cuBLAS's product of two square matrices."""
    a = torch.randn(size, size, device="cuda")
    if kind == "int8":
        q = a.to(torch.int8)
        run = candidate(lambda: torch._int_mm(q, q.t()))  # the layout that cuBLAS is fast in
    else:
        b = a.to(getattr(torch, kind))
        run = candidate(lambda: b @ b)
    run(20)
    return 2.0 * size**3 / min(run(20) / 20 for _ in range(5)) / 1e9


def facts() -> dict[str, str]:
    """The card, for the header."""
    card = torch.cuda.get_device_properties(0)
    return {
        "capability": f"{card.major}.{card.minor}, {card.multi_processor_count} processors",
        "l2": f"{card.L2_cache_size / 2**20:.0f} MiB",
        "memory": f"{card.total_memory / 2**30:.0f} GiB",
        "cuda": str(torch.version.cuda),
    }


# ---- peers ----


def half(p: Problem, data: Data) -> Data:
    if p.dtype == "float32":
        raise Unfit("has float16 and bfloat16 only")
    dtype = getattr(torch, p.dtype)
    return data[0].to(dtype), data[1].to(dtype)


def tinygemm(p: Problem, data: Data) -> tuple[Builder, int]:
    """PyTorch's int4 kernel, which torchao uses: bfloat16, groups of 64 with zero points."""
    x, w = data
    if p.K % 64 or p.N % 8:
        raise Unfit("wants K divisible by 64 and N by 8")
    parts = w.view(p.N, -1, GROUP)
    scale = parts.abs().amax(-1).clamp(min=1e-9) / 7
    codes = (torch.round(parts / scale[..., None]) + 8).clamp(0, 15).to(torch.int32).view(p.N, p.K)
    packed = torch._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).byte(), 8)
    scales = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()
    xb, sb = x.bfloat16(), scales.bfloat16()

    def make() -> Call:
        own, own_scales = packed.clone(), sb.clone()
        return lambda: torch._weight_int4pack_mm(xb, own, GROUP, own_scales)

    return make, p.N * p.K // 2 + sb.numel() * 2


def bitsandbytes_nf4(p: Problem, data: Data) -> tuple[Builder, int]:
    import bitsandbytes as bnb

    x, w = half(p, data)
    packed, state = bnb.functional.quantize_4bit(w, blocksize=GROUP, quant_type="nf4")

    def make() -> Call:
        own, own_state = packed.clone(), copy.copy(state)
        own_state.absmax = state.absmax.clone()
        return lambda: bnb.matmul_4bit(x, own.t(), quant_state=own_state)

    return make, p.N * p.K // 2 + p.N * p.K // GROUP * 4


def gemlite_int4(p: Problem, data: Data) -> tuple[Builder, int]:
    from gemlite.core import DType, GemLiteLinearTriton

    x, w = half(p, data)
    if p.K % GROUP:
        raise Unfit("wants K divisible by 64")
    kind = DType.BF16 if p.dtype == "bfloat16" else DType.FP16
    parts = w.float().view(-1, GROUP)
    scale = parts.abs().amax(1, keepdim=True).clamp(min=1e-9) / 7
    codes = (torch.round(parts / scale) + 8).clamp(0, 15).to(torch.uint8).view(p.N, p.K)

    def make() -> Call:
        layer = GemLiteLinearTriton(
            4, group_size=GROUP, in_features=p.K, out_features=p.N, input_dtype=kind,
            output_dtype=kind,
        )  # fmt: skip
        layer.pack(codes, scale.to(x.dtype), torch.full_like(scale, 8.0).to(x.dtype), None)
        return lambda: layer(x)

    return make, p.N * p.K // 2 + p.N * p.K // GROUP * 4
