"""Checkpoints, and runs that go on from them after a kill."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from speech_helpers import clips, one_thread, tiny_model  # noqa: F401
from test_trainer import SHORT, run

import dqw
from dqw.distill import DistillConfig, TrainConfig
from dqw.distill import checkpoint as store
from dqw.errors import UserError


def test_a_folder_in_use_and_a_run_with_other_settings(tmp_path):
    run(tmp_path)
    with pytest.raises(UserError, match="pass resume"):
        run(tmp_path)
    with pytest.raises(UserError, match=r"train.lr = 0.001, now it is 0.01"):
        run(tmp_path, train=replace(SHORT, lr=1e-2), resume=True)
    with pytest.raises(UserError, match=r"data.clips = 6, now it is 4"):
        run(tmp_path, items=clips(4), resume=True)
    path = tmp_path / "checkpoint-3/run.json"
    written = path.read_text()
    path.write_text(written.replace('"processes": 1', '"processes": 2'))
    with pytest.raises(UserError, match=r"run.processes = 2, now it is 1: resume with the same"):
        run(tmp_path, resume=True)
    path.write_text(written)
    louder = tiny_model(d_model=64)
    louder.model.decoder.layer_norm.weight.data *= 2
    with pytest.raises(UserError, match=r"models.teacher = '\w+', now it is '"):
        run(tmp_path, teacher=louder, resume=True)
    with pytest.raises(UserError, match=r"models.student's bits = "):
        run(tmp_path, dqw.quantize(tiny_model()), resume=True)
    student = tiny_model()
    done = run(tmp_path, student, resume=True)
    assert done.resumed_from == 3 and done.losses == {}
    saved = load_file(str(tmp_path / "checkpoint-3/model.safetensors"))
    assert all(torch.equal(saved[f"student.{k}"], v) for k, v in student.named_parameters())


def test_half_written_checkpoints_are_never_taken(tmp_path):
    run(tmp_path, train=TrainConfig(steps=3, batch_size=2, save_steps=1, tensorboard=False))
    assert [path.name for path in store.checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    (tmp_path / ".unfinished-4").mkdir()
    with open(tmp_path / "checkpoint-3/optimizer.safetensors", "r+b") as file:
        file.truncate(100)
    assert store.newest(tmp_path).name == "checkpoint-2"
    (tmp_path / "checkpoint-2/run.json").write_text("{")
    assert store.newest(tmp_path) is None
    store.clean(tmp_path)
    assert not list(tmp_path.glob(".unfinished*"))


def test_a_resumed_run_saves_and_logs_as_it_is_told(tmp_path):
    """transformers goes by the intervals that the checkpoint was written with."""
    plan = replace(SHORT, steps=5, save_steps=2, keep_checkpoints=9)
    run(tmp_path, train=plan)
    for step in (4, 5):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    run(tmp_path, train=replace(plan, save_steps=1, log_steps=5), resume=True)
    made = [path.name for path in store.checkpoints(tmp_path)]
    assert made == [f"checkpoint-{step}" for step in (2, 3, 4, 5)]
    rows = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()]
    assert rows == [1, 2, 5]
    state = json.loads((tmp_path / "checkpoint-2/trainer_state.json").read_text())
    assert len(state["log_history"]) == 1, "log.jsonl has them all"


FULL = "I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError(FULL)])
def test_a_full_disk_is_one_sentence(error, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(store, "save_model", full)
    with pytest.raises(UserError, match="no space left for a checkpoint"):
        run(tmp_path)
    assert not list(tmp_path.glob(".unfinished*"))


def test_a_matching_between_two_choices_is_resumed(tmp_path):
    config = DistillConfig(matching="optimal", matching_interval=100)
    plan = TrainConfig(steps=3, batch_size=2, save_steps=1, tensorboard=False)
    run(tmp_path, config=config, train=plan)
    store.shutil.rmtree(tmp_path / "checkpoint-3")
    path = tmp_path / "checkpoint-2/run.json"
    saved = json.loads(path.read_text())
    assert saved["matching"] == {"encoder": [0, 1], "decoder": [0, 1]}
    saved["matching"]["decoder"] = [1, 0]
    path.write_text(json.dumps(saved))
    assert run(tmp_path, config=config, train=plan, resume=True).matching["decoder"] == (1, 0)


JOINT = """
config = DistillConfig(
    matching="dynamic", matching_interval=3, spec_augment=SpecAugmentConfig(time_prob=0.2),
    augment=AugmentConfig(noise=0.5, speed=0.1, concatenate=0.3), encoder_states="always",
)
guidance = GuidanceConfig(mode="mutual", interval=4, smoothing=0.5)
train = TrainConfig(
    steps=14, batch_size=2, accumulate=2, lr=1e-3, clip_lr=1e-3, save_steps=1, warmup_steps=3,
    tensorboard=False, schedule="cosine",
)
"""

KEPT_STATES = """
config = DistillConfig(
    matching="dynamic", matching_interval=3, encoder_states="always", calibration_clips=3,
    augment=AugmentConfig(noise=0.5, speed=0.1, concatenate=0.3, redraw=False),
)
guidance = GuidanceConfig()
train = TrainConfig(
    steps=14, batch_size=2, accumulate=2, lr=1e-3, clip_lr=1e-3, save_steps=1, warmup_steps=3,
    tensorboard=False, schedule="cosine", freeze_encoder=True, cache_states="always",
)
"""

KEPT_TEACHER = """
config = DistillConfig(
    matching="dynamic", matching_interval=3, encoder_states="never", audio_context="dynamic",
)
guidance = GuidanceConfig()
train = TrainConfig(
    steps=14, batch_size=2, accumulate=2, lr=1e-3, clip_lr=1e-3, save_steps=1, warmup_steps=3,
    tensorboard=False, schedule="cosine", cache_states="always",
)
"""

RESUMABLE = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from speech_helpers import clips, tiny_model, tiny_processor
import dqw
from dqw.distill import DistillConfig, GuidanceConfig, TrainConfig, distill
from dqw.distill.config import AugmentConfig, SpecAugmentConfig
from dqw.recipe import QuantConfig, Recipe
student = tiny_model(dropout=0.1)
dqw.quantize(student, Recipe(quant=QuantConfig(rest_bits=8)))
heads = dict(encoder_attention_heads=3, decoder_attention_heads=3)
teacher = tiny_model(d_model=96, decoder_layers=4, **heads)
{settings}
distill(
    student, teacher, tiny_processor(), clips(7), sys.argv[1], config, guidance=guidance,
    train=train, resume=True, progress=lambda report: print(report.step, flush=True),
)
"""


def start(folder: Path, script: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(dqw.__file__).parent.parent)}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize(
    "settings", [JOINT, KEPT_STATES, KEPT_TEACHER], ids=["joint", "kept states", "kept teacher"]
)
def test_a_killed_run_ends_with_the_same_weights(tmp_path, settings):
    script = tmp_path / "train.py"
    script.write_text(RESUMABLE.format(tests=str(Path(__file__).parent), settings=settings))
    whole = start(tmp_path / "whole", script)
    dice = random.Random(time.time_ns())
    broken, kills = tmp_path / "broken", 0
    for _ in range(2):
        process = start(broken, script)
        last = dice.randint(1, 3)
        for count, _line in enumerate(process.stdout, start=1):
            if count == last:
                time.sleep(dice.random() * 0.05)
                process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills
    final = start(broken, script)
    assert final.stdout.read().split()[-1] == "14" and final.wait() == 0
    assert whole.stdout.read().split() == [str(i) for i in range(1, 15)] and whole.wait() == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        expected = load_file(str(tmp_path / "whole/checkpoint-14" / name))
        found = load_file(str(broken / "checkpoint-14" / name))
        assert expected.keys() == found.keys()
        different = [k for k in expected if not torch.equal(expected[k], found[k])]
        assert not different, different[:5]
    for log in sorted(path.name for path in (tmp_path / "whole").glob("*.jsonl")):
        expected = [json.loads(line) for line in (tmp_path / "whole" / log).open()]
        found = [json.loads(line) for line in (broken / log).open()]
        for row in [*expected, *found]:
            row.pop("seconds_per_step", None)
        assert expected == found
