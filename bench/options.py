"""What the command line asked for, checked: a mistake is one sentence that names the cure."""

from dataclasses import dataclass
from pathlib import Path

import torch

from dqw.errors import UserError
from dqw.grids import check_grid
from dqw.recipe import GROUP_SIZES

OPS = ("quant_linear", "fake_quant", "embedding", "train_step")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Options:
    """``shapes``: (M, K, N) of each problem; None means Whisper's own. ``group_sizes``: columns a
    scale, timed beside one scale a row."""

    ops: tuple[str, ...] = OPS
    device: str = "cpu"
    shapes: tuple[Shape, ...] | None = None
    bits: tuple[int, ...] = (4,)
    grid: str = "apot"
    group_sizes: tuple[int, ...] = (64,)
    dtype: str = "float32"
    peers: tuple[str, ...] | None = None
    threads: int = 1
    cold: bool = False
    quick: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def wants(self, peer: str) -> bool:
        return self.peers is None or peer in self.peers


def choose(what: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise UserError(f"{what} {value!r} is not known: choose one of {', '.join(known)}.")
    return value


def parse_ops(text: str) -> tuple[str, ...]:
    return OPS if text == "all" else (choose("--op", text, (*OPS, "all", "transcribe")),)


def parse_shapes(text: str) -> tuple[Shape, ...] | None:
    """``whisper`` → None; ``1,512,2048;8,512,512`` → ((1, 512, 2048), (8, 512, 512))."""
    if text == "whisper":
        return None
    shapes = []
    for part in text.split(";"):
        numbers = part.split(",")
        if len(numbers) != 3 or not all(n.strip().isdecimal() and int(n) > 0 for n in numbers):
            raise UserError(
                f"--shapes {text!r} is not understood: give whisper, or three whole numbers "
                "M,K,N from 1 on such as 1,512,2048 (more of them after a semicolon)."
            )
        shapes.append((int(numbers[0]), int(numbers[1]), int(numbers[2])))
    return tuple(shapes)


def parse_bits(text: str, grid: str) -> tuple[int, ...]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise UserError(f"--bits {text!r} is not understood: give 2 to 8, or several such as 3,4.")
    bits = tuple(int(part) for part in text.split(","))
    for width in bits:
        check_grid(grid, width)
    return bits


def parse_groups(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split(",") if part.strip().isdecimal())
    if len(sizes) != text.count(",") + 1 or not set(sizes) <= set(GROUP_SIZES):
        known = ", ".join(map(str, GROUP_SIZES))
        raise UserError(f"--group-sizes {text!r} is not understood: give one or more of {known}.")
    return sizes


def parse_lengths(text: str) -> tuple[int, ...]:
    """``none`` → (), else whole seconds in ascending order, each once."""
    if text == "none":
        return ()
    parts = text.split(",")
    if not all(p.strip().isdecimal() and 1 <= int(p) <= 30 for p in parts):
        raise UserError(f"--lengths {text!r} is not understood: give seconds from 1 to 30 such as "
                        "3,11,30, or none.")  # fmt: skip
    return tuple(sorted({int(p) for p in parts}))


def check_count(option: str, value: int, least: int) -> int:
    if value < least:
        raise UserError(f"{option} is {value}: give {least} or more.")
    return value


def parse_peers(text: str, known: tuple[str, ...]) -> tuple[str, ...] | None:
    """``all`` → None, ``none`` → (), else the names of ``known`` peers."""
    if text in ("all", "none"):
        return None if text == "all" else ()
    names = tuple(name.strip() for name in text.split(","))
    return tuple(choose("--peers", name, ("all", "none", *known)) for name in names)


def check_device(device: str) -> str:
    choose("--device", device, ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda needs an NVIDIA GPU and a CUDA build of torch, and torch finds none: "
            "use --device cpu here."
        )
    return device


def check_threads(threads: int | None) -> int:
    if threads is None:
        return torch.get_num_threads()
    if threads < 1:
        raise UserError(f"--threads is {threads}: give 1 or more.")
    return threads


def check_writable(file: Path | None, option: str) -> None:
    """Before the timing, not after: a lost result costs minutes."""
    if file is None:
        return
    probe = file.with_name(file.name + ".tmp")
    try:
        if file.is_dir():
            raise IsADirectoryError
        probe.touch()
        probe.unlink()
    except OSError:
        raise UserError(
            f"{option} {file} cannot be written: name a file in an existing, writable folder."
        ) from None
