"""The engines of ``--op transcribe``, each in a process of its own, and what they took."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqw.errors import UserError

if TYPE_CHECKING:
    from bench.transcribe import Asked

FIRST = 11  # seconds of the clip whose text a fresh process is waited for


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
