"""What a compression keeps until it is done: taken up by the same one, by no other."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from speech_helpers import random_windows
from whisper_helpers import make_tiny_whisper, run_dqw, save_speech, save_tiny

import dqw
import dqw.calibrate as walk
import dqw.compress as compress_module
from dqw.budget import fit_budget
from dqw.calibrate import calibrate, layer_count
from dqw.kept import Kept
from dqw.recipe import QuantConfig, QuantSpec, Recipe
from dqw.rows import append_rows, read_rows

RECIPES = {
    "groups": QuantConfig(bits=3, grid="apot", group_size=16),
    "lloyd": QuantConfig(bits=4, grid="lloyd", group_size=0),
    "learned": QuantConfig(bits=2, grid="learned", group_size=16),
    "float embedding": QuantConfig(bits=2, grid="uniform", group_size=0, embedding_bits=0),
}


class Stop(Exception):
    pass


@pytest.mark.parametrize("quant", RECIPES.values(), ids=list(RECIPES))
def test_rounding_goes_on_where_it_was(
    quant: QuantConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return dqw.quantize(make_tiny_whisper(max_source_positions=50), Recipe(quant)).eval()

    whole, batches = model(), random_windows()
    calibrate(whole, batches)
    layers, rounded = layer_count(model()), list[str]()
    plain = walk.round_layers

    def counting(shared: dict[str, object], *rest: object) -> None:
        rounded.extend(shared)
        plain(shared, *rest)

    monkeypatch.setattr(walk, "round_layers", counting)
    for stops in (1, 9, layers - 2, None):  # within the first layer, the encoder, the last one

        def say(name: str, stops: int | None = stops, said: list[str] = []) -> None:  # noqa: B006
            said.append(name)
            if len(said) == stops:
                said.clear()
                raise Stop

        found, kept = model(), Kept(tmp_path, basis="a")
        if stops is None:
            calibrate(found, batches, say, kept=kept)
        else:
            with pytest.raises(Stop):
                calibrate(found, batches, say, kept=kept)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name
    assert layers < len(rounded) < 2 * layers, "what was done was done again"
    rounded.clear()
    calibrate(model(), batches, kept=kept)
    assert not rounded
    calibrate(model(), batches, kept=Kept(tmp_path, basis="b"))
    assert len(rounded) == layers, "another's was taken"


def test_damage_is_worked_out_again_and_a_full_disk_is_said(tmp_path: Path) -> None:
    kept, module = Kept(tmp_path / "work", basis="a"), torch.nn.Linear(3, 2)
    assert not kept.has("x") and kept.choices({"x": QuantSpec()}) == {}
    kept.save("x", module)
    assert kept.has("x") and not kept.on([("y", torch.zeros(1))]).has("x")
    [path] = kept.folder.iterdir()
    path.write_bytes(path.read_bytes()[:50])
    assert not kept.has("x")
    kept.keep_choices("x", QuantSpec(), [])
    file = kept.folder / "sensitivities.jsonl"
    assert kept.choices({"x": QuantSpec()}) == {"x": []}
    assert kept.choices({"x": QuantSpec(bits=3)}) == {}  # of other bits
    rows = file.read_bytes()
    file.write_bytes(b"{}\n" + rows[:20] + b"\n\xff\xfe\n" + rows + rows.replace(b"[]", b"[1]"))
    assert kept.choices({"x": QuantSpec()}) == {"x": []}  # the others are measured again

    (tmp_path / "file").touch()
    said: list[str] = []
    nowhere = Kept(tmp_path / "file", said.append)
    nowhere.save("x", module)
    nowhere.save("y", module)
    nowhere.keep_choices("x", QuantSpec(), [])
    assert len(said) == 1 and "a kill would lose what comes now" in said[0]


def test_a_full_disk_leaves_no_half_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"a": 1}])

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr("dqw.rows.os.fsync", full)
        with pytest.raises(OSError, match="full"):
            append_rows(path, [{"a": 2}])
    append_rows(path, [{"a": 3}])
    assert [row["a"] for row in read_rows(path, ["a"], "")] == [1, 3]


def test_what_is_not_its_own_stays(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    data = save_speech(tmp_path / "clips", ("hello", "wow"))
    work = tmp_path / "thesis.work"
    work.mkdir()
    (work / "precious.txt").write_text("chapter one")
    save_file({"a": torch.zeros(1)}, work / "mine.safetensors")
    options = ("--teacher", base, "--out", tmp_path / "thesis", "--calibration-clips", "2")
    for more in ((), ("--data", data)):
        shutil.rmtree(tmp_path / "thesis", ignore_errors=True)
        code, printed = run_dqw("compress", *options, "--ptq-only", *more)
        assert code == 0, printed
        assert {p.name for p in work.iterdir()} == {"precious.txt", "mine.safetensors"}


def test_room_is_made_for_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_tiny(tmp_path / "base")
    data = save_speech(tmp_path / "clips", ("hello", "wow"))
    options = ("--teacher", base, "--data", data, "--calibration-clips", "2")
    states = []
    plain = compress_module.save_student

    def saved(*args: object) -> object:
        states.append(len(list(tmp_path.glob("*.work/*.safetensors"))))
        return plain(*args)

    monkeypatch.setattr(compress_module, "save_student", saved)
    assert run_dqw("compress", *options, "--out", tmp_path / "a")[0] == 0
    monkeypatch.setattr(compress_module, "has_room", lambda *_: False)
    assert run_dqw("compress", *options, "--out", tmp_path / "b")[0] == 0
    assert states[0] > 3 and states[1] == 0
    assert not list(tmp_path.glob("*.work"))


@pytest.mark.parametrize("allocate", ["bits", "steps"])
def test_sensitivities_are_measured_once(
    allocate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_whisper(max_source_positions=50)
    recipe, batches = Recipe(QuantConfig(allocate=allocate)), random_windows()
    kept, said = Kept(tmp_path, basis="a"), list[str]()
    first = fit_budget(model, recipe, 150_000, batches, said.append, kept)
    rows = (tmp_path / "sensitivities.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "sensitivities.jsonl").write_text("".join(rows[:5]) + rows[5][:9])  # a kill
    assert fit_budget(model, recipe, 150_000, batches, said.append, kept) == first
    assert "measured" in said[-1] or any(", 5 of them before" in line for line in said)
    monkeypatch.setattr("dqw.probe.Probe.kl", lambda *_: pytest.fail("measured again"))
    fit_budget(model, recipe, 140_000, batches, said.append, kept)  # of any budget


def test_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_tiny(tmp_path / "base")
    data = save_speech(tmp_path / "clips", ("hello", "hello world", "wow"))
    out, plain = tmp_path / "small", walk.round_layers

    def compress(*more: str) -> tuple[int, str]:
        options = ("--teacher", base, "--data", data, "--out", out, "--student-layers", "1,2")
        options += ("--recipe", "default", "--calibration-clips", "2")
        return run_dqw("compress", *options, *more)

    def killed(shared: dict[str, object], *rest: object) -> None:
        if any(".decoder.layers.1." in name for name in shared):
            raise KeyboardInterrupt
        plain(shared, *rest)

    code, printed = compress()
    assert code == 0 and {p.name for p in tmp_path.iterdir()} == {"base", "clips", "small"}, printed
    whole = (out / "model.safetensors").read_bytes()
    shutil.rmtree(out)
    with monkeypatch.context() as patch:
        patch.setattr(walk, "round_layers", killed)
        code, printed = compress()
    assert code == 130 and "small.work: the same command goes on" in "".join(printed.split("\n"))
    assert not out.exists() and "healed already" not in printed
    code, printed = compress("--resume")
    assert code == 0 and "nothing to resume" not in printed, printed
    for words in ("healed already", "of them before", "layers rounded before"):
        assert words in printed, printed
    assert (out / "model.safetensors").read_bytes() == whole
    assert not (tmp_path / "small.work").exists()
