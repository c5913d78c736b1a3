"""What `dqw transcribe` is given, as files: audio files, folders of them, a pipe."""

from __future__ import annotations

import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dqw.errors import UserError
from dqw.whisper import media
from dqw.whisper.audio import readable_suffixes


@dataclass(frozen=True)
class Piped:
    """Audio that can be read but once."""

    data: bytes
    name: str

    def read_bytes(self) -> bytes:
        return self.data

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Input:
    """`audio` is what `load_audio` takes; its texts are called `stem` with a suffix, relative to
    where they go."""

    audio: Path | Piped
    stem: Path

    def target(self, folder: Path, form: str) -> Path:
        return folder / self.stem.with_name(f"{self.stem.name}.{form}")

    def is_beside(self, target: Path) -> bool:
        """Whether `target` would lie where dqw eval looks for the text of this audio."""
        if isinstance(self.audio, Piped):
            return False
        return target.resolve() == self.audio.with_suffix(target.suffix).resolve()


def find_inputs(given: Sequence[Path]) -> list[Input]:
    """Files, folders (all audio in them, at any depth) and "-", in their order.

    Raises UserError for a folder without audio and a terminal as the pipe. Whether files are there
    is not looked at.
    """
    found = []
    for path in given:
        if str(path) == "-":
            if sys.stdin.isatty():
                raise UserError("- reads audio from a pipe: COMMAND | dqw transcribe - --model …")
            found.append(Input(Piped(sys.stdin.buffer.read(), "stdin"), Path("stdin")))
        elif path.is_dir():
            files, other = audio_files(path)
            if not files:
                raise UserError(f"{path} holds no audio; {other or 'name files, or their folder'}")
            found += [Input(file, file.relative_to(path).with_suffix("")) for file in files]
        elif path.exists() and stat.S_ISFIFO(path.stat().st_mode):
            found.append(Input(Piped(path.read_bytes(), str(path)), Path(path.stem)))
        else:
            found.append(Input(path, Path(path.stem)))
    return found


def audio_files(folder: Path) -> tuple[list[Path], str]:
    """The audio in a folder and below, by its names, sorted; and a sentence on files that would
    be audio if PyAV was there ("": none)."""
    found = sorted(f for f in folder.rglob("*") if not f.name.startswith(".") and f.is_file())
    files = [f for f in found if f.suffix.lower() in readable_suffixes()]
    other = [f for f in found if f.suffix.lower() in media.SUFFIXES and not media.installed()]
    cure = "are of a type that PyAV reads: pip install 'dqw[media]'"
    return files, f"{len(other)} files such as {other[0].name} {cure}" if other else ""
