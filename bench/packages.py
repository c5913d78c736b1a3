"""Peers from other packages: torchao, ONNX Runtime and OpenVINO. Imported only when they run.

Each function: (problem, (x, w)) → (builder of calls, bytes of one call's weights); see peers.py.
"""

import warnings
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.calls import Builder, fake_quant_call
from bench.rows import Problem
from bench.timing import Call

Data = tuple[Tensor, Tensor]
GROUP = 64


class Unfit(Exception):
    """This peer has nothing to compare for this problem; the message says why."""


def torchao_linear(p: Problem, data: Data) -> tuple[Builder, int]:
    """int8 weights per channel, int8 activations per row. torchao has no 4 bit path on CPUs."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    x, w = data

    def make() -> Call:
        layer = nn.Sequential(nn.Linear(p.K, p.N, bias=False))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer[0].weight.copy_(w)
            quantize_(layer, Int8DynamicActivationInt8WeightConfig())
        return lambda: layer(x)

    return make, p.N * p.K


def torchao_fake_quant(p: Problem, data: Data) -> tuple[Builder, int]:
    """The weight quantizer of torchao's QAT, uniform, scales from the data in every call."""
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    if p.dtype != "float32":
        raise Unfit("is compared in float32")
    integer = {2: torch.int2, 3: torch.int3, 4: torch.int4, 5: torch.int5}
    integer |= {6: torch.int6, 7: torch.int7, 8: torch.int8}

    def make() -> Call:
        config = IntxFakeQuantizeConfig(integer[p.bits], "per_channel", is_symmetric=True)
        quantizer = IntxFakeQuantizer(config)
        return fake_quant_call(p, 1, lambda x, scale: quantizer(x))[0]

    return make, 4 * p.N * p.K


def symmetric(w: Tensor, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Unsigned codes (N, K) around 2**(bits-1) and float32 scales (N, K / group)."""
    middle = 2 ** (bits - 1)
    parts = w.reshape(len(w), -1, group)
    scale = parts.abs().amax(-1).clamp(min=1e-9) / (middle - 1)
    codes = (torch.round(parts / scale[..., None]) + middle).clamp(0, 2 * middle - 1)
    return codes.reshape(w.shape).to(torch.uint8).numpy(), scale.numpy()


def joined(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis into bytes, the first in the lowest bits."""
    per_byte = 8 // bits
    parts = codes.reshape(*codes.shape[:-1], -1, per_byte).astype(np.uint16)
    shifts = np.arange(per_byte, dtype=np.uint16) * bits
    return (parts << shifts).sum(-1).astype(np.uint8)


def stored_bits(bits: int) -> int:
    """The narrowest width that both packages store and that holds ``bits``."""
    return 4 if bits <= 4 else 8


# Seconds for which ONNX Runtime's threads spin after a call, 2^20 pauses; a pool that sessions
# share cannot be told to stop. Without this rest they took a core from the next ones' turns.
SPINS = 0.1


@cache
def share_threads(count: int) -> None:
    """One pool for all sessions: hundreds of copies of the weights must not be as many pools."""
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(count, 1)


def onnxruntime_linear(p: Problem, data: Data) -> tuple[Builder, int]:
    """MatMulNBits, groups of 64, int8 arithmetic (accuracy level 4)."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    x, w = data
    if p.K % GROUP:
        raise Unfit("wants K divisible by 64")
    bits = stored_bits(p.bits)
    codes, scale = symmetric(w, bits, GROUP)
    blob = joined(codes.reshape(p.N, -1, GROUP), bits)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "scales"],
        ["y"],
        domain="com.microsoft",
        K=p.K,
        N=p.N,
        bits=bits,
        block_size=GROUP,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", p.K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", p.N])],
        [numpy_helper.from_array(blob, "w"), numpy_helper.from_array(scale.flatten(), "scales")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    options = onnxruntime.SessionOptions()
    share_threads(torch.get_num_threads())
    options.use_per_session_threads = False
    feed = {"x": x.numpy()}

    def make() -> Call:
        session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])

        def call() -> object:
            return session.run(None, feed)

        call.rest = SPINS  # type: ignore[attr-defined]
        return call

    return make, p.N * p.K * bits // 8


def openvino_linear(p: Problem, data: Data) -> tuple[Builder, int]:
    """Compressed weights in groups of 64, in OpenVINO's default precision for this machine."""
    import openvino
    from openvino import opset13 as ov

    x, w = data
    if p.K % GROUP:
        raise Unfit("wants K divisible by 64")
    bits = stored_bits(p.bits)
    codes, scale = symmetric(w, bits, GROUP)
    shape = [p.N, p.K // GROUP, GROUP]
    kind = openvino.Type.u4 if bits == 4 else openvino.Type.u8
    stored = openvino.Tensor(joined(codes.reshape(-1), bits), shape, kind)
    core = openvino.Core()
    settings: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    middle = np.full((1, 1, 1), 2 ** (bits - 1), np.uint8)

    def make() -> Call:
        source = ov.parameter([-1, p.K], openvino.Type.f32)
        weight = ov.convert(ov.constant(stored), "f16")
        zero = ov.convert(ov.constant(middle), "f16")
        factor = ov.constant(scale[..., None].astype(np.float16))
        weight = ov.multiply(ov.subtract(weight, zero), factor)
        flat = ov.convert(ov.reshape(weight, ov.constant(np.array([p.N, p.K])), False), "f32")
        result = ov.matmul(source, flat, False, True)
        compiled = core.compile_model(openvino.Model([result], [source], "linear"), "CPU", settings)
        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
        return lambda: request.infer(share_outputs=True)  # else it copies y

    return make, p.N * p.K * bits // 8
