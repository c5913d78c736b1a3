"""Every Triton kernel in the interpreter; those for packed weights compiled, and their decoder.

The cases themselves are in cuda_cases.py; tests/test_cuda.py runs the same ones on a GPU.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dqw import grids, ops, packing

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "case", ["fake_quant", "fake_quant_clip", "identity", "error", "int8", "edges", "tables"]
)
def test_in_the_interpreter(case: str) -> None:
    in_the_interpreter(case)


def in_the_interpreter(case: str) -> None:
    """A case of cuda_cases.py."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "cuda_cases.py", case, "cpu"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr[-3000:]


# ---- the register decoder, which the interpreter cannot run ----


def prmt(a: int, b: int, selector: int) -> int:
    """PTX prmt.b32: four bytes of the eight of b:a, or where bit 3 is set that byte's sign."""
    pool = (a | b << 32).to_bytes(8, "little")
    out = 0
    for i in range(4):
        pick = selector >> 4 * i & 15
        byte = pool[pick & 7]
        out |= (byte if pick < 8 else 255 * (byte >> 7)) << 8 * i
    return out


def run_ptx(text: str, operands: dict[str, int]) -> dict[str, int]:
    """The handful of PTX instructions that the decoder uses, on Python integers."""
    v = dict(operands)

    def value(name: str) -> int:
        return v[name] if name in v else int(name, 0)

    for line in re.findall(r"^(\S+) (.*);$", text, re.M):
        name, (out, *inputs) = line[0].split(".")[0], line[1].split(", ")
        if name == "":  # .reg
            continue
        x = [value(i) for i in inputs]
        if name == "lop3":
            assert x[3] == 0xF8
            v[out] = x[0] | x[1] & x[2]
        else:
            v[out] = {
                "shl": lambda a, b: a << b & 0xFFFFFFFF,
                "shr": lambda a, b: a >> b,
                "and": lambda a, b: a & b,
                "prmt": prmt,
            }[name](*x)  # fmt: skip
    return v


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grid", grids.GRIDS)
def test_prmt_decodes_every_code(grid: str, dtype: torch.dtype) -> None:
    """All 16 codes in all 8 places of a word, beside random neighbours."""
    from dqw_kernels.decode import PRMT_DECODE

    levels = grids.levels(grid, 4)
    bits = levels[:8].to(dtype).view(torch.int16).tolist()
    word = {4 * k: sum((bits[i] >> 8 & 255) << 8 * (i % 4) for i in part) for k, part in (
        (1, range(4)), (2, range(4, 8)))}  # fmt: skip
    tables = {"$5": word[4], "$9": word[8]}
    for operand, part in (("$13", range(4)), ("$17", range(4, 8))):
        tables[operand] = sum((bits[i] & 255) << 8 * (i % 4) for i in part)
    for code in range(16):
        codes = torch.randint(0, 16, (8, 64), dtype=torch.uint8)
        for place in range(8):
            codes[place, place // 2 + 32 * (place % 2)] = code
        plane = packing.pack(codes, 4).view(8, 32)[:, :4].contiguous()
        for row in range(8):
            w = int.from_bytes(bytes(plane[row].tolist()), "little")
            out = run_ptx(PRMT_DECODE.value, {"$4": w, **tables})
            packed = torch.tensor([out[f"${i}"] for i in range(4)]).to(torch.uint32)
            got = packed.view(torch.int16).view(dtype).float()
            want = levels[codes[row].long()].float()
            assert torch.equal(got, torch.cat([want[:4], want[32:36]])), (code, row)


# ---- compiled without a GPU ----

POINTERS = {"weight_ptr": "*u8", "levels_ptr": "*i16", "row_scale_ptr": "*fp32", "q_ptr": "*i8",
            "ids_ptr": "*i64", "scale_ptr": "*fp16", "parts_ptr": "*fp32"}  # fmt: skip
KINDS = [  # bits, type of x, group size, rows of x; i8 is int8 activations of a float16 layer
    (4, "fp16", 64, 1), (4, "bf16", 64, 16), (4, "bf16", 0, 64), (4, "fp16", 0, 200),
    (4, "fp32", 64, 64), (4, "i8", 0, 1), (6, "i8", 64, 200), (4, "fp16", 16, 1), (4, "i8", 16, 8),
    (4, "fp32", 0, 64), (7, "fp32", 0, 1),
    (3, "bf16", 32, 8), (6, "fp16", 0, 1), (8, "bf16", 64, 64), (8, "bf16", 16, 64),
]  # fmt: skip


def compiled(kernel, arch: int, constants: dict, types: dict, **options):  # type: ignore[no-untyped-def]
    """``kernel`` for sm_``arch``: its PTX, and registers, stack and local memory of its cubin."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_for

    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in constants else (POINTERS | types).get(name, "i32")
        signature[name] = kind
        if kind[0] == "*" or name in (
            "cols",
            "width",
        ):  # as the launcher specializes Whisper's sizes
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    built = compile_for(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    shown = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "-res-usage", cubin], capture_output=True, text=True
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", shown)
    assert found, shown
    assert arch > 80 or built.metadata.shared <= 99 * 2**10, built.metadata  # what sm_86 has
    return built.asm["ptx"], *map(int, found.groups())


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_linear_compiles_without_spills(arch: int, tmp_path, monkeypatch) -> None:
    from dqw_kernels import quant_linear as kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    for bits, name, group, m in KINDS if arch == 90 else KINDS[:11]:
        int8 = name == "i8"
        dtype = names.get(name, torch.float16)
        kind = kernel.constants(bits, dtype, group, int8, True)
        tile = kernel.tiling(m, 1280, 1280, group, kind["PLANES"], 132, name == "fp32")
        out = f"*{'fp16' if int8 else name}"
        if tile["SPLIT"] > 1:
            out = "*i64" if int8 and not group else "*fp32"
        types = {"x_ptr": f"*{name}", "y_ptr": out, "bias_ptr": "*fp16"}
        ptx, registers, stack, local = compiled(
            kernel._linear, arch, kind | tile, types, **kernel.launch(tile, int8)
        )
        where = (arch, bits, name, group, m, registers)
        assert stack == 0 and local == 0, where
        tensor_cores = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[arch]
        if name in ("fp16", "bf16") or (int8 and arch < 100):
            assert tensor_cores in ptx or (arch == 100 and "mma.sync" in ptx), where
        assert ("prmt" in ptx) or not kind["PRMT"], where
        assert not re.search(r"^\s*(atom|red)\.", ptx, re.M), "sums have one order"


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_small_kernels_compile_without_spills(arch: int, tmp_path, monkeypatch) -> None:
    from dqw_kernels import dequantize, quant_linear

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    half = {"x_ptr": "*fp16", "y_ptr": "*bf16", "bias_ptr": "*fp16"}
    table = {"ROWS": 8, "BLOCKS": 8}
    parts = {"GROUP": 64, "INT8": False, "HAS_BIAS": True, "SPLIT": 8, "BLOCK_N": 256}
    for kernel, constants in (
        (quant_linear._add_parts, parts),
        (quant_linear._quantize_rows, {"BLOCK": 2048}),
        (dequantize._dequantize, {"BITS": 4, "GATHER": False, **table}),
        (dequantize._dequantize, {"BITS": 7, "GATHER": True, **table}),
    ):
        _, _, stack, local = compiled(kernel, arch, constants, half)
        assert stack == 0 and local == 0, (kernel, constants)


def test_splits_follow_the_number_of_programs() -> None:
    """Few tiles: columns are split. Many: not. Every column has its program."""
    from dqw_kernels import quant_linear as kernel

    for m in (1, 8, 16, 17, 64, 65, 1500):
        for rows in (1, 384, 1280, 51865):
            for cols in (1, 384, 1280, 5120):
                for group in (0, 16, 64):
                    tile = kernel.tiling(m, rows, cols, group, 1, 132)
                    assert tile["BLOCK_M"] in (16, 32, 64, 128)
                    assert m > 64 or tile["BLOCK_M"] >= m
                    assert tile["SPLIT"] == 1 or m <= 64
                    assert tile["SPLIT"] * 128 <= max(cols, 128)
    assert kernel.tiling(1, 512, 2048, 0, 1, 132)["SPLIT"] > 1
    assert kernel.tiling(1, 51865, 512, 0, 1, 132)["SPLIT"] == 1


def test_which_groups_the_kernel_takes() -> None:
    from dqw_kernels import quant_linear as kernel

    for group in (0, 16, 32, 48, 64, 128):
        assert kernel.supports(512, group, False) and kernel.supports(512, group, True), group
    assert not kernel.supports(512, 24, False)


def test_info_names_the_kernels_and_why() -> None:
    info = ops.backend_info()
    assert "Triton" in info["quant_linear"]["cuda"] and "cuBLAS" in info["quant_linear"]["cuda"]
    assert info["dequantize"]["cuda"] == "Triton"


def test_meta_functions_on_a_gpu_that_is_not_there() -> None:
    """Fake CUDA tensors have the right shapes, dtypes and device: what torch.compile goes by."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():

        def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device="cuda")

        weight, scale = empty(24 * 3 * 32, dtype=torch.uint8), empty(24, 3)
        levels = empty(16, dtype=torch.int16)
        x = empty(2, 3, 130, dtype=torch.bfloat16)
        y = ops.quant_linear(x, weight, scale, levels, None, 24, 4, 64, False)
        assert (y.shape, y.dtype, y.device.type) == ((2, 3, 24), torch.bfloat16, "cuda")
        args = ([weight] * 2, [scale] * 2, levels, [None, empty(24)], [24, 24], 4, 64, True)
        assert [y.shape for y in ops.quant_linears(x, *args)] == [(2, 3, 24)] * 2
        ids = empty(5, dtype=torch.int64)
        y = ops.quant_embedding(ids, weight, scale, levels, 24, 130, 4, 64)
        assert (y.shape, y.dtype, y.device.type) == ((5, 130), torch.float32, "cuda")
        w = ops.dequantize(weight, scale, levels, 24, 130, 4, 64)
        assert (w.shape, w.device.type) == ((24, 130), "cuda")
        bucket = empty(21, dtype=torch.int16)
        dx, ds = torch.ops.dqw.fake_quant_backward(w, w, scale.float(), bucket, 64)
        assert (dx.shape, ds.shape, ds.device.type) == ((24, 130), (24, 3), "cuda")
