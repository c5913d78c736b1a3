"""The Triton kernels of a decoder's step: in the interpreter, and compiled for GPUs.

tests/decoder_step_cases.py has what they do.
"""

import re
from importlib.util import find_spec

import pytest
from test_quant_linear_triton import compiled, in_the_interpreter

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

HALF = {
    f"{name}_ptr": "*fp16"
    for name in (
        "y",
        "weight",
        "positions",
        "out",
        "q",
        "k",
        "v",
        "cache",
        "keys",
        "values",
        "logits",
        "bias",
    )
}
OTHERS = {
    "residual_ptr": "*fp32", "x_ptr": "*fp32", "sums_ptr": "*fp32",
    "scratch_ptr": "*fp32", "tickets_ptr": "*i32", "at_ptr": "*i64",
    "length_ptr": "*i64", "tokens_ptr": "*i64", "state_ptr": "*i64", "bans_ptr": "*u8",
    "eps": "fp32", "scale": "fp32",
}  # fmt: skip


@pytest.mark.parametrize("case", ["begin", "add_norm", "attend_past", "attend_audio", "choose"])
def test_in_the_interpreter(case: str) -> None:
    in_the_interpreter(case)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_without_spills(arch: int, tmp_path, monkeypatch) -> None:
    from dqw_kernels import decoder_step as kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pdl = arch >= 90
    head = {"HEAD": 64, "WIDE": 64}
    audio = {**head, "BLOCK": kernel.KEYS}
    table = {"BITS": 3, "BLOCKS": 32}
    for function, constants, warps in (
        (kernel._begin, table, 4),
        (kernel._begin, {"BITS": 0, "BLOCKS": 8}, 4),
        (kernel._add_norm, {"ADD": True, "BLOCK": 2048}, 8),
        (kernel._attend_past, {**head, "BLOCK": kernel.PAST_KEYS}, kernel.PAST_WARPS),
        (kernel._attend_audio, {**audio, "SPLITS": 8}, kernel.WARPS),
        (kernel._attend_audio, {**audio, "SPLITS": 1}, kernel.WARPS),
        (kernel._choose, {"BLOCK": kernel.VOCABULARY_BLOCK, "ROOM": 512, "PARTS": 32}, 8),
    ):
        shares = constants.get("SPLITS", 1) > 1 or "PARTS" in constants
        options = {"num_warps": warps, "launch_pdl": pdl}
        more = {"keys_ptr": "*i64"} if "PARTS" in constants else {}
        more |= {"weight_ptr": "*u8"} if constants.get("BITS") else {}
        ptx, registers, stack, local = compiled(
            function, arch, {**constants, "PDL": pdl}, HALF | OTHERS | more, **options
        )
        where = (function, arch, registers)
        assert stack == 0 and local == 0, where
        assert bool(re.search(r"atom\S*\.acq_rel", ptx)) == shares, where
        assert ptx.count("griddepcontrol.wait") == ptx.count("griddepcontrol.launch") == pdl, where
        if "HEAD" in constants:
            assert "ld.global.v4.b32" in ptx, "16 bytes a load"
