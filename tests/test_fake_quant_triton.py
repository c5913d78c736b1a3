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

types = {"scale_ptr": "*fp32", "dscale_ptr": "*fp32", "bucket_ptr": "*i16"}
shapes = ((768, 768, 0), (5, 768, 64), (9, 3072, 0), (3, 65, 16), (2, 9001, 0))
for kind, dtype, product, size in (
    (kernel._forward, "*fp32", "*fp32", 4),
    (kernel._forward, "*fp32", "*bf16", 4),  # under autocast
    (kernel._backward, "*bf16", "*bf16", 2),
    (kernel._backward, "*fp32", "*bf16", 4),
):
    for rows, cols, group in shapes:
        tile = kernel._tiling(rows, cols, group, size, kind is kernel._backward)
        options = {"num_warps": tile.pop("num_warps"), **kernel._LAUNCH}
        signature, known, aligned = {}, dict(tile), {}
        for place, name in enumerate(kind.arg_names):
            if name in tile:
                signature[name] = "constexpr"
            elif name.endswith("_ptr"):
                other = name in ("y_ptr", "grad_ptr")
                signature[name] = types.get(name, product if other else dtype)
            elif name == "scale_stride":
                signature[name], known[name] = "constexpr", 1
            else:
                signature[name] = "i32"
            if name.endswith("_ptr"):
                aligned[place,] = [["tt.divisibility", 16]]
        source = ASTSource(kind, signature, known, aligned)
        for arch in (80, 90, 100):
            built = compile_for(source, target=GPUTarget("cuda", arch, 32), options=options)
            assert built.asm["cubin"][:4] == b"\\x7fELF"
            ptx = built.asm["ptx"]
            assert "div.rn.f32" in ptx, "2 / scale must be rounded correctly"
            assert ".atom" not in ptx and "red.global" not in ptx
            if not tile["RAGGED"] and product == dtype:
                assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx, "16 bytes a load"
print("built")
"""

# Small tiles, so that few elements make many programs, units and parts.
SMALL = """
import torch
from dqw import grids, reference
from dqw_kernels import fake_quant as kernel

torch.manual_seed(0)
kernel.BLOCKS, kernel.MOST_PIECES, kernel.LONG_PIECES = (16, 8), 3, 2
shapes = ((7, 37, 5), (9, 48, 8), (5, 24, 0), (7, 100, 0), (1, 100, 0), (4, 130, 60), (3, 20, 50),
          (3, 64, 0), (6, 1, 1), (5, 96, 48))
bucket = grids.bucket("apot", 4)
for elements in (8, 128):
    kernel.FORWARD = kernel.BACKWARD = {4: (elements, 1)}
    kernel._launch.cache_clear()
    for kernel.FORWARD_LONGEST in (16, 48):
        for rows, cols, group in shapes:
            groups = -(-cols // group) if group else 1
            for shape in ((rows, groups),) if group else ((rows, 1), (1, 1)):
                scale = torch.rand(shape) * 0.1 + 0.02
                x, grad = torch.randn(rows, cols), torch.randn(rows, cols)
                args = (x, scale, bucket, group)
                where = (elements, rows, cols, group, shape)
                assert torch.equal(kernel.fake_quant(*args), reference.fake_quant(*args)), where
                dx, ds = kernel.fake_quant_backward(grad, *args)
                want_dx, want_ds = reference.fake_quant_backward(grad, *args)
                assert torch.equal(dx, want_dx), where
                torch.testing.assert_close(ds, want_ds, rtol=1e-4, atol=1e-3)
print("same")
"""

TILING = """
from dqw_kernels import fake_quant as kernel

for summed, table in ((False, kernel.FORWARD), (True, kernel.BACKWARD)):
    for size, (elements, _) in table.items():
        for cols in (*range(1, 1100), 1280, 1536, 2048, 3072, 3840, 4096, 5120, 8192, 9001, 100000):
            tile = kernel._tiling(1000, cols, 0, size, summed)
            length = tile["PIECES"] * tile["BLOCK"]
            assert cols <= length * tile["PARTS"] < cols + length, (cols, tile)
            assert tile["PARTS"] == 1 or not summed or cols > 8192, (cols, tile)
            assert tile["UNITS"] == 1 or tile["UNITS"] * length <= 1.5 * elements, (cols, tile)
            if cols in (384, 512, 768, 1024, 1280, 1536, 2048, 3072, 4096, 5120):
                assert not tile["RAGGED"], (cols, tile)
print("covered")
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


def test_units_cross_rows_and_segments() -> None:
    assert run(SMALL, TRITON_INTERPRET="1") == "same"


def test_tiles_cover_every_width_and_fit_the_usual_ones() -> None:
    assert run(TILING) == "covered"
