"""``python -m bench --op transcribe``: whole clips to text, against the engines people use.

Clips of 11 s and of 30 s cut from one recording, engines taking turns, medians. From the two clips
each engine's cost of a further token follows (their tokens differ, their encoder does not), and
what it does once a clip. Peak memory is that of loading and the first, longest clip. Peers that are
not installed, or lack their model, are named with the reason.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from bench.rows import write
from dqw.errors import UserError

SECONDS = (11, 30)
RATE = 16_000
PEERS = ("dqw-plain", "transformers", "faster-whisper", "whisper.cpp", "openvino-genai")
MODULES = {"faster-whisper": "faster_whisper", "whisper.cpp": "pywhispercpp"}
MODULES["openvino-genai"] = "openvino_genai"


@dataclass(frozen=True)
class Asked:
    """float_model: a folder that faster-whisper reads too; model: a packed folder, or None to make
    one; audio: a file, or None for the samples; openvino: a folder that optimum-cli exported."""

    float_model: Path | None
    model: Path | None
    audio: Path | None
    openvino: Path | None
    threads: int
    quick: bool
    peers: tuple[str, ...] | None
    folder: Path  # where what is fetched and made stays


@dataclass
class Engine:
    """An engine in its process, and what it took: seconds by clip length."""

    name: str
    kind: str
    process: subprocess.Popen
    load: float = 0.0
    seconds: dict[int, list[float]] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    megabytes: float = 0.0

    def clip(self, length: int) -> float:
        return statistics.median(self.seconds[length])

    @property
    def per_token(self) -> float | None:
        short, long = SECONDS
        more = self.tokens[long] - self.tokens[short]
        return (self.clip(long) - self.clip(short)) / more if more >= 10 else None

    @property
    def once(self) -> float | None:
        short, _ = SECONDS
        if self.per_token is None:
            return None
        return self.clip(short) - self.tokens[short] * self.per_token

    def as_json(self) -> dict[str, Any]:
        return {
            "engine": self.name,
            "kind": self.kind,
            "load_seconds": self.load,
            "seconds": {str(length): self.clip(length) for length in self.seconds},
            "tokens": {str(length): count for length, count in self.tokens.items()},
            "once_seconds": self.once,
            "token_seconds": self.per_token,
            "peak_megabytes": self.megabytes,
            "text": {str(length): text for length, text in self.text.items()},
        }


def run(asked: Asked, report: Callable[[str], None]) -> tuple[list[Engine], dict[str, str]]:
    """Every engine, timed; and why peers were left out."""
    asked.folder.mkdir(parents=True, exist_ok=True)
    engines, skipped = [], dict[str, str]()
    base = float_model(asked, report)
    with tempfile.TemporaryDirectory() as temporary:
        clips = cut(asked, Path(temporary), report)
        try:
            for name, kind, path in candidates(asked, base, skipped, report):
                report(f"starting {name} {kind}")
                engine = start(name, kind, path, asked.threads, base, skipped)
                if engine is not None:
                    engines.append(engine)
            for turn in range(1 + (2 if asked.quick else 5)):
                for length, clip in sorted(clips.items(), reverse=True):
                    for engine in engines:
                        report(f"turn {turn}: {engine.name} {engine.kind}, {length} s")
                        measure(engine, length, clip, counts=turn > 0)
        finally:
            for engine in engines:
                engine.process.kill()
                engine.process.wait()
    return engines, skipped


def float_model(asked: Asked, report: Callable[[str], None]) -> Path:
    from dqw.whisper.samples import fetch_base_model

    if asked.float_model is not None:
        return asked.float_model
    return fetch_base_model(asked.folder / "base", report)


def cut(asked: Asked, folder: Path, report: Callable[[str], None]) -> dict[int, Path]:
    """Clips of ``SECONDS`` from the named file, or from the English samples joined."""
    from dqw.whisper.audio import load_audio
    from dqw.whisper.samples import fetch_speech_samples

    if asked.audio is not None:
        audio = load_audio(asked.audio)
    else:
        manifest = fetch_speech_samples(asked.folder / "speech", report)
        rows = [json.loads(line) for line in manifest.read_text().splitlines()]
        english = [row["audio"] for row in rows if row["language"] == "en"]
        audio = np.concatenate([load_audio(manifest.parent / name) for name in english])
        audio = np.tile(audio, -(-SECONDS[-1] * RATE // len(audio)))
    if len(audio) < SECONDS[-1] * RATE:
        raise UserError(f"{asked.audio} is shorter than {SECONDS[-1]} s: name a longer recording.")
    clips = {}
    for length in SECONDS:
        clips[length] = folder / f"{length}.npy"
        np.save(clips[length], audio[: length * RATE])
    return clips


def candidates(
    asked: Asked, base: Path, skipped: dict[str, str], report: Callable[[str], None]
) -> list[tuple[str, str, Path]]:
    """(engine, kind, its model) of all that can run here."""
    packed = asked.model or packed_base(asked.folder / "packed", base, report)
    found = [("dqw", kind, packed) for kind in ("int8", "float")]
    for name in PEERS:
        if asked.peers is not None and name not in asked.peers:
            continue
        module = MODULES.get(name)
        if module and find_spec(module) is None:
            skipped[name] = f"{module} is not installed (pip install -e '.[bench-transcribe]')"
        elif name == "dqw-plain":
            found += [(name, kind, packed) for kind in ("int8", "float")]
        elif name == "transformers":
            found.append((name, "float32", base))
        elif name == "faster-whisper":
            if (base / "model.bin").is_file():
                found += [(name, kind, base) for kind in ("int8", "float32")]
            else:
                skipped[name] = f"{base} is no CTranslate2 folder"
        elif name == "whisper.cpp":
            found += [(name, kind, ggml(asked, base, kind, report)) for kind in ("q4_0", "q8_0")]
        elif asked.openvino is None:
            skipped[name] = "no --openvino-model was named (optimum-cli export openvino makes one)"
        else:
            found.append((name, asked.openvino.name, asked.openvino))
    return found


def packed_base(folder: Path, base: Path, report: Callable[[str], None]) -> Path:
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


def ggml(asked: Asked, base: Path, kind: str, report: Callable[[str], None]) -> Path:
    from bench import ggml as writer
    from dqw.whisper.checkpoint import load_whisper

    file = asked.folder / f"{base.name}-{kind}.bin"
    if not file.is_file():
        report(f"writing whisper.cpp's {kind} model")
        writer.write(file, *load_whisper(base), kind)
    return file


def start(
    name: str, kind: str, path: Path, threads: int, base: Path, skipped: dict[str, str]
) -> Engine | None:
    command = [sys.executable, "-m", "bench.engines", name, str(path), str(threads), kind]
    process = subprocess.Popen(
        [*command, str(base)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        process.wait()
        skipped[f"{name} {kind}"] = "it ended while loading"
        return None
    return Engine(name, kind, process, json.loads(line)["load"])


def measure(engine: Engine, length: int, clip: Path, counts: bool) -> None:
    assert engine.process.stdin and engine.process.stdout
    engine.process.stdin.write(json.dumps({"audio": str(clip)}) + "\n")
    engine.process.stdin.flush()
    line = engine.process.stdout.readline()
    if not line:
        raise UserError(f"{engine.name} {engine.kind} ended on the {length} s clip: leave it out.")
    answer = json.loads(line)
    if counts:
        engine.seconds.setdefault(length, []).append(answer["seconds"])
    engine.tokens[length], engine.text[length] = answer["tokens"], answer["text"]
    engine.megabytes = max(engine.megabytes, answer["megabytes"])


def print_table(console: Console, engines: list[Engine], skipped: dict[str, str]) -> None:
    """A line an engine; the ratio is its time on the long clip over dqw's best."""
    from bench.table import print_skipped

    short, long = SECONDS
    best = min(e.clip(long) for e in engines if e.name == "dqw")
    table = Table(title="transcribe, greedy, English, no timestamps", title_justify="left",
                  box=box.SIMPLE_HEAD)  # fmt: skip
    table.add_column("engine")
    for name in (f"{short} s\nclip, s", f"{long} s\nclip, s", "tokens", "once a\nclip, ms",
                 "a token\nms", "peak\nMB", "load\ns", "time of\ndqw's best"):  # fmt: skip
        table.add_column(name, justify="right")
    for e in engines:
        once = "-" if e.once is None else f"{e.once * 1e3:.0f}"
        token = "-" if e.per_token is None else f"{e.per_token * 1e3:.2f}"
        tokens = f"{e.tokens[short]} · {e.tokens[long]}"
        table.add_row(f"{e.name} {e.kind}", f"{e.clip(short):.3f}", f"{e.clip(long):.3f}", tokens,
                      once, token, f"{e.megabytes:.0f}", f"{e.load:.1f}",
                      f"{e.clip(long) / best:.2f}×")  # fmt: skip
    console.print(table)
    print_skipped(console, skipped)


def save(file: Path, facts: dict, engines: list[Engine], skipped: dict[str, str]) -> None:
    report = {"machine": facts, "skipped": skipped, "engines": [e.as_json() for e in engines]}
    write(file, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
