"""The Triton kernels of fake quantization, compiled for GPUs; cuda_cases.py has what they do."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile as compile_for
from dqw_kernels import fake_quant as kernel

ints = ("cols", "groups", "segment", "scale_stride", "parts", "last")
for kind, dtype, product in (
    (kernel._forward, "*fp32", "*fp32"),
    (kernel._forward, "*fp32", "*bf16"),  # under autocast
    (kernel._backward, "*bf16", "*bf16"),
    (kernel._backward, "*fp32", "*bf16"),
):
    for segments, block in ((1, 1024), (16, 64)):
        signature = {}
        for name in kind.arg_names:
            if name in ints:
                signature[name] = "i32"
            elif name in ("SEGMENTS", "BLOCK"):
                signature[name] = "constexpr"
            elif name in ("scale_ptr", "dscale_ptr"):
                signature[name] = "*fp32"
            elif name in ("y_ptr", "grad_ptr"):
                signature[name] = product
            else:
                signature[name] = "*i16" if name == "bucket_ptr" else dtype
        source = ASTSource(kind, signature, {"SEGMENTS": segments, "BLOCK": block})
        for arch in (80, 90, 100):
            built = compile_for(source, target=GPUTarget("cuda", arch, 32))
            assert built.asm["cubin"][:4] == b"\\x7fELF"
            assert "div.rn.f32" in built.asm["ptx"], "2 / scale must be rounded correctly"
            assert ".atom" not in built.asm["ptx"] and "red.global" not in built.asm["ptx"]
print("built")
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DQW_BACKEND": "reference", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_compiles_for_three_generations(tmp_path) -> None:
    assert run(COMPILE, TRITON_CACHE_DIR=str(tmp_path)) == "built"
