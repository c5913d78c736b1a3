"""``python -m bench --op transcribe``: whole clips to text, against the engines people use.

Stretches of one recording, engines taking turns, medians. Before that each engine is started anew
and hears the clip nearest to 11 s: the time to the first text of a fresh process. From the shortest
and the longest clip follows the cost of a further token (their tokens differ, their encoder does
not), and of what is done once a clip. Peak memory is that of loading and the longest clip.
``--files N`` are N files in batches, 20 a turn, with the peak after 20 and after all: nothing may
grow. Peers that are not installed, or lack their model, are named with the reason.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench import clips
from dqw.errors import UserError

FOLDER = Path("runs") / "bench"
LENGTHS = (3, 6, 11, 20, 30)
FIRST = 11  # seconds of the clip whose text a fresh process is waited for
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


@dataclass
class Files:
    """``--files``: seconds of all, and the process's peak after the first turn and after all."""

    count: int
    batch_size: int
    audio_seconds: float = 0.0
    seconds: float = 0.0
    megabytes_first: float = 0.0
    megabytes: float = 0.0

    @property
    def speed(self) -> float:
        """Seconds of audio a second."""
        return self.audio_seconds / self.seconds


@dataclass
class Engine:
    """An engine in its process, and what it took: seconds by clip length. dynamic: its encoder
    takes longer for a longer clip, so that two clips do not tell what a token costs."""

    name: str
    kind: str
    process: subprocess.Popen
    load: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    seconds: dict[int, list[float]] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    megabytes: float = 0.0
    files: Files | None = None
    dynamic: bool = False
    model: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} {self.kind}"

    def clip(self, length: int) -> float:
        return statistics.median(self.seconds[length])

    @property
    def first_text(self) -> float | None:
        return statistics.median(self.first) if self.first else None

    @property
    def per_token(self) -> float | None:
        short, long = min(self.seconds, default=0), max(self.seconds, default=0)
        more = self.tokens.get(long, 0) - self.tokens.get(short, 0)
        if more < 10 or self.dynamic:
            return None
        return (self.clip(long) - self.clip(short)) / more

    @property
    def once(self) -> float | None:
        if self.per_token is None:
            return None
        short = min(self.seconds)
        return self.clip(short) - self.tokens[short] * self.per_token


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


@dataclass
class Room:
    """The engines that are timed. A rival that ends takes its own rows away, and no others."""

    engines: list[Engine]
    skipped: dict[str, str]

    def ask(self, engine: Engine, question: dict[str, Any]) -> dict[str, Any] | None:
        """Its answer; None: it is gone. Raises UserError where it is dqw's own."""
        try:
            return ask(engine, question)
        except UserError as error:
            if engine.name == "dqw":
                raise
            stop(engine.process)
            self.engines.remove(engine)
            self.skipped[engine.label] = str(error)
            return None

    def hear(self, engine: Engine, files: list[Path], batch_size: int = 1) -> dict[str, Any] | None:
        return self.ask(engine, _clips(files, batch_size))


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


# ---- engines in their processes ----


def start(
    name: str,
    kind: str,
    path: Path,
    asked: Asked,
    stretches: dict[int, Path],
    skipped: dict[str, str],
) -> Engine | None:
    """Started (three times unless quick; the last one stays), loaded, and its first text heard."""
    engine = None
    first = min(stretches, key=lambda length: abs(length - FIRST), default=None)
    for _ in range(1 if asked.quick else 3):
        command = [sys.executable, "-m", "bench.engines", name, str(path), str(asked.threads), kind]
        if engine is not None:
            stop(engine.process)
        started = time.perf_counter()
        process = subprocess.Popen(
            [*command, asked.language, asked.device],
            env={**os.environ, "OMP_NUM_THREADS": str(asked.threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout
        answer = json.loads(process.stdout.readline() or "{}")
        if "load" not in answer:
            stop(process)
            skipped[f"{name} {kind}"] = answer.get("error", "it ended while loading")
            return None
        if engine is None:
            engine = Engine(name, kind, process, dynamic=answer["dynamic"], model=str(path))
        engine.process = process
        engine.load.append(answer["load"])
        if first is not None:
            try:
                hear(engine, [stretches[first]])
            except UserError as error:
                stop(process)
                skipped[engine.label] = str(error)
                return None
            engine.first.append(time.perf_counter() - started)
    return engine


def stop(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


def hear(engine: Engine, files: list[Path], batch_size: int = 1) -> dict[str, Any]:
    return ask(engine, _clips(files, batch_size))


def _clips(files: list[Path], batch_size: int) -> dict[str, Any]:
    return {"clips": [str(file) for file in files], "batch": batch_size}


def ask(engine: Engine, question: dict[str, Any]) -> dict[str, Any]:
    assert engine.process.stdin and engine.process.stdout
    try:
        engine.process.stdin.write(json.dumps(question) + "\n")
        engine.process.stdin.flush()
        line = engine.process.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        raise UserError(f"{engine.label} ended while it transcribed: leave it out of --peers.")
    return json.loads(line)


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
