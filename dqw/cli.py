"""The `dqw` command. Heavy imports wait inside the commands, so that --help is quick.

A `UserError` becomes `Error: …` on stderr and exit code 1, Ctrl-C exit code 130, and neither shows
a traceback. Results go to stdout, progress to stderr.
"""

from __future__ import annotations

import atexit
import errno
import gc
import io
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from dqw.bars import err
from dqw.errors import UserError

# What is wrong with the place that a file should go to.
_PLACES = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR,
    errno.EISDIR, errno.ENAMETOOLONG, errno.EIO, errno.EFBIG,
)  # fmt: skip


class _Group(TyperGroup):
    """Turns what a user can cause into one sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            sentence, code = str(error), 1
        except KeyboardInterrupt:
            sentence, code = "interrupted", 130
        except BrokenPipeError:  # `dqw … | head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except OSError as error:
            if error.errno not in _PLACES:
                raise
            name = error.filename2 or error.filename  # of a rename, what it was to become
            where = f" for {name}" if name else ""
            cure = "free or choose another place"
            if error.errno == errno.EACCES:  # to read or to write
                cure = "give yourself access to it, or name another path"
            sentence, code = f"{(error.strerror or '').lower()}{where}: {cure}", 1
        err.print(f"Error: {sentence}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(code)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Whisper made small and fast: distillation and quantization to 2 to 8 bits.",
)

Model = Annotated[
    str,
    typer.Option(
        help="A folder that dqw wrote, a Hugging Face or faster-whisper folder, or a hub id."
    ),
]
BeamSize = Annotated[int, typer.Option(help="Beams of the search; 1 is greedy.")]
BatchSize = Annotated[int, typer.Option(help="Clips decoded at once.")]
Context = Annotated[
    str,
    typer.Option(
        help="auto: short clips are not padded to 30 s where the model learned to do without; "
        "full: always."
    ),
]
Activations = Annotated[
    str,
    typer.Option(
        help="How a packed model multiplies: int8 (faster on a CPU) or float; auto: as it was made."
    ),
]
Device = Annotated[
    str,
    typer.Option(help="cpu, or cuda: float16 on a GPU, for large models and many clips at once."),
]


def main() -> None:
    """Entry point of the console script."""
    atexit.register(_leave_quickly)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may hold what it can't encode
        sys.stdout.reconfigure(errors="backslashreplace")
    app()


def _leave_quickly() -> None:
    """At exit Python would search half a million objects for cycles: 0.3 s after the last word.
    Triton, which training and transformers import, would report what is then left: 60 lines."""
    if "triton" not in sys.modules:
        gc.freeze()


def _show_warning(message: Warning | str, *where: Any) -> None:
    """A warning as a sentence; the line of code that gave it helps no user."""
    err.print(f"Warning: {message}", style="yellow", markup=False, soft_wrap=True)


# ---------------------------------------------------------------- transcribe


def _target(folder: Path, audio: Path, form: str) -> Path:
    return folder / f"{audio.stem}.{form}"


@app.command(epilog="Example: dqw transcribe talk.mp3 --model runs/demo/student --format srt")
def transcribe(
    audio: Annotated[list[Path], typer.Argument(help="wav, flac, mp3 or ogg files of any length.")],
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
    form: Annotated[
        list[str] | None,
        typer.Option(
            "--format", help="txt, json, srt, vtt or all; may be given again. Default: txt."
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Write NAME.FORMAT files here instead of printing."),
    ] = None,
    skip_existing: Annotated[
        bool,
        typer.Option("--skip-existing", help="Leave out audio whose files in --output-dir exist."),
    ] = False,
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
    from dqw.whisper.audio import audio_seconds

    forms = _forms(form or ["txt"])
    if output_dir is None and len(forms) > 1:
        raise UserError("several formats can't be printed at once; give --output-dir")
    if output_dir is None and len(audio) > 1 and forms[0] in ("srt", "vtt"):
        raise UserError(f"{forms[0]} of several files can't be printed at once; give --output-dir")
    from dqw.whisper.files import check_writable, write_atomic

    if skip_existing and output_dir is None:
        raise UserError("--skip-existing is for files that were written; give --output-dir")
    if output_dir is not None:
        _check_names(audio)
        if skip_existing:  # each is there whole or not at all
            left = [a for a in audio if _missing(output_dir, a, forms)]
            if len(left) < len(audio):
                err.print(f"{len(audio) - len(left)} of {len(audio)} are written already")
            if not left:
                return
            audio = left
        if "txt" in forms:
            made_here = [a for a in audio if "txt" in _missing(output_dir, a, forms)]
            _check_references(made_here if skip_existing else audio, output_dir)
        check_writable(output_dir / f".{os.getpid()}.part", "--output-dir")
    seconds: list[float | None] = []
    with err.status(f"looking at {len(audio)} files"):  # of an mp3 all of it
        for path in audio:
            try:
                seconds.append(audio_seconds(path))
            except UserError:  # of several, a damaged one is left out; one that is not there, no
                if len(audio) == 1 or not path.is_file():
                    raise
                seconds.append(None)

    from dqw.whisper.engines import open_engine
    from dqw.whisper.transcribe import Transcript, iter_transcripts
    from dqw.whisper.writers import TIMED, render

    with err.status(f"loading {escape(model)}"):
        engine = open_engine(model, beam_size, activations, device)
    timed = timestamps or any(name in TIMED for name in forms)
    waiting: dict[int, Transcript | None] = {}
    printed = damaged = written = 0

    with audio_progress(sum(s or 0.0 for s in seconds)) as advance:

        def print_ready() -> None:  # in the order given, as soon as possible
            nonlocal printed
            while printed in waiting:
                found = waiting.pop(printed)
                if found is not None:
                    text = render(found, forms[0], timestamps)
                    with advance.aside():
                        _print_transcript(text, audio[printed], forms[0], len(audio) > 1)
                printed += 1

        def leave_out(index: int, error: UserError) -> None:
            nonlocal damaged
            damaged += 1
            words = f"Error: {error}; the others go on"
            err.print(words, style="red", markup=False, soft_wrap=True)
            if output_dir is None:
                waiting[index] = None
                print_ready()

        steps = iter_transcripts(
            engine, audio, language, task, beam_size, timed, batch_size, advance, audio_context,
            damaged=leave_out if len(audio) > 1 else None, seconds=seconds,
            ahead=None if output_dir is not None else max(_AHEAD, 2 * batch_size),
        )  # fmt: skip
        for index, transcript in steps:
            if output_dir is not None:
                missing = _missing(output_dir, audio[index], forms) if skip_existing else forms
                written += len(missing)
                for name in missing:
                    path = _target(output_dir, audio[index], name)
                    write_atomic(path, render(transcript, name, timestamps))
                continue
            waiting[index] = transcript
            print_ready()
    if output_dir is not None:
        err.print(f"wrote {written} files to {output_dir}", markup=False, soft_wrap=True)
        if "txt" in forms and any(p.parent.resolve() == output_dir.resolve() for p in audio):
            err.print("beside audio dqw eval and compress take a .txt for what is said there")
    if damaged:
        raise typer.Exit(1)


def _forms(given: list[str]) -> list[str]:
    from dqw.whisper.writers import FORMATS

    names = [name for item in given for name in item.lower().split(",")]
    for name in names:
        if name not in (*FORMATS, "all"):
            raise UserError(f"the format is '{name}'; choose txt, json, srt, vtt or all")
    return list(FORMATS) if "all" in names else list(dict.fromkeys(names))


_AHEAD = 32  # files whose texts may wait to be printed for one that was named before them


def _missing(folder: Path, audio: Path, forms: list[str]) -> list[str]:
    """Those of ``forms`` that are not written yet."""
    return [name for name in forms if not _target(folder, audio, name).exists()]


def _check_names(audio: list[Path]) -> None:
    first: dict[str, Path] = {}
    for path in audio:
        if path.stem in first:
            raise UserError(
                f"{first[path.stem]} and {path} would write the same output file; transcribe them "
                "into two folders"
            )
        first[path.stem] = path


def _check_references(audio: list[Path], output_dir: Path) -> None:
    folder = output_dir.resolve()
    for path in audio:
        text = folder / f"{path.stem}.txt"
        if text.exists() and path.parent.resolve() == folder:
            raise UserError(
                f"{text} is there already, and beside audio it is what dqw eval takes for the "
                "reference; give another --output-dir, or delete it"
            )


def _print_transcript(text: str, path: Path, form: str, several: bool) -> None:
    if several and form == "txt":
        text = f"{path}:\n{text}"
    elif several:  # json: one object a line
        import json

        text = json.dumps({"audio": str(path), **json.loads(text)}, ensure_ascii=False) + "\n"
    sys.stdout.write(text)
    sys.stdout.flush()


# ---------------------------------------------------------------- info


@app.command(epilog="Example: dqw info runs/demo/student")
def info(
    folder: Annotated[Path, typer.Argument(help="A model folder.", metavar="DIR")],
    layers: Annotated[bool, typer.Option("--layers", help="List every packed layer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show a model's bits and bytes, and which kernels serve it on this machine."""
    from dqw.whisper.report import inspect_folder, to_dict
    from dqw.whisper.tables import print_kernels, print_layers, print_sizes

    report = inspect_folder(folder)

    from dqw.ops import backend_info
    from dqw.whisper.context import AudioContext
    from dqw.whisper.coverage import coverage

    kernels = backend_info()
    path = coverage(report.config)
    context = AudioContext.of(report.config)
    if as_json:
        import json

        more = {"kernels": kernels, "path": path}
        more["audio_context"] = context.to_dict() if context else "full"
        print(json.dumps({**to_dict(report), **more}, indent=2))
        return
    print_sizes(report, folder)
    if layers:
        print_layers(report)
    print_kernels(kernels)
    for part, words in path.items():
        print(f"{part} on a CPU: {words}")
    if context:
        print(f"audio context: dynamic ({context})")


# ---------------------------------------------------------------- shared


class AudioBar:
    """What `audio_progress` yields: called with seconds of audio, it advances by them."""

    def __init__(self, bar: Any, task: Any, total: float) -> None:
        self._bar, self._task, self._total = bar, task, total
        self._start, self._done = time.perf_counter(), 0.0

    def __call__(self, seconds: float) -> None:
        self._done += seconds
        speed = f"{self._done / (time.perf_counter() - self._start):.1f} × real time"
        total = max(self._total, self._done) if self._total else None
        self._bar.update(self._task, completed=self._done, total=total, speed=speed)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The bar makes room for what is written to stdout, where both are on one terminal."""
        shared = err.is_interactive and sys.stdout.isatty()
        if shared:
            self._bar.stop()
        yield
        if shared:
            self._bar.start()


@contextmanager
def audio_progress(total: float) -> Iterator[AudioBar]:
    """Shows a bar with the speed on stderr while it lasts. total: seconds of all audio; 0: not
    known."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.completed:.0f}" + " of {task.total:.0f}" * bool(total) + " s of audio"),
        BarColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    # rich would send what goes to stdout to the bar's console, stderr.
    with Progress(*columns, console=err, transient=True, redirect_stdout=False) as bar:
        yield AudioBar(bar, bar.add_task("", total=total or None, speed=""), total)


import dqw.cli_compress  # noqa: E402  adds compress and demo
import dqw.cli_eval  # noqa: E402  adds eval
import dqw.cli_study  # noqa: E402, F401  adds study
