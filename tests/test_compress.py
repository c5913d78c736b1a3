"""dqw compress from the command line: what it writes, and what survives a kill."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from whisper_helpers import refused, run_dqw, write_tone

from dqw.convert import quant_modules
from dqw.whisper.checkpoint import load_whisper
from dqw.whisper.report import model_bytes
from dqw.whisper.student import cut_student, kept_layers

FAST = ["--steps", "2", "--batch-size", "2"]


def test_ptq_writes_a_folder_that_loads(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    code, output = run_dqw("compress", "--teacher", base, "--ptq-only", "--bits", "3", "--out", out)
    assert code == 0, output
    model, _ = load_whisper(out)
    specs = {name: m.spec for name, m in quant_modules(model).items()}
    assert specs["model.encoder.layers.0.fc1"].bits == 3
    assert specs["model.decoder.embed_tokens"].bits == 3  # follows --bits
    assert specs["model.encoder.conv1"].bits == 8
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "dqw" and len(config["weights_sha256"]) == 64
    assert config["made_by"]["teacher"] == "base"
    assert not [p for p in out.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]
    assert "import dqw" in (out / "README.md").read_text()
    assert 0 < model_bytes(out) < model_bytes(base)


def test_the_default_recipe_depends_on_the_student(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student that is no copy needs its encoder trained, which `default` leaves alone."""
    found: list[bool] = []
    monkeypatch.setattr(
        "dqw.compress.compress", lambda job, recipe, say: found.append(recipe.train.freeze_encoder)
    )
    for options in (
        [],
        ["--student", str(base)],
        ["--student", f"{base.parent}/../{base.parent.name}/{base.name}/"],
        ["--student-layers", "1,1"],
        ["--student", "x"],
    ):
        code, output = run_dqw("compress", "--teacher", base, "--out", tmp_path / "out", *options)
        assert code == 0, output
    assert found == [True, True, True, False, False]


def test_a_student_of_its_own(base: Path, data: Path, tmp_path: Path) -> None:
    """Of another width, with a processor of its own: the folder has both."""
    other, out = tmp_path / "other", tmp_path / "student"
    model, processor = load_whisper(base)
    size = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_layers": 1}
    config = type(model.config).from_dict({**model.config.to_dict(), **size})
    student = type(model)(config)
    student.generation_config = model.generation_config
    student.save_pretrained(other)
    processor.save_pretrained(other)
    (other / "normalizer.json").write_text('{"colour": "hue"}')
    options = ("--teacher", base, "--student", other, "--data", data, "--steps", "1")
    code, output = run_dqw("compress", *options, "--batch-size", "2", "--out", out)
    assert code == 0, output
    found, its = load_whisper(out)
    assert found.config.d_model == 32 and found.config.decoder_layers == 1
    assert its.tokenizer.english_spelling_normalizer == {"colour": "hue"}
    made_by = json.loads((out / "config.json").read_text())["quantization_config"]["made_by"]
    assert (made_by["teacher"], made_by["student"]) == ("base", "other")


def test_one_command_begins_and_resumes(base: Path, data: Path, tmp_path: Path) -> None:
    """What a machine repeats until it is done."""
    out = tmp_path / "student"
    for more in (["--ptq-only"], ["--steps", "1", "--batch-size", "2"]):
        command = ("compress", "--teacher", base, "--data", data, "--out", out, "--resume", *more)
        code, output = run_dqw(*command, "--calibration-clips", "2")
        assert code == 0 and "nothing to resume: begun anew" in output, output
        shutil.rmtree(out)
    code, output = run_dqw(*command, "--calibration-clips", "2")  # that run was finished
    assert code == 0 and "nothing to resume: begun anew" in output, output


def test_odd_settings_of_a_fine_tune_are_kept(base: Path, tmp_path: Path) -> None:
    """transformers refuses to save such settings once they were changed; and a language that all
    texts were forced into is its language."""
    path = base / "generation_config.json"
    settings = json.loads(path.read_text())
    spoken = settings["lang_to_id"]["<|ja|>"]
    settings |= {"temperature": 0.0, "forced_decoder_ids": [[1, spoken], [2, 9]], "language": None}
    settings |= {"task": None, "alignment_heads": [[0, 0], [1, 1]]}
    path.write_text(json.dumps(settings))
    out = tmp_path / "out"
    cut = ("--ptq-only", "--student-layers", "2,1")
    code, output = run_dqw("compress", "--teacher", base, *cut, "--out", out)
    assert code == 0, output
    written = json.loads((out / "generation_config.json").read_text())
    assert written["temperature"] == 0.0 and written["language"] == "<|ja|>"
    assert written.get("forced_decoder_ids") is None


WITHOUT_LIBRARY = """
import pathlib, sys
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self, **how: self.name != "_C.so" and exists(self, **how)
from dqw.cli import app
app(sys.argv[1:])
"""


def test_everything_works_without_the_library_and_says_so_once(
    base: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "student"
    compress = ["compress", "--teacher", base, "--data", data, "--ptq-only", "--out", out]
    compress += ["--calibration-clips", "2"]
    for arguments in (
        compress,
        ["transcribe", data.parent / "0.wav", "--model", out, "--language", "en"],
        ["eval", "--model", out, "--teacher", base, "--data", data],
    ):
        run = subprocess.run(
            [sys.executable, "-c", WITHOUT_LIBRARY, *map(str, arguments)],
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert run.stderr.count("dqw runs on its slow PyTorch reference: there is no") == 1
        assert "Traceback" not in run.stderr


def test_joint_training_moves_weights_and_clips(base: Path, data: Path, tmp_path: Path) -> None:
    ptq, out = tmp_path / "ptq", tmp_path / "student"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[train]\nsteps = 2\nbatch_size = 2\nclip_lr = 0.01\nlr = 0.01\n")
    options = ("--teacher", base, "--recipe", recipe)
    assert run_dqw("compress", *options, "--ptq-only", "--out", ptq)[0] == 0
    code, output = run_dqw("compress", *options, "--data", data, "--out", out)
    assert code == 0, output
    before, after = (load_whisper(f)[0].model.encoder.layers[0].fc1 for f in (ptq, out))
    assert before.spec == after.spec
    assert not torch.equal(before.scale, after.scale)
    assert not torch.equal(before.weight, after.weight), "codes"
    assert (tmp_path / "student.run" / "log.jsonl").exists()
    code, output = run_dqw("transcribe", data.parent / "0.wav", "--model", out, "--language", "en")
    assert code == 0, output
    code, output = run_dqw("eval", "--model", out, "--data", data)
    assert code == 0 and "%" in output, output
    code, output = run_dqw("info", out)
    assert code == 0 and "apot 4" in output, output


def test_a_cut_student_and_its_own_teacher(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "cut"
    arguments = ("--teacher", base, "--data", data, "--student-layers", "1,2", "--out", out)
    code, output = run_dqw("compress", *arguments, *FAST)
    assert code == 0, output
    model, _ = load_whisper(out)
    assert (len(model.model.encoder.layers), len(model.model.decoder.layers)) == (1, 2)
    assert "healed 3 layers on" in output
    arguments = ("--teacher", base, "--student-layers", "1,2", "--ptq-only")
    code, output = run_dqw("compress", *arguments, "--out", tmp_path / "blind")
    assert code == 0 and "without --data nothing makes up" in output, output
    arguments = ("--teacher", base, "--data", data, "--student-layers", "2,2", "--ptq-only")
    code, output = run_dqw("compress", *arguments, "--out", tmp_path / "whole")
    assert code == 0 and "healed" not in output and "makes up" not in output, output


def test_cut_keeps_first_and_last_and_generates() -> None:
    from conftest import make_tiny_whisper

    teacher = make_tiny_whisper(encoder_layers=6, decoder_layers=6)
    student = cut_student(teacher, 4, 2)
    assert kept_layers(4, 6) == [0, 2, 3, 5] and kept_layers(2, 6) == [0, 5]
    same = student.model.decoder.layers[1].fc1.weight, teacher.model.decoder.layers[5].fc1.weight
    assert torch.equal(*same) and same[0] is not same[1]
    assert student.generate(torch.randn(1, 80, 3000), max_new_tokens=3).shape[0] == 1


def test_a_cut_student_keeps_the_alignment_heads_of_its_layers() -> None:
    from conftest import make_tiny_whisper

    teacher = make_tiny_whisper(decoder_layers=4)
    teacher.generation_config.alignment_heads = [[1, 0], [3, 1]]
    config = cut_student(teacher, 2, 2).generation_config
    assert config.alignment_heads == [[1, 1]]
    teacher.generation_config.alignment_heads = [[1, 0], [2, 1]]
    assert not hasattr(cut_student(teacher, 2, 2).generation_config, "alignment_heads")


def test_the_default_shares_out_its_bytes_and_trains_only_when_asked(
    base: Path, data: Path, tmp_path: Path
) -> None:
    shared, even, trained = tmp_path / "shared", tmp_path / "even", tmp_path / "trained"
    options = ("--teacher", base, "--data", data)
    code, output = run_dqw("compress", *options, "--out", shared)
    assert code == 0 and "plan: " in output and "step " not in output, output
    assert not shared.with_name("shared.run").exists()
    assert run_dqw("compress", "--teacher", base, "--ptq-only", "--out", even)[0] == 0
    bits, uniform = (
        {module.spec.bits for module in quant_modules(load_whisper(folder)[0]).values()}
        for folder in (shared, even)
    )
    assert len(bits) > 2 and uniform == {4, 8}
    assert model_bytes(shared) <= model_bytes(even) + 64 * 1024
    code, output = run_dqw(
        "compress", *options, "--out", trained, "--steps", "1", "--batch-size", "2"
    )
    assert code == 0 and "plan: " in output, output
    assert (tmp_path / "trained.run" / "log.jsonl").exists()
    refused("--data is missing", "--teacher", base, "--out", tmp_path / "none")


FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, FULL), SafetensorError(f"I/O error: {FULL} (os error 28)")]
)
def test_no_space_left_leaves_nothing(
    error: Exception, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import WhisperForConditionalGeneration

    def full(self: object, folder: Path, **kwargs: object) -> None:
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(WhisperForConditionalGeneration, "save_pretrained", full)
    room = tmp_path / "room"
    refused(FULL, "--teacher", base, "--ptq-only", "--out", room / "out")
    assert not list(room.iterdir())


def test_an_edited_or_cut_file_is_noticed(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    assert run_dqw("compress", "--teacher", base, "--ptq-only", "--out", out)[0] == 0
    audio = write_tone(tmp_path / "a.wav")
    weights = out / "model.safetensors"
    good = weights.read_bytes()
    flipped = good[:-9] + bytes([good[-9] ^ 1]) + good[-8:]
    for bad in (flipped, good[: len(good) // 2]):
        weights.write_bytes(bad)
        code, output = run_dqw("transcribe", audio, "--model", out)
        assert code == 1 and "Error: " in output and "model.safetensors" in output, output


def test_a_killed_compression_resumes_to_the_same_folder(
    base: Path, data: Path, tmp_path: Path
) -> None:
    """SIGKILL after some checkpoint, --resume: the same weights, byte for byte, as without."""
    recipe = tmp_path / "recipe.toml"
    settings = '[quant]\nallocate = "bits"\n[train]\nsteps = 12\nbatch_size = 2\nsave_steps = 2\n'
    recipe.write_text(settings)

    def command(out: Path, *more: str) -> list[str]:
        options = ["--teacher", base, "--data", data, "--recipe", recipe, "--out", out]
        options += ["--student-layers", "1,2"]
        return [sys.executable, "-m", "dqw", "compress", *map(str, options), *more]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    found = subprocess.run(command(whole), check=True, capture_output=True, text=True)
    assert "plan: " in found.stderr and "healed" in found.stderr + found.stdout
    process = subprocess.Popen(
        command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("killed.run/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.exists()
    refused("--resume", "--teacher", base, "--data", data, "--out", killed, "--recipe", recipe)
    assert (tmp_path / "killed.work").exists()
    again = command(killed, "--resume")
    found = subprocess.run(again, check=True, capture_output=True, text=True)
    for done in ("plan: ", "healed"):  # not measured, not healed a second time
        assert done not in found.stderr + found.stdout
    name = "model.safetensors"
    assert (whole / name).read_bytes() == (killed / name).read_bytes()
    assert not (tmp_path / "killed.work").exists()


def test_the_folder_works_in_pipeline_and_generate(base: Path, tmp_path: Path) -> None:
    """What a user of transformers types, after `import dqw`, in a fresh process."""
    out, teacher = tmp_path / "small", tmp_path / "teacher"
    shutil.copytree(base, teacher)
    settings = json.loads((teacher / "generation_config.json").read_text())
    del settings["task"]  # as OpenAI's own checkpoints lack it
    (teacher / "generation_config.json").write_text(json.dumps(settings))
    assert run_dqw("compress", "--teacher", teacher, "--ptq-only", "--out", out)[0] == 0
    # Without it pipeline's prompt would have no task where it gets no language.
    assert json.loads((out / "generation_config.json").read_text())["task"] == "transcribe"
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "the same may read them all"
    audio = write_tone(tmp_path / "a.wav")
    code = (
        "import sys, dqw, soundfile\n"
        "from transformers import pipeline\n"
        "asr = pipeline('automatic-speech-recognition', model=sys.argv[1])\n"
        "wave, rate = soundfile.read(sys.argv[2], dtype='float32')\n"
        "text = asr({'raw': wave, 'sampling_rate': rate})\n"
        "asr.model.save_pretrained(sys.argv[3])\n"
        "print('TEXT', text['text'], type(asr.model.model.encoder.layers[0].fc1).__name__)\n"
    )
    again = tmp_path / "again"
    command = [sys.executable, "-c", code, str(out), str(audio), str(again)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and "TEXT" in run.stdout and "QuantLinear" in run.stdout, run.stderr
    name = "model.safetensors"
    assert (again / name).read_bytes() == (out / name).read_bytes()
