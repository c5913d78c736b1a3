"""``python -m bench --op transcribe``: whole clips to text, against the engines people use.

Stretches of one recording, engines taking turns, medians. Before that each engine is started anew
and hears the clip nearest to 11 s: the time to the first text of a fresh process. From the shortest
and the longest clip follows the cost of a further token (their tokens differ, their encoder does
not), and of what is done once a clip. Peak memory is that of loading and the longest clip.
``--files N`` are N files in batches, 20 a turn, with the peak after 20 and after all: nothing may
grow. Peers that are not installed, or lack their model, are named with the reason.
"""

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from bench import clips
from bench.processes import Engine, Files, Room, start, stop
from dqw.errors import UserError

FOLDER = Path("runs") / "bench"
LENGTHS = (3, 6, 11, 20, 30)
TURN = 20  # files an engine hears before the next one's turn
PEERS = (
    "dqw-float",
    "dqw-generate",
    "dqw-plain",
    "transformers",
    "faster-whisper",
    "whisper.cpp",
    "openvino",
)
MODULES = {"faster-whisper": "faster_whisper", "whisper.cpp": "pywhispercpp"}
MODULES["openvino"] = "openvino_genai"
Report = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """float_model: a folder that faster-whisper reads too; model: a packed folder, or None to make
    one; audio: a recording, folder or manifest, or None for the samples; openvino: folders that
    optimum-cli exported; batch_size: of ``files``; device: cpu or cuda; quick: one kind an engine,
    fewer turns."""

    float_model: Path | None
    model: Path | None
    audio: Path | None
    openvino: tuple[Path, ...]
    threads: int
    quick: bool
    peers: tuple[str, ...] | None
    folder: Path  # where what is fetched and made stays
    lengths: tuple[int, ...] = LENGTHS
    files: int = 0
    batch_size: int = 8
    language: str = "en"
    device: str = "cpu"


def run(asked: Asked, report: Report) -> tuple[list[Engine], dict[str, str]]:
    """Every engine, timed; and why peers were left out."""
    asked.folder.mkdir(parents=True, exist_ok=True)
    engines, skipped = [], dict[str, str]()
    base = float_model(asked, report)
    with tempfile.TemporaryDirectory() as temporary:
        stretches, files = speech(asked, Path(temporary), report)
        try:
            for name, kind, path in candidates(asked, base, skipped, report):
                report(f"starting {name} {kind}")
                engine = start(name, kind, path, asked, stretches, skipped)
                if engine is not None:
                    engines.append(engine)
            if not any(engine.name == "dqw" for engine in engines):
                why = next((reason for name, reason in skipped.items() if name[:4] == "dqw "), "")
                raise UserError(f"dqw did not start ({why}): there is nothing to compare.")
            room = Room(engines, skipped)
            time_clips(room, stretches, 3 if asked.quick else 5, report)
            time_files(room, files, asked.batch_size, report)
        finally:
            for engine in engines:
                stop(engine.process)
    count_tokens(engines, base)
    return engines, skipped


def speech(asked: Asked, folder: Path, report: Report) -> tuple[dict[int, Path], list[Path]]:
    """Clips in files: by length, and those of ``--files``."""
    found = clips.speech(asked.audio, asked.language, asked.folder, report)
    stretches: dict[int, Path] = {}
    cut = clips.stretches(found, asked.lengths, again=asked.audio is None)
    for length, audio in zip(asked.lengths, cut, strict=True):
        stretches[length] = folder / f"{length}.npy"
        np.save(stretches[length], audio)
    files = []
    for i, audio in enumerate(clips.files(found, asked.files) if asked.files else []):
        files.append(folder / f"file-{i}.npy")
        np.save(files[-1], audio)
    return stretches, files


def time_clips(room: Room, stretches: dict[int, Path], turns: int, report: Report) -> None:
    if not stretches:
        return
    longest = max(stretches)
    for engine in list(room.engines):  # once uncounted: it brings caches and threads back
        answer = room.hear(engine, [stretches[longest]])
        if answer is not None:
            engine.megabytes = answer["megabytes"]
    for turn in range(turns):
        for length, clip in sorted(stretches.items(), reverse=True):
            for engine in list(room.engines):
                report(f"turn {turn + 1} of {turns}: {engine.label}, {length} s")
                answer = room.hear(engine, [clip])
                if answer is None:
                    continue
                engine.text[length] = answer["texts"][0]
                engine.seconds.setdefault(length, []).append(answer["seconds"])


def time_files(room: Room, files: list[Path], batch_size: int, report: Report) -> None:
    if not files:
        return
    seconds = sum(len(np.load(file)) for file in files) / clips.RATE
    # A GPU's graphs are captured for a number of clips: for all that come, once uncounted.
    turns = [min(TURN, len(files) - at) for at in range(0, len(files), TURN)]
    counts = {min(batch_size, turn) for turn in turns} | {turn % batch_size for turn in turns}
    for engine in list(room.engines):
        heard = all(room.hear(engine, files[:count], batch_size) for count in counts - {0})
        if heard and room.ask(engine, {"reset": True}) is not None:
            engine.files = Files(len(files), batch_size, seconds)
    for at in range(0, len(files), TURN):
        for engine in list(room.engines):
            report(f"{engine.label}: {at} of {len(files)} files")
            answer = room.hear(engine, files[at : at + TURN], batch_size)
            if answer is None:
                continue
            assert engine.files
            engine.files.seconds += answer["seconds"]
            engine.files.megabytes = answer["megabytes"]
            if at == 0:
                engine.files.megabytes_first = answer["megabytes"]


def count_tokens(engines: list[Engine], base: Path) -> None:
    """By one tokenizer for all, and the end is one."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    for engine in engines:
        for length, text in engine.text.items():
            engine.tokens[length] = len(tokenizer.encode(text, add_special_tokens=False).ids) + 1


# ---- their models ----


def float_model(asked: Asked, report: Report) -> Path:
    from dqw.whisper.samples import fetch_base_model

    if asked.float_model is not None:
        if not (asked.float_model / "tokenizer.json").is_file():
            raise UserError(f"--float-model {asked.float_model} is no folder with a tokenizer.json")
        return asked.float_model
    return fetch_base_model(asked.folder / "base", report)


def candidates(
    asked: Asked, base: Path, skipped: dict[str, str], report: Report
) -> list[tuple[str, str, Path]]:
    """(engine, kind, its model) of all that can run here."""
    name = "packed" if base.name == "base" else f"{base.name}-packed"
    packed = asked.model or packed_base(kept(asked.folder, base) / name, base, report)
    if asked.device == "cuda":
        return on_gpu(asked, base, packed, skipped)
    kinds = 1 if asked.quick else 2
    found = [("dqw", kind, packed) for kind in ("int8", "float")[:kinds]]
    for name in PEERS:
        if asked.peers is not None and name not in asked.peers:
            continue
        module = MODULES.get(name)
        if name == "dqw-float":
            if asked.peers is not None:
                skipped[name] = "it is of a GPU: on a CPU a float model is transformers'"
            continue
        if module and find_spec(module) is None:
            skipped[name] = f"{module} is not installed (pip install -e '.[bench-transcribe]')"
        elif name in ("dqw-generate", "dqw-plain"):
            found += [(name, kind, packed) for kind in ("int8", "float")[:kinds]]
        elif name == "transformers":
            found.append((name, "float32", base))
        elif name == "faster-whisper":
            if (base / "model.bin").is_file():
                found += [(name, kind, base) for kind in ("int8", "float32")[:kinds]]
            else:
                skipped[name] = f"{base} is no CTranslate2 folder"
        elif name == "whisper.cpp":
            own = kept(asked.folder, base)
            written = whisper_cpp(own, base, 1 if asked.quick else 3, skipped, report)
            found += [(name, kind, path) for kind, path in written]
        else:
            # Beside the float model, where python -m bench.convert_peers puts both.
            folders = asked.openvino or tuple(sorted(base.parent.glob("openvino-*")))
            found += [(name, path.name.removeprefix("openvino-"), path) for path in folders]
            if not folders:
                skipped[name] = "it has no model: python -m bench.convert_peers makes one"
    return found


def on_gpu(
    asked: Asked, base: Path, packed: Path, skipped: dict[str, str]
) -> list[tuple[str, str, Path]]:
    """The packed and the float model, in CUDA graphs and by transformers' generate."""
    here = {"dqw-float": ("float16", base), "dqw-generate": ("float", packed)}
    here["transformers"] = ("float16", base)
    names = tuple(here) if asked.peers is None else asked.peers
    skipped |= {name: "not timed on a GPU" for name in names if name not in here}
    return [("dqw", "float", packed), *((name, *here[name]) for name in names if name in here)]


def kept(folder: Path, base: Path) -> Path:
    """Where what is made of ``base`` stays: of a model from elsewhere in a folder of its own, as
    the next run may name another of the same name."""
    if base.resolve().parent == folder.resolve():
        return folder
    key = hashlib.sha256(str(base.resolve()).encode()).hexdigest()[:8]
    own = folder / f"{base.name}-{key}"
    own.mkdir(parents=True, exist_ok=True)
    return own


def packed_base(folder: Path, base: Path, report: Report) -> Path:
    """``base`` in 4 bits without training, made once."""
    if not (folder / "config.json").is_file():
        import dqw
        from dqw.whisper.checkpoint import load_whisper, save_processor

        report("packing the model once (a minute or two)")
        model, processor = load_whisper(base)
        dqw.freeze(dqw.quantize(model))
        model.save_pretrained(folder)
        save_processor(processor, folder)
    return folder


def whisper_cpp(
    folder: Path, base: Path, most: int, skipped: dict[str, str], report: Report
) -> list[tuple[str, Path]]:
    """The first ``most`` kinds that ``base``'s width allows, and their files."""
    found: list[tuple[str, Path]] = []
    for kind in ("q4_k", "q4_0", "q8_0"):
        if len(found) < most:
            try:
                found.append((kind, ggml(folder, base, kind, report)))
            except UserError as error:
                skipped[f"whisper.cpp {kind}"] = str(error)
    return found


def ggml(folder: Path, base: Path, kind: str, report: Report) -> Path:
    """``base`` as whisper.cpp's file, made once."""
    from bench import ggml as writer
    from dqw.whisper.checkpoint import load_whisper

    file = folder / f"{base.name}-{kind}.bin"
    if not file.is_file():
        report(f"writing whisper.cpp's {kind} model")
        writer.write(file, *load_whisper(base), kind)
    return file
