"""``python -m bench``: dqw's operators timed against their rivals and this machine's ceilings.

A mistake on the command line is one sentence and exit code 2, before anything is timed.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from bench import transcribe
from dqw.errors import UserError
from dqw.heap import keep_freed_memory

err = Console(stderr=True, highlight=False)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    op: Annotated[
        str,
        typer.Option(help="quant_linear, fake_quant, embedding, train_step, all, or transcribe."),
    ] = "all",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    shapes: Annotated[
        str,
        typer.Option(
            help="whisper, or M,K,N (rows of x, in, out); more of them after a semicolon. "
            "train_step: clips, width, vocabulary."
        ),
    ] = "whisper",
    bits: Annotated[str, typer.Option(help="2 to 8, or several such as 3,4.")] = "4",
    grid: Annotated[
        str,
        typer.Option(
            help="apot, pot, uniform; to 5 bits lloyd, stretched, learned; or magnitudes, like 1,3."
        ),
    ] = "apot",
    group_sizes: Annotated[
        str,
        typer.Option(help="quant_linear, embedding: columns a scale, beside one scale a row."),
    ] = "64",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of x and weights: float32 (where not given, on a CPU), bfloat16 or float16 "
            "(on a GPU)."
        ),
    ] = None,
    peers: Annotated[
        str,
        typer.Option(
            help="all (also where no value follows), none, or names such as torch-float32,openvino."
        ),
    ] = "all",
    threads: Annotated[
        int | None, typer.Option(help="Threads; PyTorch's choice if not given.")
    ] = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="Weights from memory: more copies than caches hold.")
    ] = False,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write all rows to this file.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write machine and all rows to this file.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the roofline (transcribe: time by length) into this PNG file."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="A git revision: its kernels, built anew, are one more peer."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute: few shapes.")] = False,
    audio: Annotated[
        Path | None,
        typer.Option(
            help="transcribe: a recording, or a folder or manifest of clips; else samples."
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="transcribe: a packed folder; else base in 4 bits.")
    ] = None,
    float_model: Annotated[
        Path | None, typer.Option(help="transcribe: the peers' CTranslate2 folder; else base.")
    ] = None,
    openvino_model: Annotated[
        list[Path] | None,
        typer.Option(help="transcribe: a folder that optimum-cli exported; may be given again."),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="transcribe: seconds of the clips, or none.")
    ] = "3,6,11,20,30",
    files: Annotated[
        int, typer.Option(help="transcribe: also so many files of at most 30 s, in batches.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(help="transcribe: files decoded at once.")] = 8,
    language: Annotated[str, typer.Option(help="transcribe: the language spoken.")] = "en",
) -> None:
    """Time dqw's kernels against PyTorch's and other packages'.

    Candidates and peers take turns; medians are shown. Ratios say how many times faster dqw is:
    below 1 it loses, and rows that lose stay. Shares are of the ceilings measured at the start.

    Example: python -m bench --op quant_linear --bits 4 --quick
    """
    from bench import cuda, options, runner, table
    from bench import plot as plotting
    from bench import rows as written
    from bench.base import Base
    from bench.peers import names

    given = {
        "--cold": cold, "--base": base is not None, "--bits": bits != "4",
        "--grid": grid != "apot", "--dtype": dtype is not None, "--shapes": shapes != "whisper",
    }  # fmt: skip
    idle = {"transcribe": tuple(given), "train_step": ("--cold", "--base")}
    for option in idle.get(op, ()):
        if given[option]:
            raise UserError(f"{option} does nothing with --op {op}: leave it out.")
    whole = {
        "--audio": audio, "--model": model, "--float-model": float_model, "--files": files,
        "--openvino-model": openvino_model, "--lengths": lengths != "3,6,11,20,30",
        "--batch-size": batch_size != 8, "--language": language != "en",
    }  # fmt: skip
    for option, asked_for in whole.items():
        if asked_for and op != "transcribe":
            raise UserError(f"{option} is for --op transcribe: leave it out, or give that.")
    if op == "transcribe":
        asked = transcribe.Asked(
            float_model=float_model,
            model=model,
            audio=audio,
            openvino=tuple(openvino_model or ()),
            threads=options.check_threads(threads),
            quick=quick,
            peers=options.parse_peers(peers, transcribe.PEERS),
            folder=transcribe.FOLDER,
            lengths=options.parse_lengths(lengths),
            files=options.check_count("--files", files, 0),
            batch_size=options.check_count("--batch-size", batch_size, 1),
            language=language,
            device=options.check_device(device),
        )
        return whole_clips(asked, json_file, csv_file, plot)
    checked = options.Options(
        ops=options.parse_ops(op),
        device=options.check_device(device),
        shapes=options.parse_shapes(shapes),
        bits=options.parse_bits(bits, grid),
        grid=grid,
        group_sizes=options.parse_groups(group_sizes),
        dtype=options.choose(
            "--dtype",
            dtype or ("float16" if device == "cuda" else "float32"),
            tuple(options.DTYPES),
        ),
        peers=options.parse_peers(peers, names()),
        threads=options.check_threads(threads),
        cold=cold,
        quick=quick,
    )
    if shapes != "whisper" and op == "all":
        raise UserError("--shapes M,K,N is for one operator: add --op, such as --op quant_linear.")
    for file, option in ((csv_file, "--csv"), (json_file, "--json"), (plot, "--plot")):
        options.check_writable(file, option)
    if plot:
        plotting.check_plot()
        if "quant_linear" not in checked.ops:
            raise UserError("--plot draws quant_linear: add --op quant_linear or --op all.")
    other = Base(base, checked.threads) if base else contextlib.nullcontext()
    torch.set_num_threads(checked.threads)
    torch.manual_seed(0)
    kept = keep_freed_memory()  # for the peers, too
    console = Console(width=None if sys.stdout.isatty() else table.WIDTH, highlight=False)
    facts = table.machine(checked)
    facts["malloc"] = "keeps what is freed, as in dqw compress" if kept else "as it is"
    table.print_header(console, facts)
    found: list[written.Row] = []
    skipped: dict[str, str] = {}
    with err.status("") as status, other as built:
        for name in checked.ops:
            before = len(found)
            for rows in runner.run(name, checked, built, skipped, status.update):
                found += rows
                if json_file:  # at every shape: a run that is cut off has lost nothing
                    machine = facts | {"not_graphed": cuda.not_graphed}
                    written.write_json(json_file, machine, found, skipped)
                if csv_file:
                    written.write_csv(csv_file, found)
            table.print_rows(console, name, found[before:])
    table.print_skipped(console, skipped)
    if plot:
        plotting.draw(plot, found, facts["ceilings"])


def whole_clips(
    asked: transcribe.Asked, json_file: Path | None, csv_file: Path | None, plot: Path | None
) -> None:
    from bench import options, table
    from bench import plot as plotting
    from bench import transcribe_table as tables

    folders = [("--model", asked.model), ("--float-model", asked.float_model)]
    for option, path in [*folders, *(("--openvino-model", path) for path in asked.openvino)]:
        if path is not None and not path.is_dir():
            raise UserError(f"{option} {path} is no folder: check the path.")
    if asked.audio is not None and not asked.audio.exists():
        raise UserError(f"--audio {asked.audio} does not exist: check the path.")
    if not asked.lengths and not asked.files:
        raise UserError("--lengths none leaves nothing to time: add --files, such as --files 100.")
    for file, option in ((csv_file, "--csv"), (json_file, "--json"), (plot, "--plot")):
        options.check_writable(file, option)
    if plot:
        plotting.check_plot()
        if len(asked.lengths) < 2:
            raise UserError("--plot draws time by length: give two --lengths or more.")
    console = Console(width=None if sys.stdout.isatty() else table.WIDTH, highlight=False)
    here = options.Options(threads=asked.threads, device=asked.device)
    facts = table.machine(here, ceilings_too=False)
    table.print_header(console, facts)
    with err.status("") as status:
        engines, skipped = transcribe.run(asked, status.update)
    tables.print_tables(console, engines, skipped)
    if json_file:
        tables.write_json(json_file, facts, engines, asked.threads, skipped)
    if csv_file:
        tables.write_csv(csv_file, engines, asked.threads)
    if plot:
        plotting.draw_clips(plot, {e.label: {n: e.clip(n) for n in e.seconds} for e in engines})


def peers_named(arguments: list[str]) -> list[str]:
    """``--peers`` alone means all of them."""
    found = []
    for i, argument in enumerate(arguments):
        found.append(argument)
        if argument == "--peers" and (arguments[i + 1 :] or ["-"])[0].startswith("-"):
            found.append("all")
    return found


def run() -> None:
    warnings.filterwarnings("ignore", module="torch|torchao|onnxruntime")
    sys.argv[1:] = peers_named(sys.argv[1:])
    exit_with_a_sentence(app)


def exit_with_a_sentence(command: Callable[[], object]) -> None:
    """Exit code 2 and one sentence for a mistake; 1 and one where a GPU stops; 130 for Ctrl-C."""
    try:
        command()
    except torch.AcceleratorError as error:  # nothing runs on that GPU in this process any more
        why = (str(error).splitlines() or ["no reason given"])[0]
        err.print(
            f"Error: the GPU stopped ({why}); another package's kernel can do that, too: run again "
            "with --peers none, then with one peer at a time. --json has what was measured.",
            style="red", markup=False, soft_wrap=True,
        )  # fmt: skip
        raise SystemExit(1) from None
    except UserError as error:
        err.print(f"Error: {error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    run()
