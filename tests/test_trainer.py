"""The trainer: losses and gradients of a step, what whole runs train and what they leave alone."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from speech_helpers import Noise, clips, one_thread, tiny_model, tiny_processor  # noqa: F401
from test_losses import cross_entropy, logits_kl
from torch import nn

import dqw
from dqw.distill import DistillConfig, GuidanceConfig, TrainConfig, distill
from dqw.distill import run as run_module
from dqw.distill.arguments import training_arguments
from dqw.distill.config import AugmentConfig, SpecAugmentConfig
from dqw.distill.data import Collator, EpochSampler, SpeechDataset
from dqw.distill.losses import IGNORE, hidden_loss
from dqw.distill.model import Batch, DistillModel, teacher_pass
from dqw.distill.pair import is_multilingual
from dqw.distill.prepare import prepare
from dqw.distill.progress import Display
from dqw.distill.run import _may_skip
from dqw.distill.stepping import parameter_groups, spec_augment
from dqw.errors import UserError
from dqw.recipe import QuantConfig, Recipe

SHORT = TrainConfig(
    steps=3, batch_size=2, lr=1e-3, clip_lr=1e-3, precision="float32", tensorboard=False
)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def run(folder, student=None, teacher=None, config=None, train=SHORT, items=None, **rest):
    student = tiny_model() if student is None else student
    teacher = tiny_model(d_model=64) if teacher is None else teacher
    items = clips() if items is None else items
    rest = {"progress": "off", **rest}
    return distill(student, teacher, tiny_processor(), items, folder, config, train=train, **rest)


# One step


def batch_of(encoder):
    made = prepare(clips(3), encoder, None, None, DistillConfig(), TrainConfig(), Path("unused"))
    dataset = SpeechDataset(made.examples, encoder, tiny_processor().feature_extractor)
    return Collator(pad=0)([dataset[i] for i in range(3)])


def wanted(pupil, depth):
    return {s: set(range(depth[s])) for s in pupil.stacks}


def step(pupil, teacher, batch):
    from dqw.distill.layers import LayerTap

    taps = {s: LayerTap(teacher, s, pupil.kind) for s in pupil.stacks}
    deep = wanted(pupil, pupil.teacher_depth)
    taught = teacher_pass(teacher, batch.teacher_features, batch, taps, deep, logits=True)
    everything = {s: list(range(pupil.depth[s])) for s in pupil.stacks}
    return taught, pupil(batch.features, batch, taught, {}, everything)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_are_those_of_the_whole_models(encoder, temperature):
    student, teacher = tiny_model(), tiny_model(encoder_layers=3, decoder_layers=4)
    inputs = batch_of(encoder)
    config = DistillConfig(
        ce=0.4, kl=0.6, temperature=temperature, hidden_loss="relative", matching="static_uniform"
    )
    batch = Batch.of(inputs)
    _, losses = step(DistillModel(student, teacher, config), teacher, batch)
    asked = dict(
        input_features=inputs["input_features"],
        decoder_input_ids=inputs["decoder_input_ids"],
        output_hidden_states=True,
    )
    with torch.no_grad():
        ours, theirs = student(**asked), teacher(**asked)
    labels = inputs["labels"]
    ce = cross_entropy(ours.logits, labels)
    kl = logits_kl(ours.logits, theirs.logits, labels, temperature)
    count = int((labels != IGNORE).sum())
    assert losses.count == count
    assert losses.ce.item() / count == pytest.approx(ce.item(), rel=1e-4)
    assert losses.kl.item() / count == pytest.approx(kl.item(), rel=1e-4)
    total = losses.tokens.item() / count
    assert total == pytest.approx(0.4 * ce.item() + 0.6 * kl.item(), rel=1e-4)
    # Student layer 0 learns from teacher layer 1 (of 4); hidden_states[0] is the embedding.
    assert losses.matching == {"encoder": (0, 2), "decoder": (1, 3)}
    keep = inputs["decoder_mask"]
    by_hand = hidden_loss(
        ours.decoder_hidden_states[1][keep], theirs.decoder_hidden_states[2][keep], "relative"
    )
    assert losses.per_layer["decoder.0"].item() == pytest.approx(by_hand.item(), rel=1e-4)
    by_hand = hidden_loss(
        ours.encoder_hidden_states[1].flatten(0, 1),
        theirs.encoder_hidden_states[1].flatten(0, 1),
        "relative",
    )
    assert losses.per_layer["encoder.0"].item() == pytest.approx(by_hand.item(), rel=1e-4)
    mean = sum(value.item() for value in losses.per_layer.values()) / 4
    assert losses.hidden.item() == pytest.approx(mean, rel=1e-5)


def test_ffn_activations_are_taken_under_the_causal_mask(encoder):
    student, teacher = tiny_model(), tiny_model(decoder_layers=3)
    config = DistillConfig(hidden_loss="ffn", matching="static_uniform", encoder_states="never")
    pupil = DistillModel(student, teacher, config)
    inputs = batch_of(encoder)
    _, whole = step(pupil, teacher, Batch.of(inputs))
    assert set(whole.per_layer) == {"decoder.0", "decoder.1"}
    # What comes after a position does not change its activation.
    seen = []
    for ids in (inputs["decoder_input_ids"], inputs["decoder_input_ids"].clone()):
        ids[:, -3:] += len(seen)
        batch = Batch.of({**inputs, "decoder_input_ids": ids, "labels": inputs["labels"]})
        with pupil.taps["decoder"].open() as taken:
            heard = student.model.encoder(batch.features).last_hidden_state
            student.model.decoder(input_ids=ids, encoder_hidden_states=heard, use_cache=False)
        seen.append(taken[1])
    assert seen[0].shape[-1] == 128
    torch.testing.assert_close(seen[0][:, :-3], seen[1][:, :-3])
    assert not torch.equal(seen[0][:, -1], seen[1][:, -1])


@pytest.mark.parametrize("matching", ["dynamic", "restrained", "optimal"])
def test_gradients_reach_weights_clips_and_projections_but_not_the_teacher(encoder, matching):
    student = dqw.quantize(tiny_model(), Recipe())
    teacher = tiny_model(d_model=96, encoder_attention_heads=3, decoder_attention_heads=3,
                         encoder_layers=3, decoder_layers=4)  # fmt: skip
    config = DistillConfig(matching=matching, encoder_states="always")
    pupil = DistillModel(student, teacher.requires_grad_(False), config)
    assert set(pupil.projections) == {"encoder", "decoder"}
    taught, losses = step(pupil, teacher, Batch.of(batch_of(encoder)))
    assert not taught.logits.requires_grad
    assert not any(s.requires_grad for states in taught.states.values() for s in states.values())
    (losses.tokens + losses.hidden).backward()
    for name, parameter in pupil.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            if name.endswith("clip") or name.startswith("projections"):
                assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in teacher.parameters())
    plan = TrainConfig(lr=1.0, clip_lr=2.0, projection_lr=3.0, weight_decay=0.1)
    groups = parameter_groups(pupil, plan)
    assert [group["lr"] for group in groups] == [1.0, 1.0, 2.0, 3.0]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0, 0.0]
    trained = sum(p.requires_grad for p in pupil.parameters())
    assert sum(len(group["params"]) for group in groups) == trained


def test_encoder_states_are_left_out_when_widths_differ_or_it_is_frozen():
    teacher = tiny_model(d_model=96, encoder_attention_heads=3, decoder_attention_heads=3)
    assert DistillModel(tiny_model(), teacher, DistillConfig()).stacks == ("decoder",)
    student = tiny_model()
    assert DistillModel(student, tiny_model(), DistillConfig()).stacks == ("encoder", "decoder")
    student.model.encoder.requires_grad_(False)
    assert DistillModel(student, tiny_model(), DistillConfig()).stacks == ("decoder",)
    assert DistillModel(student, teacher, DistillConfig(hidden=0.0)).stacks == ()


def test_spec_augment_masks_a_copy_and_leaves_the_config_alone():
    model = tiny_model().train()
    before = model.config.to_dict()
    features = torch.ones(2, 80, 100)
    with spec_augment(model.config, SpecAugmentConfig(time_prob=0.2, feature_prob=0.1)):
        masked = model.model._mask_input_features(features.clone())
    assert (masked == 0).any() and (features == 1).all()
    assert model.config.to_dict() == before


def test_spec_augment_masks_what_is_spoken(encoder):
    """Not the silence that a clip is padded with: spans of 10 of its 50 frames, never beyond."""
    inputs = batch_of(encoder)
    batch = Batch.of(inputs)
    spoken = batch.spoken()
    assert spoken is not None and spoken.sum(1).tolist() == [50, 50, 50]
    model = tiny_model().train()
    wanted = SpecAugmentConfig(time_prob=0.01, time_length=10, time_min_masks=2)
    features = torch.ones(3, 80, 100)
    with spec_augment(model.config, wanted):
        masked = model.model._mask_input_features(features.clone(), spoken)
    assert (masked[:, 0] == 0).sum(1).min() > 10 and (masked[..., 50:] == 1).all()


# Whole runs


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    teacher = tiny_model(d_model=64)
    teacher.model.decoder.layer_norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match=r"kl.* is no number at step 1: start again in"):
        run(tmp_path, teacher=teacher)


def test_the_order_follows_the_epoch_where_a_run_resumes(tmp_path):
    """Several processes wrap the sampler so often that nothing else tells it."""
    from types import SimpleNamespace

    from dqw.distill.callbacks import ReportCallback

    order = EpochSampler(10, 3)
    report = ReportCallback(Display(), tmp_path / "log.jsonl")
    report.trainer = SimpleNamespace(order=order)
    for epoch, wanted in ((None, 0), (1.0, 1), (1.6, 1), (3.0000000001, 3), (2.9999999999, 3)):
        report.on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
        assert order.epoch == wanted


def test_the_student_learns_and_the_teacher_stays(tmp_path):
    teacher, student = tiny_model(), tiny_model()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p) * 0.02 * p.requires_grad)
    positions = student.model.encoder.embed_positions.weight
    positions.requires_grad_()  # as loading a checkpoint leaves them
    before, started = weights(teacher), weights(student)
    reports = []
    plan = TrainConfig(steps=12, batch_size=3, lr=3e-3, tensorboard=False)
    result = run(tmp_path, student, teacher, train=plan, progress=reports.append)
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert not all(torch.equal(started[k], v) for k, v in student.state_dict().items())
    assert torch.equal(positions, started["model.encoder.embed_positions.weight"])
    assert reports[-1].losses["kl"] < reports[0].losses["kl"]
    assert reports[-1].losses["hidden"] < reports[0].losses["hidden"]
    assert result.steps == 12 and result.examples == 6 and not student.training
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert {"loss", "ce", "kl", "hidden", "hidden/decoder.1", "matching"} <= set(rows[0])
    parts = 0.1 * rows[3]["ce"] + 0.9 * rows[3]["kl"] + 0.5 * rows[3]["hidden"]
    assert rows[3]["loss"] == pytest.approx(parts, rel=0.02)  # CE and KL are means of batch means


def test_no_pickle_is_written(tmp_path):
    run(tmp_path, train=TrainConfig(steps=2, batch_size=2))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    written = {path.suffix for path in files if "tensorboard" not in path.parts}
    assert written == {".safetensors", ".json", ".jsonl"}
    assert any("tfevents" in path.name for path in files)


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    """Texts differ in length, so a mean of means would not do."""
    config = DistillConfig(hidden=0.0)
    states = []
    for index, (size, parts) in enumerate([(6, 1), (2, 3)]):
        student = tiny_model()
        plan = replace(SHORT, steps=1, batch_size=size, accumulate=parts)
        teacher = tiny_model()
        nn.init.normal_(teacher.proj_out.weight, std=0.1)
        run(tmp_path / str(index), student, teacher, config, plan)
        saved = tmp_path / f"{index}/checkpoint-1/optimizer.safetensors"
        states.append(load_file(str(saved)))
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-7)


def test_joint_training_moves_clips_and_freezes_to_what_was_trained(tmp_path):
    student = dqw.quantize(tiny_model(), Recipe())
    clips_before = {n: p.clone() for n, p in student.named_parameters() if n.endswith("clip")}
    guidance = GuidanceConfig(mode="mutual", interval=2, smoothing=0.2)
    result = run(tmp_path, student, guidance=guidance)
    after = dict(student.named_parameters())
    assert any(not torch.equal(after[name], value) for name, value in clips_before.items())
    rows = [json.loads(line) for line in (tmp_path / "guidance.jsonl").open()]
    assert [row["step"] for row in rows] == [0, 2]
    assert tuple(rows[-1]["quantized"]) == result.choice.quantized
    assert set(rows[0]["quant_loss"]) == set(rows[0]["distill_loss"])
    for name, module in dqw.quant_modules(student).items():
        unit = ".".join(name.split(".")[:4])
        assert module.chosen == (unit in result.choice.quantized or ".layers." not in name)


@pytest.mark.parametrize("mode", ["all", "random"])
def test_runs_repeat_themselves(tmp_path, mode):
    made = []
    for name in ("a", "b"):
        student = dqw.quantize(tiny_model(), Recipe())
        np.random.seed(len(made))
        torch.manual_seed(len(made))
        run(tmp_path / name, student, guidance=GuidanceConfig(mode=mode, interval=1))
        made.append(weights(student))
    assert all(torch.equal(made[0][k], made[1][k]) for k in made[0])


def test_frozen_encoder_and_other_teachers(tmp_path):
    teacher = tiny_model(d_model=96, encoder_attention_heads=3, decoder_attention_heads=3,
                         decoder_layers=4).bfloat16()  # fmt: skip
    student = tiny_model()
    before = weights(student.model.encoder)
    plan = TrainConfig(steps=2, batch_size=2, lr=1e-3, freeze_encoder=True, tensorboard=False)
    config = DistillConfig(spec_augment=SpecAugmentConfig(time_prob=0.1), projection="layer")
    run(tmp_path, student, teacher, config, plan)
    assert all(torch.equal(before[k], v) for k, v in student.model.encoder.state_dict().items())
    assert teacher.dtype == torch.bfloat16
    assert not any("projection" in name for name in student.state_dict())


def test_models_that_do_not_fit(tmp_path):
    for teacher, words in (
        (tiny_model(vocab_size=264), "263 tokens and the teacher 264"),
        (tiny_model(num_mel_bins=128), "the teacher's own processor"),
        (tiny_model(max_target_positions=32), "max_target_positions"),
    ):
        with pytest.raises(UserError, match=words):
            run(tmp_path, teacher=teacher)
    student = tiny_model()
    with pytest.raises(UserError, match="are one model"):
        run(tmp_path, student, student)
    with pytest.raises(UserError, match="needs distilled hidden states"):
        run(tmp_path, config=DistillConfig(hidden=0), guidance=GuidanceConfig(mode="mutual"))
    assert is_multilingual(student)
    with pytest.raises(UserError, match=r"the student is packed.* call dqw.quantize"):
        run(tmp_path, dqw.freeze(dqw.quantize(tiny_model())))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache_features": "always", "workers": 1}, "keeps nothing where train.workers read"),
        ({"cache_features": "always"}, "keeps nothing where clips are augmented: set it to 'auto'"),
        ({"language": "klingon"}, "train.language is 'klingon', which Whisper does not know"),
        pytest.param(
            {"precision": "fp16"},
            "is for a GPU, and torch finds none: take 'auto'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there"),
        ),
    ],
)
def test_settings_that_would_have_no_effect(tmp_path, changes, words):
    augmented = DistillConfig(augment=AugmentConfig(noise=1.0))
    with pytest.raises(UserError, match=words):
        run(tmp_path, train=replace(SHORT, **changes), config=augmented)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_recipe_says_the_precision_not_the_launcher(tmp_path, monkeypatch, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    args = training_arguments(replace(SHORT, precision=precision), tmp_path, False)
    assert args.mixed_precision == {"float32": "no", "bf16": "bf16"}[precision]
    assert not args.fp16


def test_weights_in_parts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"part the weights.*torchrun --nproc_per_node"):
        run(tmp_path)


def test_a_constant_rate_warms_up_where_it_is_told_to(tmp_path):
    reports = []
    plan = replace(SHORT, schedule="constant", warmup_steps=2)
    run(tmp_path, train=plan, progress=reports.append)
    rates = [report.learning_rate for report in reports]
    assert rates[0] < rates[1] < rates[2] or rates[0] < rates[1] == rates[2], rates


def test_parameters_that_may_go_without_a_gradient():
    """DistributedDataParallel waits for all others."""
    config, everywhere = DistillConfig(hidden=0), GuidanceConfig()
    plain = dqw.quantize(tiny_model())
    spare = dqw.quantize(tiny_model(), Recipe(quant=QuantConfig(rest_bits=8)))
    assert not _may_skip(plain, config, everywhere)
    assert _may_skip(spare, config, everywhere)
    assert _may_skip(plain, config, GuidanceConfig(mode="random"))
    assert _may_skip(plain, DistillConfig(), everywhere)


def test_guidance_has_rounding_errors_to_choose_by_after_calibration(tmp_path):
    """A copy's weights would lie on the grid."""
    teacher = tiny_model(d_model=64)
    student = dqw.quantize(copy.deepcopy(teacher))
    config = DistillConfig(calibration_clips=3)
    guidance = GuidanceConfig(mode="mutual", interval=1, probe_clips=2)
    run(tmp_path, student, teacher, config, replace(SHORT, steps=1), guidance=guidance)
    line = json.loads((tmp_path / "guidance.jsonl").read_text())
    assert min(line["quant_loss"].values()) > 0


def test_calibration_comes_before_the_first_step(tmp_path, monkeypatch):
    came, rounds, learns = [], run_module.round_student, DistillModel.forward

    def calibrate(*args):
        came.append("rounding")
        rounds(*args)

    def forward(self, *args):
        came.append("step")
        return learns(self, *args)

    monkeypatch.setattr(run_module, "round_student", calibrate)
    monkeypatch.setattr(DistillModel, "forward", forward)
    plan, losses = replace(SHORT, steps=1), []
    for count in (3, 0):
        came.clear()
        config = DistillConfig(calibration_clips=count)
        student = dqw.quantize(tiny_model())
        losses.append(run(tmp_path / str(count), student, None, config, plan).losses["loss"])
        assert came == ["rounding"] * bool(count) + ["step"]
    assert losses[0] != losses[1]
