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
from typer.core import TyperGroup

from dqw import __version__
from dqw.bars import err
from dqw.errors import UserError

# What is wrong with the place that a file should go to.
_PLACES = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR,
    errno.EISDIR, errno.ENAMETOOLONG, errno.EIO, errno.EFBIG,
)  # fmt: skip


_COMMANDS = ("compress", "transcribe", "eval", "info", "study", "demo")


class _Group(TyperGroup):
    """Turns what a user can cause into one sentence and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=_COMMANDS.index)

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
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Whisper made small and fast: distillation and quantization to 2 to 8 bits.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _of_dqw_itself(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print dqw's version."
        ),
    ] = False,
) -> None:
    # Nothing is left to do; no docstring, which the help of a bare `dqw` would show.
    return


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
import dqw.cli_study  # noqa: E402  adds study
import dqw.cli_transcribe  # noqa: E402, F401  adds transcribe
