"""``dqw transcribe``: what is said in files, folders and pipes, printed or written."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from dqw.bars import err
from dqw.cli import (
    Activations,
    AudioBar,
    BatchSize,
    BeamSize,
    Context,
    Device,
    Model,
    app,
    audio_progress,
)
from dqw.errors import UserError

if TYPE_CHECKING:
    from dqw.whisper.inputs import Input
    from dqw.whisper.transcript import Transcript

_AHEAD = 32  # files whose texts may wait to be printed for one that was named before them


@app.command(epilog="Example: dqw transcribe talk.mp3 --model runs/demo/student --format srt")
def transcribe(
    audio: Annotated[
        list[Path],
        typer.Argument(
            help="Files of any length, folders of them, or - for a pipe: wav, flac, mp3, ogg; with "
            "PyAV installed (dqw\\[media]) also m4a, mp4, webm and more."
        ),
    ],
    model: Model,
    language: Annotated[
        str | None,
        typer.Option(
            help="Language spoken, such as en or ja; left out: the one that a fine-tune names, "
            "or detected."
        ),
    ] = None,
    task: Annotated[
        str, typer.Option(help="transcribe, or translate into English.")
    ] = "transcribe",
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Words to expect, such as names, or a text in the style wanted; given before "
            "each window."
        ),
    ] = None,
    form: Annotated[
        list[str] | None,
        typer.Option(
            "--format", help="txt, json, srt, vtt or all; may be given again. Default: txt."
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Write NAME.FORMAT files here instead of printing; those of a folder as they lie "
            "in it.",
        ),
    ] = None,
    skip_existing: Annotated[
        bool,
        typer.Option("--skip-existing", help="Leave out audio whose files in --output-dir exist."),
    ] = False,
    no_speech_threshold: Annotated[
        float,
        typer.Option(
            help="Windows that the model takes for no speech with more than this probability, and "
            "whose words it doubts, are left out; 1: none are."
        ),
    ] = 0.6,
    timestamps: Annotated[
        bool, typer.Option("--timestamps", help="Times of each segment.")
    ] = False,
    beam_size: BeamSize = 1,
    batch_size: BatchSize = 8,
    audio_context: Context = "auto",
    activations: Activations = "auto",
    device: Device = "cpu",
) -> None:
    """Write down what is said in audio files."""
    from dqw.whisper.inputs import find_inputs

    forms = _forms(form or ["txt"])
    if output_dir is None and len(forms) > 1:
        raise UserError("several formats can't be printed at once; give --output-dir")
    if skip_existing and output_dir is None:
        raise UserError("--skip-existing is for files that were written; give --output-dir")
    inputs = find_inputs(audio)
    several = len(inputs) > 1
    if output_dir is None and several and forms[0] in ("srt", "vtt"):
        raise UserError(f"{forms[0]} of several files can't be printed at once; give --output-dir")
    if output_dir is not None:
        inputs = _to_write(inputs, output_dir, forms, skip_existing)
        if not inputs:
            return
    seconds = _lengths(inputs, several)

    from dqw.whisper.engines import open_engine
    from dqw.whisper.transcribe import iter_transcripts
    from dqw.whisper.writers import TIMED

    with err.status(f"loading {escape(model)}"):
        engine = open_engine(model, beam_size, activations, device)
    timed = timestamps or any(name in TIMED for name in forms)
    damaged = 0
    with audio_progress(sum(s or 0.0 for s in seconds)) as advance:
        sink: _Printer | _Writer
        if output_dir is None:
            sink = _Printer(inputs, forms[0], timestamps, several, advance)
        else:
            sink = _Writer(inputs, forms, timestamps, output_dir, skip_existing)

        def leave_out(index: int, error: UserError) -> None:
            nonlocal damaged
            damaged += 1
            words = f"Error: {error}; the others go on"
            err.print(words, style="red", markup=False, soft_wrap=True)
            sink.done(index, None)

        steps = iter_transcripts(
            engine, [one.audio for one in inputs], language, task, beam_size, timed, batch_size,
            advance, audio_context, damaged=leave_out if several else None, seconds=seconds,
            ahead=None if output_dir is not None else max(_AHEAD, 2 * batch_size), prompt=prompt,
            no_speech=no_speech_threshold,
        )  # fmt: skip
        for index, transcript in steps:
            sink.done(index, transcript)
    sink.end()
    if damaged:
        raise typer.Exit(1)


def _lengths(inputs: Sequence[Input], several: bool) -> list[float | None]:
    """Seconds of each; None: damaged. A file that is not there is an error at once, and of one
    alone any fault."""
    from dqw.whisper.audio import audio_seconds

    seconds: list[float | None] = []
    with err.status(f"looking at {len(inputs)} files"):  # of an mp3 all of it
        for one in inputs:
            try:
                seconds.append(audio_seconds(one.audio))
            except UserError:
                if not several or (isinstance(one.audio, Path) and not one.audio.is_file()):
                    raise
                seconds.append(None)
    return seconds


class _Printer:
    """Prints texts in the order given, each as soon as those before it are out."""

    def __init__(
        self, inputs: Sequence[Input], form: str, timestamps: bool, several: bool,
        advance: AudioBar,
    ) -> None:  # fmt: skip
        self.inputs, self.form, self.timestamps = inputs, form, timestamps
        self.several, self.advance = several, advance
        self.waiting: dict[int, Transcript | None] = {}
        self.printed = 0

    def done(self, index: int, transcript: Transcript | None) -> None:
        """None: the audio is damaged."""
        from dqw.whisper.writers import render

        self.waiting[index] = transcript
        while self.printed in self.waiting:
            found = self.waiting.pop(self.printed)
            if found is not None:
                text = render(found, self.form, self.timestamps)
                with self.advance.aside():
                    self._print(text, self.inputs[self.printed])
            self.printed += 1

    def end(self) -> None:
        """All are done."""

    def _print(self, text: str, source: Input) -> None:
        if self.several and self.form == "txt":
            text = f"{source.audio}:\n{text}"
        elif self.several:  # json: one object a line
            import json

            found = {"audio": str(source.audio), **json.loads(text)}
            text = json.dumps(found, ensure_ascii=False) + "\n"
        sys.stdout.write(text)
        sys.stdout.flush()


class _Writer:
    """Writes each text as it comes, whole or not at all."""

    def __init__(
        self, inputs: Sequence[Input], forms: Sequence[str], timestamps: bool, folder: Path,
        skip_existing: bool,
    ) -> None:  # fmt: skip
        self.inputs, self.forms, self.timestamps = inputs, forms, timestamps
        self.folder, self.skip_existing = folder, skip_existing
        self.written = 0

    def done(self, index: int, transcript: Transcript | None) -> None:
        """None: the audio is damaged."""
        from dqw.whisper.files import write_atomic
        from dqw.whisper.writers import render

        if transcript is None:
            return
        one = self.inputs[index]
        forms = _missing(self.folder, one, self.forms) if self.skip_existing else self.forms
        self.written += len(forms)
        for form in forms:
            write_atomic(one.target(self.folder, form), render(transcript, form, self.timestamps))

    def end(self) -> None:
        err.print(f"wrote {self.written} files to {self.folder}", markup=False, soft_wrap=True)
        if "txt" in self.forms and any(
            one.is_beside(one.target(self.folder, "txt")) for one in self.inputs
        ):
            err.print("beside audio dqw eval and compress take a .txt for what is said there")


def _to_write(
    inputs: list[Input], folder: Path, forms: list[str], skip_existing: bool
) -> list[Input]:
    """Those whose texts are to be written. Raises UserError for two that would write one file, a
    reference that would be lost, and a folder that cannot be written."""
    from dqw.whisper.files import check_writable

    _check_names(inputs)
    if skip_existing:  # each is there whole or not at all
        left = [one for one in inputs if _missing(folder, one, forms)]
        if len(left) < len(inputs):
            err.print(f"{len(inputs) - len(left)} of {len(inputs)} are written already")
        if not left:
            return []
        inputs = left
    if "txt" in forms:
        made = [one for one in inputs if "txt" in _missing(folder, one, forms)]
        _check_references(made if skip_existing else inputs, folder)
    check_writable(folder / f".{os.getpid()}.part", "--output-dir")
    return inputs


def _forms(given: list[str]) -> list[str]:
    from dqw.whisper.writers import FORMATS

    names = [name for item in given for name in item.lower().split(",")]
    for name in names:
        if name not in (*FORMATS, "all"):
            raise UserError(f"the format is '{name}'; choose txt, json, srt, vtt or all")
    return list(FORMATS) if "all" in names else list(dict.fromkeys(names))


def _missing(folder: Path, one: Input, forms: Sequence[str]) -> list[str]:
    """Those of ``forms`` that are not written yet."""
    return [form for form in forms if not one.target(folder, form).exists()]


def _check_names(inputs: list[Input]) -> None:
    first: dict[Path, Input] = {}
    for one in inputs:
        before = first.setdefault(one.stem, one)
        if before is not one:
            raise UserError(
                f"{before.audio} and {one.audio} would write the same output file; transcribe them "
                "into two folders"
            )


def _check_references(inputs: list[Input], folder: Path) -> None:
    for one in inputs:
        text = one.target(folder.resolve(), "txt")
        if text.exists() and one.is_beside(text):
            raise UserError(
                f"{text} is there already, and beside audio it is what dqw eval takes "
                "for the reference; give another --output-dir, or delete it"
            )
