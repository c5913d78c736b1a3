"""The command line: what it prints and writes, and how it ends."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from errno import EACCES, ENOSPC
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner
from whisper_helpers import save_ct2, save_tiny, tiny, write_tone

import dqw
from dqw.cli import app, audio_progress
from dqw.whisper.checkpoint import save_processor
from dqw.whisper.files import write_atomic
from dqw.whisper.report import inspect_folder, model_bytes

COMMANDS = ("transcribe", "eval", "info")


def dqw_(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture
def audio(tmp_path):
    return [write_tone(tmp_path / "a.wav", 0.5), write_tone(tmp_path / "b.flac", 0.8, 8_000)]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    result = dqw_(command, "--help")
    assert result.exit_code == 0 and f"dqw {command}" in result.stdout.split("Example")[1]
    assert dqw_(command, "-h").stdout == result.stdout


def test_version_is_printed():
    result = dqw_("--version")
    assert result.exit_code == 0 and result.stdout == f"{dqw.__version__}\n"


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = "import sys, dqw.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    assert time.perf_counter() - start < 5


def test_transcribe_prints_text_on_stdout_alone(model, audio):
    one = dqw_("transcribe", audio[0], "--model", model, "--language", "en")
    assert one.exit_code == 0 and one.stdout.endswith("\n") and len(one.stdout) > 1
    both = dqw_("transcribe", *audio, "--model", model, "--language", "en")
    assert both.stdout.startswith(f"{audio[0]}:\n{one.stdout}{audio[1]}:\n")


@pytest.mark.parametrize("form", ["txt", "json"])
def test_transcribe_into_a_file_while_a_terminal_shows_the_bar(model, audio, tmp_path, form):
    """rich would send the text to the bar's terminal; on one terminal lines are not broken."""
    import pty

    plain = dqw_("transcribe", *audio, "--model", model, "--language", "en", "--format", form)
    command = [sys.executable, "-m", "dqw", "transcribe", *map(str, audio), "--model", str(model),
               "--language", "en", "--format", form]  # fmt: skip
    environment = {**os.environ, "COLUMNS": "20", "TERM": "xterm"}
    for both in (False, True):
        master, slave = pty.openpty()
        with open(tmp_path / "out.txt", "wb") as file:
            run = subprocess.Popen(command, stdout=slave if both else file, stderr=slave,
                                   env=environment)  # fmt: skip
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while part := os.read(master, 65536):
                shown += part
        os.close(master)
        assert run.wait() == 0
        assert b"audio" in shown, "a bar"
        if both:
            shown = shown.replace(b"\r\n", b"\n")
            assert all(line in shown for line in plain.stdout.encode().split(b"\n"))
        else:
            assert (tmp_path / "out.txt").read_bytes() == plain.stdout.encode()


@pytest.mark.parametrize("printed", [True, False])
def test_a_damaged_file_leaves_the_others(model, audio, tmp_path, printed):
    cut = tmp_path / "cut.flac"
    whole = write_tone(tmp_path / "whole.flac", 5.0).read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    where = () if printed else ("--output-dir", out)
    result = dqw_("transcribe", audio[0], cut, audio[1], "--model", model, *where)
    assert result.exit_code == 1 and "cut.flac is corrupt or cut off" in result.stderr
    assert "the others go on" in result.stderr
    if printed:
        alone = dqw_("transcribe", *audio, "--model", model)
        assert result.stdout == alone.stdout
    else:
        assert sorted(path.name for path in out.iterdir()) == ["a.txt", "b.txt"]
        assert "wrote 2 files" in result.stderr


@pytest.mark.parametrize("size", [1, 2, 8])
def test_damage_that_is_met_last_holds_nothing_back(model, audio, tmp_path, size):
    """The others wait for the first to be printed, in the order given."""
    short = write_tone(tmp_path / "short.flac", 0.3)  # its header is whole
    short.write_bytes(short.read_bytes()[: short.stat().st_size // 2])
    files = (short, *audio)
    result = dqw_("transcribe", *files, "--model", model, "--batch-size", size)
    assert result.exit_code == 1
    assert [str(path) in result.stdout for path in files] == [False, True, True]


def test_a_header_that_is_damaged_leaves_the_others_too(model, audio, tmp_path):
    (tmp_path / "empty.wav").touch()
    result = dqw_("transcribe", audio[0], tmp_path / "empty.wav", "--model", model)
    assert result.exit_code == 1 and "empty (0 bytes)" in result.stderr and "go on" in result.stderr
    assert result.stdout.startswith(f"{audio[0]}:\n")
    result = dqw_("transcribe", audio[0], tmp_path / "nowhere.wav", "--model", model)
    assert result.exit_code == 1 and "does not exist" in result.stderr and not result.stdout


def test_places_are_tried_before_the_work(model, audio, tmp_path):
    (tmp_path / "file").write_text("no folder")
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(json.dumps({"audio": "a.wav", "text": "hello", "language": "en"}))
    evaluation = ("eval", "--model", "nowhere", "--data", manifest)
    for command, option in (
        (("transcribe", audio[0], "--model", "nowhere"), "--output-dir"),
        (evaluation, "--json"),
        (evaluation, "--save-transcripts"),
    ):
        result = dqw_(*command, option, tmp_path / "file" / "figures")
        assert result.exit_code == 1 and f"{option}: nothing can be written" in result.stderr


def test_a_word_of_caution_beside_the_audio(model, audio, tmp_path):
    for out, said in ((tmp_path, True), (tmp_path / "out", False)):
        result = dqw_("transcribe", audio[0], "--model", model, "--output-dir", out)
        assert result.exit_code == 0 and ("take a .txt for what is said" in result.stderr) == said


def test_transcribe_goes_on_where_it_was(model, audio, tmp_path):
    out = tmp_path / "out"
    one, two = (out / f"{Path(path).stem}.srt" for path in audio)
    command = ["transcribe", *audio, "--model", model, "--language", "en", "--format", "srt"]
    command += ["--output-dir", out]
    out.mkdir()
    one.write_text("mine")
    found = dqw_(*command, "--skip-existing")
    assert found.exit_code == 0 and "wrote 1 files" in found.output, found.output
    assert "1 of 2 are written already" in found.output
    assert one.read_text() == "mine" and two.exists()
    found = dqw_(*command, "--skip-existing")
    assert found.exit_code == 0 and "2 of 2 are written already" in found.output
    assert "wrote" not in found.output
    assert dqw_(*command).exit_code == 0 and one.read_text() != "mine"
    more = ["--format", "txt", "--skip-existing"]  # a format more
    found = dqw_(*command, *more)
    assert found.exit_code == 0 and "wrote 2 files" in found.output, found.output
    (out / two.with_suffix(".txt").name).unlink()
    found = dqw_(*command, *more)  # of a set that is there by half
    assert found.exit_code == 0 and "wrote 1 files" in found.output, found.output
    found = dqw_(*command[:-2], "--skip-existing")
    assert found.exit_code == 1 and "give --output-dir" in found.output


def test_transcribe_json_lines(model, audio):
    out = dqw_("transcribe", *audio, "--model", model, "--format", "json").stdout
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["audio"] for row in rows] == [str(path) for path in audio]
    assert rows[0]["seconds"] == 0.5 and rows[0]["language"] in ("en", "de", "ja")


def test_transcribe_writes_every_format(model, audio, tmp_path):
    out = tmp_path / "out"
    result = dqw_("transcribe", *audio, "--model", model, "--format", "all", "--output-dir", out)
    assert result.exit_code == 0 and result.stdout == "" and "wrote 8 files" in result.stderr
    assert sorted(file.name for file in out.iterdir()) == [
        f"{name}.{form}" for name in "ab" for form in ("json", "srt", "txt", "vtt")
    ]
    assert (out / "a.vtt").read_text().startswith("WEBVTT")


def test_names_with_brackets_are_no_markup(model, audio, tmp_path):
    """rich reads [v2] as a style, and [/v2] as the end of one that never began."""
    folder, out = tmp_path / "[v2]" / "[" / "v2]", tmp_path / "[out]"
    shutil.copytree(model, folder)
    result = dqw_("info", folder)
    assert result.exit_code == 0 and result.stdout.startswith(f"{folder}: Hugging Face")
    result = dqw_("transcribe", audio[0], "--model", folder, "--output-dir", out)
    assert result.exit_code == 0 and "[out]" in result.stderr
    student = tmp_path / "[v2]" / "student"
    result = dqw_("compress", "--teacher", folder, "--ptq-only", "--out", student)
    assert result.exit_code == 0 and "[v2]/student" in result.stderr.replace("\n", "")


def test_reference_texts_are_not_overwritten(model, audio, tmp_path):
    def transcribe(out, form="txt"):
        command = ("transcribe", *audio, "--model", model, "--output-dir", out, "--format", form)
        return dqw_(*command)

    reference = tmp_path / "b.txt"
    reference.write_text("what was said")
    result = transcribe(f"{tmp_path}/out/..")
    assert result.exit_code == 1 and "b.txt is there already" in result.stderr
    assert reference.read_text() == "what was said" and not (tmp_path / "a.txt").exists()
    assert transcribe(tmp_path, "srt").exit_code == 0
    assert transcribe(tmp_path / "out").exit_code == 0
    assert transcribe(tmp_path / "out").exit_code == 0  # its own may be written again


def test_info_of_a_float_folder(model):
    result = dqw_("info", model)
    assert result.exit_code == 0
    for word in ("Hugging Face, 2 + 2 layers", "embedding", "float32", "quant_linear", "MiB"):
        assert word in result.stdout, word


def test_other_copies_of_the_weights_are_not_counted(model, tmp_path):
    """A snapshot of the hub has them, a trainer's folder its optimizer."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    before = inspect_folder(folder)
    for name in ("pytorch_model.bin", "flax_model.msgpack", "tf_model.h5", "optimizer.pt",
                 "model.fp32-00001-of-00002.safetensors"):  # fmt: skip
        (folder / name).write_bytes(bytes(1000))
    assert inspect_folder(folder) == before
    (folder / "model.safetensors").unlink()  # other engines read the others
    assert model_bytes(folder) > 5000


def test_info_of_a_packed_folder(tmp_path):
    whisper, processor = tiny(tmp_path / "float")
    packed = dqw.freeze(dqw.quantize(whisper))
    packed.save_pretrained(tmp_path / "packed")
    save_processor(processor, tmp_path / "packed")
    result = dqw_("info", tmp_path / "packed", "--json")
    report = json.loads(result.stdout)
    parts = {part["kind"]: part for part in report["parts"]}
    assert report["format"].startswith("dqw packed")
    assert parts["encoder FFN"]["parameters"] == 2 * 2 * 64 * 128
    assert parts["encoder FFN"]["codes"] < 2 * 2 * 64 * 128 // 2  # 4 bits, entropy-coded
    assert 3.5 < parts["encoder FFN"]["bits_per_parameter"] < 4.1  # with scales
    assert parts["convolutions"]["stored"] == {"uniform 8 / row": 2}
    assert sum(part["codes"] for part in report["parts"][:-1]) == parts["all"]["codes"]
    weights = (tmp_path / "packed" / "model.safetensors").stat().st_size
    total = sum(parts["all"][key] for key in ("codes", "scales", "floats"))
    assert 0 < weights - total < 40_000  # the header
    assert report["layers"]["model.encoder.conv1"] == "uniform 8 / row"
    tables = dqw_("info", tmp_path / "packed", "--layers").stdout
    assert "apot 4 / 64" in tables and "model.decoder.layers.1.fc2" in tables


def test_info_of_a_faster_whisper_folder(tmp_path):
    save_ct2(tmp_path)
    result = dqw_("info", tmp_path)
    assert result.exit_code == 0 and "CTranslate2" in result.stdout and "float16" in result.stdout


def test_ctrl_c_ends_with_130_and_no_traceback(model, audio, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("dqw.whisper.engines.load_whisper", stop)
    result = dqw_("transcribe", audio[0], "--model", model)
    assert result.exit_code == 130 and result.stderr == "Error: interrupted\n"


def test_a_full_disk_is_one_sentence(model, audio, tmp_path, monkeypatch):
    def full(file):
        raise OSError(ENOSPC, os.strerror(ENOSPC), "out/a.txt")

    monkeypatch.setattr("dqw.whisper.files.os.fsync", full)
    out = tmp_path / "out"
    result = dqw_("transcribe", audio[0], "--model", model, "--output-dir", out)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: no space left on device for out/a.txt")
    assert list(out.iterdir()) == []


def test_what_may_not_be_read_is_one_sentence(model, audio, monkeypatch):
    def closed(*_):
        raise PermissionError(EACCES, os.strerror(EACCES), "a.wav")

    monkeypatch.setattr("dqw.whisper.audio._streams", closed)
    result = dqw_("transcribe", audio[0], "--model", model)
    assert result.exit_code == 1
    assert "permission denied for a.wav: give yourself access to it" in result.stderr


def test_a_file_name_that_is_not_utf_8(model, audio, tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9.wav")
    odd.write_bytes(audio[0].read_bytes())
    command = [sys.executable, "-m", "dqw", "transcribe", *audio, odd, "--model", model]
    utf_8 = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    out = subprocess.run(command, capture_output=True, env=utf_8)
    assert out.returncode == 0 and rb"caf\udce9.wav:" in out.stdout, out.stderr.decode()
    out = subprocess.run([*command, "--format", "json"], capture_output=True, env=utf_8)
    assert json.loads(out.stdout.splitlines()[-1])["audio"] == str(odd)
    missing = [*command[:4], tmp_path / os.fsdecode(b"\xe9.wav"), *command[-2:]]
    out = subprocess.run(missing, capture_output=True, env=utf_8)
    assert out.returncode == 1 and rb"\udce9.wav does not exist" in out.stderr
    write_atomic(tmp_path / "rows.jsonl", json.dumps({"id": odd.name}, ensure_ascii=False))
    assert json.loads((tmp_path / "rows.jsonl").read_bytes())["id"] == odd.name


def test_places_that_cannot_be_written_are_said_at_once(model, audio, tmp_path):
    file, folder = tmp_path / "a.wav", tmp_path / "folder"
    folder.mkdir()
    for words in (
        ("transcribe", audio[0], "--model", model, "--output-dir", file),
        ("eval", "--model", model, "--data", tmp_path, "--json", folder),
        ("eval", "--model", model, "--data", tmp_path, "--save-transcripts", folder),
        ("demo", "--out", file),
    ):
        result = dqw_(*words)
        assert result.exit_code == 2 and "Invalid value for '--" in result.stderr, words


def test_names_that_cannot_be_written_are_one_sentence(model, tmp_path):
    audio = write_tone(tmp_path / f"{'a' * 250}.wav", 0.5)
    out = tmp_path / "a.txt" / "out"
    result = dqw_("transcribe", audio, "--model", model, "--output-dir", tmp_path / "out")
    assert result.exit_code == 0, result.output  # NAME.txt itself is short enough
    result = dqw_("transcribe", audio, "--model", model, "--output-dir", tmp_path / ("a" * 256))
    assert result.exit_code == 1 and "file name too long" in result.stderr, result.output
    (tmp_path / "a.txt").write_text("")
    result = dqw_("transcribe", audio, "--model", model, "--output-dir", out)
    assert result.exit_code == 1 and "(not a directory); choose another place" in result.stderr


@pytest.mark.parametrize("total, words", [(0.0, "5 s of audio"), (9.0, "5 of 9 s of audio")])
def test_progress_on_a_terminal(total, words, monkeypatch):
    """Data sets of the hub do not tell how long their clips are."""
    shown = StringIO()
    terminal = Console(file=shown, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr("dqw.cli.err", terminal)
    with audio_progress(total) as advance:
        advance(2.0)
        advance(3.0)
    assert words in shown.getvalue()


def test_a_closed_pipe_is_no_error(model, audio):
    command = [sys.executable, "-m", "dqw", "transcribe", str(audio[0]), "--model", str(model)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 0 and "Traceback" not in errors
