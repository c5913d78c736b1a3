"""Kept states: a frozen encoder's output and the teacher's, worked out once a window."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from speech_helpers import clips, one_thread, tiny_model  # noqa: F401
from test_trainer import SHORT, run, weights

import dqw
from dqw.distill import DistillConfig, GuidanceConfig, states
from dqw.distill.config import AugmentConfig, SpecAugmentConfig
from dqw.distill.model import DistillModel
from dqw.distill.progress import Display
from dqw.errors import UserError

KEPT = replace(SHORT, steps=6, freeze_encoder=True)
CONFIG = DistillConfig(matching="optimal", augment=AugmentConfig(noise=1.0, redraw=False))


def kept_files(folder):
    return sorted(folder.glob("*/*.safetensors"))


def test_training_on_kept_states_is_training(tmp_path):
    """The first step's losses agree to what float16 does to the encoder's output."""
    made = {}
    for name in ("always", "never"):
        student = dqw.quantize(tiny_model())
        before = weights(student.model.encoder)
        made[name] = run(
            tmp_path / name,
            student,
            tiny_model(),
            CONFIG,
            replace(KEPT, steps=1, cache_states=name),
        )
        after = student.model.encoder.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before)
    assert kept_files(tmp_path / "always/states")
    assert not (tmp_path / "never/states").exists()
    for name, loss in made["never"].losses.items():
        assert made["always"].losses[name] == pytest.approx(loss, rel=1e-3, abs=1e-5), name


def test_windows_that_are_there_are_not_worked_out_again(tmp_path):
    plan = replace(KEPT, cache_states="always")
    run(tmp_path, config=CONFIG, train=plan)
    files = kept_files(tmp_path / "states")
    stamps = [path.stat().st_mtime_ns for path in files]
    kept = load_file(files[3])
    assert kept["heard"].dtype == torch.float16 and kept["heard"].shape == (50, 64)
    files[3].unlink()
    shutil.rmtree(tmp_path / "checkpoint-6")
    run(tmp_path, config=CONFIG, train=plan, resume=True)
    again = [path.stat().st_mtime_ns for path in files]
    assert [old == new for old, new in zip(stamps, again, strict=True)] == [
        i != 3 for i in range(6)
    ]
    assert all(torch.equal(kept[k], v) for k, v in load_file(files[3]).items())


def test_states_of_another_encoder_or_other_data_are_not_taken(tmp_path):
    """Runs that share a folder take what is theirs; a second seed of the same windows takes all."""
    plan, shared = replace(KEPT, cache_states="always"), tmp_path / "shared"
    fixed = replace(CONFIG, augment=replace(CONFIG.augment, seed=0))
    torch.manual_seed(5)
    other = tiny_model()
    other.model.encoder.layer_norm.weight.data += 0.5
    taught = tiny_model(d_model=64)
    taught.model.decoder.layer_norm.weight.data *= 2
    for number, (config, items, seed, student, teacher, folders) in enumerate(
        (
            (fixed, clips(6), 0, None, None, 1),
            (fixed, clips(6), 1, None, None, 1),
            (CONFIG, clips(6), 1, None, None, 2),
            (fixed, clips(5), 0, None, None, 3),
            (replace(fixed, hidden=0), clips(5), 0, None, None, 4),
            (fixed, clips(6), 0, other, None, 5),
            (fixed, clips(6), 0, other, taught, 6),
        )
    ):
        train = replace(plan, seed=seed)
        out = tmp_path / str(number)
        run(out, student, teacher, config, train, items, states=shared)
        assert len(list(shared.iterdir())) == folders
        assert not (out / "states").exists()


def test_windows_that_are_not_read_are_not_worked_out(tmp_path):
    """A step of two clips, and the two that are fetched ahead."""
    plan = replace(KEPT, steps=1, batch_size=2, cache_states="always")
    run(tmp_path, config=CONFIG, train=plan, items=clips(7))
    assert len(kept_files(tmp_path / "states")) == 4


def test_windows_that_are_read_once_are_not_kept(tmp_path):
    """Six clips in batches of two: three steps are an epoch."""
    for steps, keeps in ((3, False), (4, True)):
        run(tmp_path / str(steps), config=CONFIG, train=replace(KEPT, steps=steps), items=clips(6))
        assert (tmp_path / str(steps) / "states").exists() == keeps


def test_states_that_would_fill_the_disk_are_not_kept_unless_told_to(tmp_path, monkeypatch):
    notes, usage = [], shutil.disk_usage(tmp_path)
    pupil = DistillModel(tiny_model().requires_grad_(False), tiny_model(d_model=64), CONFIG)
    small = usage._replace(free=12 * states.window_bytes(pupil) - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: small)
    monkeypatch.setattr(Display, "note", lambda self, line: notes.append(line))
    for kept, count, keeps in (("auto", 6, False), ("auto", 5, True), ("always", 6, True)):
        out = tmp_path / f"{kept}{count}"
        train = replace(KEPT, steps=4, cache_states=kept)
        run(out, config=CONFIG, train=train, items=clips(count))
        assert (out / "states").exists() == keeps
    assert len([line for line in notes if "is worked out at every step: kept" in line]) == 1
    out, small = tmp_path / "auto5", usage._replace(free=1)  # what has begun goes on
    run(out, config=CONFIG, train=replace(train, cache_states="auto", steps=4), items=clips(5),
        resume=True)  # fmt: skip
    assert len([line for line in notes if "is worked out at every step: kept" in line]) == 1


def test_a_resumed_run_finds_the_states_of_its_rounded_encoder(tmp_path):
    config = replace(CONFIG, calibration_clips=3)
    train = replace(KEPT, steps=2, cache_states="always", save_steps=1)
    for resume in (False, True):
        student = dqw.quantize(tiny_model())  # as loaded anew: not rounded yet
        run(tmp_path, student, config=config, train=train, items=clips(4), resume=resume)
        assert len(list((tmp_path / "states").iterdir())) == 1
        shutil.rmtree(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("learns", [False, True])
def test_what_a_window_takes_is_known_before(tmp_path, learns):
    train = replace(KEPT, steps=1, batch_size=1, cache_states="always", freeze_encoder=not learns)
    config = replace(CONFIG, encoder_states="never")
    run(tmp_path, config=config, train=train, items=clips(3))
    file = kept_files(tmp_path / "states")[0]
    kept = load_file(file)
    tokens = len(kept["taught"])
    student = tiny_model()
    student.model.encoder.requires_grad_(learns)
    told = states.window_bytes(DistillModel(student, tiny_model(d_model=64), config))
    rows = sum(t.nbytes for name, t in kept.items() if name.startswith("taught"))
    heard = kept["heard"].nbytes if not learns else 0
    assert told == pytest.approx(heard + rows * 100 / tokens, rel=0.15)


def test_guidance_measures_kept_states_as_it_measures_speech(tmp_path):
    """One choice before one step; losses differ by the float16 of the encoder's output."""
    guidance = GuidanceConfig(mode="mutual", interval=1, probe_clips=2)
    lines = {}
    for name in ("always", "never"):
        train = replace(KEPT, steps=1, cache_states=name)
        student = dqw.quantize(tiny_model())
        run(tmp_path / name, student, config=CONFIG, train=train, guidance=guidance)
        lines[name] = json.loads((tmp_path / name / "guidance.jsonl").read_text())
    assert lines["always"]["distilled"] == lines["never"]["distilled"] != []
    for kind in ("quant_loss", "distill_loss"):
        found, direct = lines["always"][kind], lines["never"][kind]
        for layer in found:
            if layer.startswith("model.decoder."):
                assert found[layer] == pytest.approx(direct[layer], rel=1e-2) and found[layer] > 0


@pytest.mark.parametrize(
    ("changes", "cure"),
    [
        ({"train": replace(KEPT, cache_states="always", freeze_encoder=False)}, "freeze_encoder"),
        ({"config": DistillConfig(augment=AugmentConfig(noise=1.0))}, "redraw = false"),
        ({"config": DistillConfig(spec_augment=SpecAugmentConfig(time_prob=0.1))}, "spec_augment"),
        (
            {"guidance": GuidanceConfig(mode="random"), "config": replace(CONFIG, hidden=0)},
            "guidance.mode",
        ),
    ],
)
def test_states_that_change_cannot_be_kept(tmp_path, changes, cure):
    settings = {"train": replace(KEPT, cache_states="always"), **changes}
    with pytest.raises(UserError, match=cure):
        run(tmp_path, **settings)
    settings["train"] = replace(settings["train"], cache_states="auto")
    run(tmp_path, **settings)
    assert not (tmp_path / "states").exists()


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    real = states.write_atomic

    def full(path, chunks):
        if path.suffix == ".safetensors":
            raise OSError(28, "No space left on device")
        real(path, chunks)

    monkeypatch.setattr(states, "write_atomic", full)
    with pytest.raises(UserError, match="free some space and resume"):
        run(tmp_path, config=CONFIG, train=KEPT)
