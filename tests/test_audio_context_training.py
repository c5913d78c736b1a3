"""Training with a dynamic audio context: who hears what, what is compared, resuming."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from speech_helpers import Noise, clips, one_thread, tiny_model, tiny_processor  # noqa: F401
from test_audio_context import SMALL, by_hand
from test_trainer import SHORT, batch_of, run, weights
from typer.testing import CliRunner

import dqw
from dqw.cli import app
from dqw.distill import DistillConfig
from dqw.distill.config import SpecAugmentConfig
from dqw.distill.data import EpochSampler, LabelEncoder
from dqw.distill.layers import LayerTap
from dqw.distill.losses import hidden_loss
from dqw.distill.model import Batch, DistillModel, forward_pass, teacher_pass
from dqw.errors import UserError
from dqw.recipe import Recipe
from dqw.whisper.context import AudioContext

RATE = 16_000
DYNAMIC = DistillConfig(audio_context="dynamic", matching="static_uniform")


@pytest.fixture
def small_steps(monkeypatch):
    """New students learn SMALL: the tests' windows are one second."""
    monkeypatch.setattr(AudioContext, "to_dict", lambda self: vars(SMALL))


def test_losses_compare_what_both_hear():
    student, teacher = tiny_model(), tiny_model(encoder_layers=3)
    pupil = DistillModel(student, teacher, DYNAMIC)
    encoder = LabelEncoder(tiny_processor().tokenizer, True, 64)
    batch = Batch.of(batch_of(encoder))
    assert batch.seconds == pytest.approx(0.5)
    batch.positions = 33
    wanted = {s: set(range(pupil.teacher_depth[s])) for s in pupil.stacks}
    taps = {s: LayerTap(teacher, s, pupil.kind) for s in pupil.stacks}
    taught = teacher_pass(teacher, batch.teacher_features, batch, taps, wanted, logits=True)
    layers = {s: list(range(pupil.depth[s])) for s in pupil.stacks}
    losses = pupil(batch.features[..., :66], batch, taught, {}, layers)
    with torch.no_grad():
        with LayerTap(student, "encoder").open() as seen:
            heard = by_hand(student.model.encoder, batch.features[..., :66])
            ours = seen[0].flatten(0, 1)
        theirs = teacher.model.encoder(batch.features, output_hidden_states=True).hidden_states
        logits = student(encoder_outputs=(heard,), decoder_input_ids=batch.ids).logits
    by_them = hidden_loss(ours, theirs[1][:, :33].flatten(0, 1), "standard")
    assert losses.per_layer["encoder.0"].item() == pytest.approx(by_them.item(), rel=1e-4)
    rows = logits.flatten(0, 1)[batch.token_rows]
    kl = torch.nn.functional.kl_div(
        rows.log_softmax(-1), taught.logits.log_softmax(-1), log_target=True, reduction="sum"
    )
    assert losses.kl.item() == pytest.approx(kl.item(), rel=1e-4)


def test_batches_of_one_length_in_an_order_of_their_own():
    dice = np.random.default_rng(0)
    seconds = dice.uniform(1, 30, 67).tolist()
    sampler = EpochSampler(67, 3, seconds, 4)
    order = list(sampler)
    assert sorted(order) == list(range(67)) and order == list(EpochSampler(67, 3, seconds, 4))
    spreads = [np.ptp([seconds[i] for i in order[at : at + 4]]) for at in range(0, 64, 4)]
    assert np.mean(spreads) < 3
    assert np.corrcoef(range(64), [seconds[i] for i in order[:64]])[0, 1] < 0.5
    sampler.set_epoch(1)
    again = [key - 67 for key in sampler]
    assert {*map(frozenset, zip(*[iter(order)] * 4))} != {*map(frozenset, zip(*[iter(again)] * 4))}


def heard_in(monkeypatch):
    """Positions that the student's and the teacher's encoders get, as a run goes on."""
    seen: list[tuple[int, int]] = []

    def spy(model, features, batch, taps, wanted):
        seen.append((features.shape[-1] // 2, model.training))
        return forward_pass(model, features, batch, taps, wanted)

    monkeypatch.setattr("dqw.distill.model.forward_pass", spy)
    return seen


def test_the_student_learns_from_short_contexts_and_resumes(tmp_path, monkeypatch, small_steps):
    """The same contexts after a break, and the same weights at the end."""
    config = replace(DYNAMIC, spec_augment=SpecAugmentConfig(time_prob=0.1), teacher_masked=True)
    plan = replace(SHORT, steps=6, save_steps=2, keep_checkpoints=3)
    seen = heard_in(monkeypatch)
    whole = dqw.quantize(tiny_model(), Recipe())
    teacher = tiny_model(encoder_layers=3)
    run(tmp_path / "whole", whole, teacher, config, plan)
    students = [positions for positions, training in seen if training]
    assert {positions for positions, training in seen if not training} == {50}
    assert len(students) == 6 and all(30 <= n <= 35 for n in students)
    assert len(set(students)) > 1
    assert AudioContext.of(whole.config) == SMALL
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"broken/checkpoint-{step}")
    seen.clear()
    broken = dqw.quantize(tiny_model(), Recipe())
    run(tmp_path / "broken", broken, teacher, config, plan, resume=True)
    assert [positions for positions, training in seen if training] == students[2:]
    expected = weights(whole)
    assert all(torch.equal(expected[k], v) for k, v in broken.state_dict().items())
    with pytest.raises(UserError, match=r"distill.audio_context = 'dynamic', now it is 'full'"):
        run(tmp_path / "broken", config=replace(config, audio_context="full"), train=plan,
            resume=True)  # fmt: skip


def test_training_brings_the_short_states_nearer(tmp_path, small_steps):
    teacher, student = tiny_model(), tiny_model()
    losses = []
    plan = replace(SHORT, steps=12, batch_size=3, lr=3e-3)
    run(tmp_path, student, teacher, DYNAMIC, plan,
        progress=lambda report: losses.append(report.losses["hidden"]))  # fmt: skip
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_the_teacher_is_asked_once_a_clip(tmp_path, small_steps, monkeypatch):
    """What it says is kept where only the encoder's part changes; the losses are the same."""
    made, asked = {}, []

    def spy(*arguments, **options):
        asked.append(1)
        return teacher_pass(*arguments, **options)

    monkeypatch.setattr("dqw.distill.trainer.teacher_pass", spy)
    for name in ("always", "never"):
        student = dqw.quantize(tiny_model())
        before = weights(student.model.encoder)
        made[name] = run(
            tmp_path / name, student, tiny_model(decoder_layers=3),
            replace(DYNAMIC, encoder_states="never"), replace(SHORT, steps=6, cache_states=name),
        )  # fmt: skip
        after = student.model.encoder.state_dict()
        assert not all(torch.equal(before[k], v) for k, v in after.items())
        assert len(asked) == (0 if name == "always" else 6)
    for name, loss in made["never"].losses.items():
        assert made["always"].losses[name] == pytest.approx(loss, rel=1e-3, abs=1e-5), name
    kept = load_file(min((tmp_path / "always/states").glob("*/*.safetensors")))
    assert "taught" in kept and "heard" not in kept
    with pytest.raises(UserError, match=r"or distill\.encoder_states = 'never'"):
        run(tmp_path / "b", config=DYNAMIC, train=replace(SHORT, cache_states="always"))


def test_rounding_hears_joined_clips(tmp_path, monkeypatch, small_steps):
    seen = []
    monkeypatch.setattr(
        "dqw.distill.rounding.calibrate", lambda student, batches, *_, **__: seen.extend(batches)
    )
    short = [Noise(f"s{i}", f"t{i}", seed=i, seconds=0.35, real_seconds=0.35) for i in range(6)]
    for choice in ("dynamic", "full"):
        config = DistillConfig(audio_context=choice, calibration_clips=4)
        run(tmp_path / choice, dqw.quantize(tiny_model()), config=config, items=short)
    joined, alone = (batch["input_features"] for batch in seen)
    # frames that are the silence behind a clip's end
    quiet = [(batch == batch[..., -1:]).all(1).float().mean() for batch in (joined, alone)]
    assert joined.shape == alone.shape and quiet[0] < 0.5 < quiet[1]


def test_a_full_run_takes_the_entry_away(tmp_path, small_steps):
    student = tiny_model()
    run(tmp_path / "a", student, config=DYNAMIC)
    assert AudioContext.of(student.config) == SMALL
    run(tmp_path / "b", student)
    assert AudioContext.of(student.config) is None
    assert "audio_context" not in student.config.to_dict()


def test_settings_that_make_no_sense(tmp_path):
    with pytest.raises(UserError, match="choose one of full, dynamic"):
        DistillConfig(audio_context="short")
    with pytest.raises(UserError, match=r"set train\.freeze_encoder = false"):
        run(tmp_path, config=DYNAMIC, train=replace(SHORT, freeze_encoder=True))
    assert not list(tmp_path.iterdir())
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[distill]\naudio_context = "dynamic"\n[train]\nfreeze_encoder = true\n')
    options = ["--teacher", "nowhere", "--data", "none", "--recipe", str(recipe)]
    result = CliRunner().invoke(app, ["compress", *options, "--out", str(tmp_path / "out")])
    assert result.exit_code == 1 and "set train.freeze_encoder = false" in result.output
