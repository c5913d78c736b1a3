"""``python -m bench.convert_peers``: one Whisper as the files that each peer reads, without a hub.

Into a folder: hf/ (Hugging Face), NAME-q4_k.bin, q4_0 and q8_0 (whisper.cpp), ct2-int8/
(faster-whisper, where ctranslate2 is installed), openvino-int4/ and openvino-int8/ (by optimum-cli,
which wants a transformers of its own and so another environment). What is there is kept. With
--shape the Whisper is a reciter of that shape (``bench.reciter``). Sizes are printed; the bench and
``dqw eval --engine`` take the files from there.
"""

import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench import transcribe
from bench.__main__ import exit_with_a_sentence
from bench.options import choose
from bench.reciter import SHAPES, reciter
from dqw.errors import UserError

KINDS = ("int4", "int8")
TASK = "automatic-speech-recognition-with-past"
console = Console(highlight=False, soft_wrap=True, markup=False)


def main(
    float_model: Annotated[
        str | None, typer.Option(help="Hub id or folder; else base from the package index.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the models go.")] = transcribe.FOLDER,
    optimum_cli: Annotated[
        str, typer.Option(help="The program that exports for OpenVINO.")
    ] = "optimum-cli",
    shape: Annotated[
        str | None,
        typer.Option(
            help="tiny, base, small or medium: random weights of that shape, which recite "
            "a text to any audio (bench.reciter); for speed alone."
        ),
    ] = None,
) -> None:
    """Convert one float Whisper for every peer that can be converted for here."""
    from dqw.whisper.checkpoint import load_whisper, save_processor
    from dqw.whisper.rivals import rival_bytes
    from dqw.whisper.samples import fetch_base_model

    folder = out / "hf"
    if shape is not None:
        choose("--shape", shape, tuple(SHAPES))
        check_shape(folder, shape)
    out.mkdir(parents=True, exist_ok=True)
    source = float_model or str(fetch_base_model(out / "base", console.print))
    if not (folder / "tokenizer.json").is_file():
        model, processor = load_whisper(source)
        if shape is not None:
            model = reciter(shape, model, processor)
        model.save_pretrained(folder)
        save_processor(processor, folder)
    written = folder if shape else Path(source)
    skipped: dict[str, str] = {}
    found = [p for _, p in transcribe.whisper_cpp(out, written, 3, skipped, console.print)]
    for name, reason in skipped.items():
        console.print(f"skipped {name}: {reason}")
    found += faster_whisper(folder, out / "ct2-int8")
    for kind in KINDS:
        found += openvino(folder, out / f"openvino-{kind}", kind, optimum_cli)
    for path in found:
        beside = path if path.is_dir() else path.parent
        if (folder / "normalizer.json").is_file() and not (beside / "normalizer.json").exists():
            shutil.copy(folder / "normalizer.json", beside)  # English is scored alike
        console.print(f"{path}: {rival_bytes(path) / 2**20:.2f} MiB without the tokenizer")


def check_shape(folder: Path, shape: str) -> None:
    """What is there is kept, so it must be of this shape: UserError if it is not."""
    config = folder / "config.json"
    if config.is_file():
        stored = json.loads(config.read_text(encoding="utf-8"))
        if (stored["d_model"], stored["encoder_layers"]) != SHAPES[shape]:
            raise UserError(f"{folder} holds a Whisper of another shape: give another --out.")


def faster_whisper(source: Path, to: Path) -> list[Path]:
    if not (to / "model.bin").is_file():
        if find_spec("ctranslate2") is None:
            console.print(f"skipped {to}: pip install faster-whisper")
            return []
        from ctranslate2.converters import TransformersConverter

        converter = TransformersConverter(str(source), copy_files=["tokenizer.json"])
        converter.convert(str(to), quantization="int8", force=True)
    return [to]


def openvino(source: Path, to: Path, kind: str, program: str) -> list[Path]:
    if (to / "openvino_encoder_model.xml").is_file():
        return [to]
    if shutil.which(program) is None:
        console.print(
            f"skipped {to}: {program} is not here. In another environment: pip install "
            '"optimum-intel[openvino]" nncf; then --optimum-cli PATH/bin/optimum-cli.'
        )
        return []
    command = [program, "export", "openvino", "--model", str(source), "--task", TASK]
    unfinished = to.with_name(f"{to.name}.tmp")
    done = subprocess.run(
        [*command, "--weight-format", kind, str(unfinished)], capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
        raise UserError(f"{program} could not export {source} ({last}); mend its environment.")
    unfinished.replace(to)
    return [to]


if __name__ == "__main__":
    exit_with_a_sentence(lambda: typer.run(main))
