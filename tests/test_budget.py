"""Bits under a budget: sizes are those of the folder, and no other plan that fits costs less."""

from __future__ import annotations

import copy
import itertools
import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_whisper
from speech_helpers import random_windows
from typer.testing import CliRunner
from whisper_helpers import save_tiny, tiny, write_tone

from dqw.budget import (
    allocate,
    few,
    fit_budget,
    float_bytes,
    model_size,
    one_table,
    overhead,
    parse_bytes,
)
from dqw.choices import Choice
from dqw.cli import app
from dqw.convert import quant_modules, quantize
from dqw.devices import lowered
from dqw.errors import UserError
from dqw.hf import coded_state
from dqw.probe import Changed, Probe, _kl, _kl_of_shift, changed, first_changed
from dqw.recipe import Override, QuantConfig, QuantSpec, Recipe, stepped
from dqw.save import save_student
from dqw.whisper.checkpoint import load_whisper
from dqw.whisper.report import model_bytes


def test_sizes_as_people_write_them() -> None:
    assert parse_bytes("32MiB") == 32 * 2**20
    assert parse_bytes("1.5 mb") == 1_500_000
    assert parse_bytes("4096") == 4096
    for bad in ("", "much", "0MiB", "-3MiB", "3 miles"):
        with pytest.raises(UserError, match="like 32MiB"):
            parse_bytes(bad)


def test_allocation_is_the_best_of_all() -> None:
    dice = random.Random(0)
    spec = QuantSpec()
    for _ in range(50):
        layers = [
            [Choice(spec, 256 * dice.randint(1, 9), dice.random(), 4.0) for _ in range(3)]
            for _ in range(4)
        ]
        budget = 256 * dice.randint(8, 30)
        every = [p for p in itertools.product(*layers) if sum(c.size for c in p) <= budget]
        if not every:
            with pytest.raises(UserError, match="larger --budget"):
                allocate(layers, budget)
            continue
        found = allocate(layers, budget)
        assert sum(c.size for c in found) <= budget
        assert sum(c.cost for c in found) == pytest.approx(
            min(sum(c.cost for c in p) for p in every)
        )


def test_positions_that_were_trained_are_stored() -> None:
    model = make_tiny_whisper(max_source_positions=50)
    plan = Recipe().plan(model)
    positions = model.model.encoder.embed_positions.weight
    with_formula = float_bytes(model, plan)
    positions.data += torch.randn_like(positions)
    assert float_bytes(model, plan) - with_formula == 2 * positions.numel()


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_stack_is_run_from_the_changed_layer_on(stack: str, low: bool) -> None:
    """The same numbers, bit for bit, in whatever order layers change; and fewer layers run."""
    model = make_tiny_whisper(max_source_positions=50, **{f"{stack}_layers": 3})
    ran = []
    for index, layer in enumerate(getattr(model.model, stack).layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    names = ["layers.1.fc1", "layers.1.self_attn.v_proj", "layers.2.fc2", "layers.0.fc1"]
    names = [f"model.{stack}.{name}" for name in [*names, "layers.1.fc2"]]
    names.insert(3, "model.encoder.conv1" if stack == "encoder" else "model.decoder.embed_tokens")
    with torch.autocast("cpu", torch.bfloat16, enabled=low, cache_enabled=False):
        probe = Probe(model, random_windows() + random_windows())
        unchanged = probe.by_batch(model)
        for name in names:
            layer = model.get_submodule(name)
            with changed(layer, torch.zeros_like(layer.weight)):
                ran.clear()
                found = probe.by_batch(first=first_changed([name]))
                assert ran.count(2) == 2 and ran.count(1) >= 2 * (".2." not in name)
                assert (0 in ran) == (name != names[1])  # what comes before it is kept
                again = probe.by_batch(first=Changed(0, 0, "embed" in name))
                assert found == again != unchanged
                for (kl, tokens), (whole, _) in zip(found, probe.by_batch()):
                    assert kl / tokens == pytest.approx(whole / tokens, rel=2e-2, abs=1e-6)
        ran.clear()
        probe.by_batch(first=first_changed(names[:2]))
        assert ran == [1, 2, 1, 2]  # states before layer 1 are those of the last one asked for
    assert len(getattr(model.model, stack).layers) == 3


def test_what_changed_first() -> None:
    fc1 = [f"model.decoder.layers.{i}.fc1" for i in range(12)]
    assert first_changed([]) == (None, 0, False)
    assert first_changed(["model.decoder.embed_tokens", fc1[3]]) == (None, 0, True)
    assert first_changed([fc1[11], fc1[3]]) == (None, 3, False)
    assert first_changed(["model.encoder.layers.2.fc1", fc1[3]]) == (2, 0, False)
    assert first_changed(["model.encoder.conv1", "model.encoder.layers.2.fc1"]) == (0, 0, False)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_divergence_of_a_small_change(size: float) -> None:
    """From how far logits move, as precise as in float64, though the change is tiny; and where it
    comes in bfloat16 within its rounding."""
    torch.manual_seed(0)
    logits, shift = torch.randn(40, 300) * 4, torch.randn(40, 300) * size
    target = logits.double().log_softmax(-1)
    wanted, rows = _kl(target, (logits.double() + shift.double()).log_softmax(-1))
    assert wanted > 0 and rows == 40
    found, _ = _kl_of_shift(target.float(), shift)
    assert found == pytest.approx(wanted, rel=1e-3)
    found, _ = _kl_of_shift(target.float(), shift.bfloat16())
    assert found == pytest.approx(wanted, rel=2e-2)


def test_divergence_where_all_logits_move_together() -> None:
    torch.manual_seed(0)
    logits, shift = torch.randn(32, 51865) * 4, torch.randn(32, 51865) * 0.02 + 10.0
    target = logits.double().log_softmax(-1)
    wanted, _ = _kl(target, (logits.double() + shift.double()).log_softmax(-1))
    found, _ = _kl_of_shift(logits.log_softmax(-1), shift)
    assert found == pytest.approx(wanted, rel=2e-3)


def test_divergence_of_a_model_that_is_broken() -> None:
    """Shifts beyond e^88, and where their probability is 0 in float32."""
    shift = torch.tensor([[-60.0, 50.0, 0.0]])
    for low in (-60.0, -110.0):
        logits = torch.tensor([[0.0, low, -3.0]])
        target = logits.double().log_softmax(-1)
        wanted, _ = _kl(target, (logits.double() + shift.double()).log_softmax(-1))
        assert wanted > 10
        found, _ = _kl_of_shift(target.float(), shift)
        assert found == pytest.approx(wanted, rel=1e-4)


def test_a_shift_that_all_logits_share_is_left_out() -> None:
    model = make_tiny_whisper(max_source_positions=50)
    with torch.no_grad():
        model.proj_out.weight += 3.0  # so that logits go up and down together
    probe = Probe(model, random_windows())
    moved = torch.randn(5, model.config.d_model)
    shift = probe._shift(moved)
    plain = moved @ model.proj_out.weight.T
    assert (shift - (plain - plain.mean(-1, keepdim=True))).abs().max() < 1e-4


def test_another_model_with_the_same_encoder_is_not_asked_what_it_hears(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batches = make_tiny_whisper(max_source_positions=50), random_windows()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.decoder.layers[1].fc1.weight.zero_()
    ran: list[bool] = []
    other.model.encoder.register_forward_hook(lambda *_: ran.append(True))
    probe = Probe(model, batches)
    found = probe.by_batch(other)
    assert found[0][0] > 0 and not ran
    with monkeypatch.context() as patch:
        patch.setattr(Probe, "_hears_alike", lambda *_: False)
        assert probe.by_batch(other) == found and ran
    with torch.no_grad():
        other.model.encoder.layers[0].fc1.weight.zero_()
    assert probe.by_batch(other) != found


def test_changed_weights_are_felt_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    # autocast keeps its copies of the weights it has met, unless it is told not to
    monkeypatch.setattr("dqw.devices.fast_precision", lambda *_: "bf16")
    model = make_tiny_whisper(max_source_positions=50)
    layer = model.model.encoder.layers[0].fc1
    with lowered(model):
        probe = Probe(model, random_windows())
        with changed(layer, torch.zeros_like(layer.weight)):
            assert probe.kl() > 0


def test_what_is_set_aside_holds_all_but_the_layers(tmp_path: Path) -> None:
    """config.json with its plan and overrides, the header and the small files."""
    base, out = save_tiny(tmp_path / "base"), tmp_path / "out"
    result = CliRunner().invoke(
        app, ["compress", "--teacher", str(base), "--ptq-only", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    model = load_whisper(base)[0]
    plan = {name: m.spec for name, m in quant_modules(load_whisper(out)[0]).items()}
    assert model_bytes(out) <= model_size(model, plan) + overhead(plan)
    rule = {"skip": False, "bits": 4, "grid": "lloyd", "group_size": 16}
    overrides = json.dumps([{"match": name, **rule} for name in plan], indent=2)
    assert model_bytes(out) + len(overrides) <= model_size(model, plan) + overhead(plan)


def test_so_it_does_where_layers_have_steps(tmp_path: Path) -> None:
    model, processor = tiny(tmp_path / "float")
    names = Recipe().plan(model)
    quant = QuantConfig(override=[Override(match=n, bits=6, step=0.3536) for n in names])
    student = quantize(model, Recipe(quant=quant))
    out = save_student(student, processor, tmp_path / "out", {"quant": asdict(quant)})
    tensors = sum(tensor.nbytes for tensor in coded_state(student)[0].values())
    assert model_bytes(out) <= tensors + overhead(names)


def test_bits_that_an_override_gives_are_kept() -> None:
    model = make_tiny_whisper(max_source_positions=50)
    told = Override(match="model.decoder.layers.*.fc1", bits=7)
    recipe = Recipe(quant=QuantConfig(override=[told, Override(match="*fc2", group_size=16)]))
    plan = recipe.plan(model)
    budget = model_size(model, plan) + overhead(plan)
    found = fit_budget(model, recipe, budget, random_windows(), lambda line: None).plan(model)
    assert {spec.bits for name, spec in found.items() if "decoder" in name and "fc1" in name} == {7}
    assert len({spec.bits for spec in found.values()}) > 2


def test_other_bits_are_on_the_grid_that_was_asked_for() -> None:
    """At 6 and 8 bits there is no lloyd; layers that get fewer have it all the same."""
    model = make_tiny_whisper(max_source_positions=50)
    quant = QuantConfig(bits=6, embedding_bits=8, grid="lloyd", group_size=16, allocate="bits")
    found = fit_budget(model, Recipe(quant), 150_000, random_windows(), lambda line: None)
    plan = found.plan(model)
    few = {s.grid for n, s in plan.items() if s.bits <= 5 and "conv" not in n}
    assert few == {"lloyd"} and {s.grid for s in plan.values() if s.bits > 5} <= {"uniform"}
    assert {s.grid for n, s in plan.items() if "conv" in n} == {"uniform"}


def test_compress_keeps_within_the_budget(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    rows = []
    for number, text in enumerate(("hello", "hello world", "wow")):
        write_tone(tmp_path / "clips" / f"{number}.wav", 0.4 + 0.1 * number)
        rows.append({"audio": f"{number}.wav", "text": text, "language": "en"})
    data = tmp_path / "clips" / "manifest.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(budget: str, out: Path, *more: str) -> tuple[int, str]:
        options = ["compress", "--teacher", base, "--data", data, "--budget", budget, "--out", out]
        result = CliRunner().invoke(app, [*map(str, options), *more])
        return result.exit_code, result.output

    sizes = []
    for budget in (220, 300):
        out = tmp_path / str(budget)
        code, output = run(f"{budget}KiB", out, "--ptq-only")
        assert code == 0, output
        assert "plan: " in output and "decoder fc1" in output
        sizes.append(model_bytes(out) / 1024)
        assert sizes[-1] <= budget
    assert sizes[0] < sizes[1]
    bits = {m.spec.bits for m in quant_modules(load_whisper(tmp_path / "220")[0]).values()}
    assert len(bits) > 1
    code, output = run("60KiB", tmp_path / "none", "--ptq-only")
    assert code == 1 and "larger --budget" in output
    code, output = run("220KiB", tmp_path / "trained", "--steps", "1", "--batch-size", "2")
    assert code == 0, output
    assert model_bytes(tmp_path / "trained") / 1024 <= 220


def test_query_key_and_value_have_one_table() -> None:
    """Of self-attention, and where all have steps; cross-attention's queries come alone."""
    bits = {"self_attn.q": 4, "self_attn.k": 6, "self_attn.v": 5, "encoder_attn.q": 4}
    specs = {f"layers.0.{n}_proj": stepped(QuantSpec(), 0.1 * b, b) for n, b in bits.items()}
    specs |= {f"layers.1.{n}_proj": QuantSpec(bits=b) for n, b in bits.items()}
    found = one_table(specs)
    assert [spec.bits for spec in found.values()] == [6, 6, 6, 4, 4, 6, 5, 4]
    assert [s.step for s in found.values()] == [s.step for s in specs.values()]


def test_few_windows_are_spread_and_padded() -> None:
    batches = [
        {
            "input_features": torch.full((2, 80, 10), float(i)),
            "decoder_input_ids": torch.full((2, 3 + i), i),
            "decoder_mask": torch.ones(2, 3 + i, dtype=torch.bool),
        }
        for i in range(4)
    ]
    (batch,) = few(batches, 4)
    assert batch["input_features"][:, 0, 0].tolist() == [0, 1, 2, 3]
    assert batch["decoder_mask"].sum(1).tolist() == [3, 4, 5, 6]
    assert batch["decoder_mask"].dtype == torch.bool
    assert batch["decoder_input_ids"].shape == (4, 6)
    assert (batch["decoder_input_ids"].float().mean(1) * 6).tolist() == [0, 4, 10, 18]
    assert few(batches, 99)[0]["input_features"].shape[0] == 8
    for own in batches:
        del own["decoder_mask"]
    assert torch.equal(few(batches, 4)[0]["decoder_mask"], batch["decoder_mask"])
