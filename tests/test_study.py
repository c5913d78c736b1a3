"""`dqw study`: cells that are kept, ties that are ties, pages that say what was found."""

from __future__ import annotations

import csv
import fcntl
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from speech_helpers import Noise, one_thread  # noqa: F401  a fixture
from typer.testing import CliRunner
from whisper_helpers import run_dqw, save_speech

from dqw.budget import model_size
from dqw.cli import app
from dqw.errors import UserError
from dqw.hf import packed_state
from dqw.probe import Probe
from dqw.recipe import Recipe
from dqw.speech import spread, spread_evenly
from dqw.study import STUDIES, lab
from dqw.study.cells import measuring
from dqw.study.plot import Axis, Point, dots, figure, lines
from dqw.study.sizes import SHAPES, authors_bytes, empty_model, size_table
from dqw.study.table import Scope
from dqw.whisper.checkpoint import load_whisper


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """Four labelled clips in two languages and a manifest."""
    texts = ("hello", "hello wow", "wow", "hello hello")
    return save_speech(tmp_path / "clips", texts, ("en", "ja"))


@pytest.fixture(autouse=True)
def small_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model has groups of 32 at most, and a few windows calibrate it."""
    monkeypatch.setattr("dqw.study.runner.QUICK_WINDOWS", 2)


def study(name: str, base: Path, speech: Path, out: Path, *more: object) -> tuple[int, str]:
    """Exit code and everything printed."""
    given = ["--model", base, "--data", speech, "--eval-data", speech, "--out", out, "--quick"]
    return run_dqw("study", name, *given, *more)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- sizes


def test_the_authors_sizes_come_out_as_published() -> None:
    """Against a Whisper with weights too: what has none must be counted alike."""
    assert sum(p.numel() for p in empty_model(SHAPES["base"]).parameters()) == 72_593_920
    assert sum(p.numel() for p in empty_model(SHAPES["tiny"]).parameters()) == 37_760_640
    assert authors_bytes(empty_model(SHAPES["tiny"])) == 29_358_336 + 2 * 8_402_304
    table = size_table({"4 bits": Recipe.shipped("default")})
    assert table[1][:3] == ["base", "89 MiB", "5.18"]
    assert table[2][:3] == ["tiny", "44 MiB", "10.48"]


def test_model_size_is_that_of_a_folder(base: Path, tmp_path: Path) -> None:
    from dqw.whisper.checkpoint import load_whisper

    out = tmp_path / "packed"
    result = CliRunner().invoke(
        app, ["compress", "--teacher", str(base), "--ptq-only", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    model, _ = load_whisper(base)
    packed = sum(t.nbytes for t in packed_state(load_whisper(out)[0]).values())
    size = model_size(model, Recipe.shipped("default").plan(model))
    assert abs(size - packed) < 0.002 * packed
    header = 8 + int.from_bytes((out / "model.safetensors").read_bytes()[:8], "little")
    assert (out / "model.safetensors").stat().st_size - header < size  # entropy-coded


# ---------------------------------------------------------------- what cells share


def test_equal_float_encoders_hear_once() -> None:
    import copy

    from conftest import make_tiny_whisper

    from dqw.convert import quantize
    from dqw.study.heard import Heard

    heard, model = Heard(), make_tiny_whisper().eval()
    features = torch.randn(1, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    ran = 0

    def counted(*_: object) -> None:
        nonlocal ran
        ran += 1

    def states(of: Any, x: torch.Tensor) -> torch.Tensor:
        handle = of.layers[0].register_forward_pre_hook(counted)
        with heard.recalled(of), torch.no_grad():
            found = of(x).last_hidden_state
        handle.remove()
        assert "forward" not in vars(of)
        return found

    first = states(model.model.encoder, features)
    twin = copy.deepcopy(model)
    assert torch.equal(states(twin.model.encoder, features.clone()), first) and ran == 1
    states(twin.model.encoder, features + 1)
    assert ran == 2, "other features"
    twin.model.encoder.layers[0].fc1.bias.data += 1
    assert not torch.equal(states(twin.model.encoder, features), first) and ran == 3
    quantize(twin)
    for times in (4, 5):
        states(twin.model.encoder, features)
        assert ran == times, "a quantized encoder is one cell's own"


# ---------------------------------------------------------------- settings


def test_every_setting_has_a_recipe_and_a_name_of_its_own() -> None:
    from conftest import make_tiny_whisper

    model = make_tiny_whisper()
    for study in STUDIES.values():
        recipe = lab.with_changes(Recipe.shipped(study.recipe), study.base)
        for quick in (True, False):
            settings = study.settings(Scope(model, recipe, quick))
            names = [lab.cell_name(s, 0) for s in settings]
            assert len(set(names)) == len(names) > 1, study.name
            for setting in settings:
                for phase in [{}, *(p.changes for p in setting.phases)]:
                    lab.with_changes(recipe, setting.changes, phase).plan(model)
    guides = STUDIES["guidance"].settings(Scope(model, Recipe(), False))
    reverse = next(s for s in guides if s.name == "reversed, 25 %")
    told = lab.with_changes(Recipe(), reverse.changes).guidance
    assert (told.mode, told.quantize_first, told.distill_first) == ("mutual", "largest", "smallest")
    assert told.quantize_ratio == 0.25


# ---------------------------------------------------------------- charts


def test_charts_are_xml_and_keep_inside() -> None:
    from xml.etree import ElementTree

    points = [Point(y, y / 2, 2 * y, x) for x, y in ((2, 1.0), (3, 0.1), (4, 0.003))]
    drawn = figure([lines("a < b", "bits", {"one & two": points}, log=True),
                    dots("c", [("row", points[0]), ("zero", Point(0, 0, 0))])])  # fmt: skip
    root = ElementTree.fromstring(drawn)
    places = [float(e.get("cx")) for e in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(places) == 5 and all(0 < x < 760 for x in places)
    assert Axis([0.0, 3.0], 0, 100, False).ticks() == [0, 1, 2, 3]
    assert Axis([0.01, 10.0], 0, 100, True).ticks() == [0.01, 0.1, 1, 10]


# ---------------------------------------------------------------- whole studies


def test_sensitivity_is_resumable_and_names_layers(
    base: Path, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked, hear = tmp_path / "out", list[int](), Probe._hear_from

    def noting(probe: Probe, first: int) -> list[torch.Tensor]:
        asked.append(first)
        return hear(probe, first)

    monkeypatch.setattr(Probe, "_hear_from", noting)
    code, printed = study("sensitivity", base, speech, out)
    assert code == 0, printed
    assert asked and asked == sorted(asked)  # states before a layer are had once
    found = rows(out / "sensitivity.csv")
    layer = [r for r in found if r["setting"] == "model.decoder.layers.1.fc1, 3 bits"]
    assert len(layer) == 1 and float(layer[0]["kl"]) > 0 and layer[0]["layer"] == "1"
    every = {r["bits"]: float(r["kl"]) for r in found
             if r["kind"] == "decoder embed_tokens" and r["layer"] == "all"}  # fmt: skip
    assert every["3"] > every["4"] > 0
    page = (out / "sensitivity.html").read_text(encoding="utf-8")
    assert "<svg" in page and "decoder embed_tokens" in page and "3 bits" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")  # self-contained

    gone = out / "cells" / "model.decoder.layers.1.fc1-3-bits.0.json"
    kept = {p: p.stat().st_mtime_ns for p in (out / "cells").iterdir() if p != gone}
    before = json.loads(gone.read_text())
    gone.unlink()
    (out / "cells" / (gone.name + ".part")).write_text("{")  # a kill in the middle of writing
    code, printed = study("sensitivity", base, speech, out)
    assert code == 0 and f"{len(kept)} of {len(kept) + 1} cells" in printed, printed
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert json.loads(gone.read_text())["kl"] == before["kl"]

    code, printed = study("sensitivity", base, speech, out, "--limit", 2)
    assert code == 1 and "another measured on" in printed
    gone.write_text("{}")
    code, printed = study("sensitivity", base, speech, out)
    assert code == 1 and "is damaged" in printed


def test_grids_compares_within_bits_and_scales_and_cells_are_kept(
    base: Path, speech: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, printed = study("grids", base, speech, out)
    assert code == 0, printed
    found = {r["setting"]: r for r in rows(out / "grids.csv")}
    assert set(found) >= {"float teacher", "apot 4 bits, per row", "pot 4 bits, groups of 16"}
    assert float(found["float teacher"]["kl"]) == pytest.approx(0, abs=1e-6)
    packed = float(found["uniform 4 bits, per row"]["mib"])
    assert packed < 0.5 * float(found["float teacher"]["mib"])
    assert float(found["uniform 4 bits, per row"]["kl"]) < float(found["pot 4 bits, per row"]["kl"])
    assert found["apot 4 bits, per row"]["words"] == "2" and found["float teacher"]["cer_errors"]
    page = (out / "grids.html").read_text(encoding="utf-8")
    assert "<td>KL</td><td>4 bits, per row</td>" in page and "Differences in KL" in page
    assert 'class="tie">tie' in page or 'class="worse">worse' in page

    # A cell is one process's own.
    other = out / "cells" / "apot-4-bits-per-row.0.lock"
    (out / "grids.html").unlink()
    other.with_suffix(".json").unlink()
    with open(other, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, printed = study("grids", base, speech, out)
        assert code == 0 and "cells are another process's" in printed, printed
        assert not (out / "grids.html").exists() and not other.with_suffix(".json").exists()
        assert measuring(out)
    assert not measuring(out)
    code, printed = study("grids", base, speech, out)  # that process was killed
    assert code == 0 and (out / "grids.html").exists(), printed
    assert not list((out / "cells").glob("*.lock"))

    # A cell of a setting that has changed is not taken for it, nor are cells of other sounds.
    cell = other.with_suffix(".json")
    made = cell.read_text()
    cell.write_text(json.dumps({**json.loads(made), "settings": "older"}))
    code, printed = study("grids", base, speech, out)
    assert code == 1 and "meant something else (apot-4-bits-per-row.0.json)" in printed, printed
    cell.write_text(made)
    save_speech(speech.parent, ("hello", "hello wow", "wow", "hello hello"), ("en", "ja"), 0.12)
    code, printed = study("grids", base, speech, out)
    assert code == 1 and "holds cells of another audio" in printed, printed


def test_subsets_have_all_languages() -> None:
    items = [Noise(str(i), language=("en", "ja", "fr")[i % 3]) for i in range(192)]
    counts = Counter(item.language for item in spread_evenly(items, 64))
    assert set(counts.values()) <= {21, 22} and len(counts) == 3
    rare = [Noise(str(i)) for i in range(199)] + [Noise("ja", language="ja")]
    assert {item.language for item in spread_evenly(rare, 64)} == {"en", "ja"}
    assert len(spread_evenly(rare, 64)) == 64 and len(spread_evenly(rare, 1)) == 1
    blocks = sorted(items, key=lambda item: item.language)
    assert spread_evenly(blocks, 64) == spread(blocks, 64)
    assert spread_evenly(items, None) == items


def test_ratio_quantizes_the_share_it_says(base: Path, speech: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed = study("ratio", base, speech, out)
    assert code == 0, printed
    found = {r["setting"]: float(r["mib"]) for r in rows(out / "ratio.csv")}
    none, half, whole = (found[n] for n in ("0 %", "4 bits, 50 %", "4 bits, 100 %"))
    assert none > half > whole and (none - half) / (none - whole) == pytest.approx(0.5, abs=0.1)
    assert set(json.loads((out / "order.json").read_text())) == {
        f"model.{stack}.layers.{i}" for stack in ("encoder", "decoder") for i in range(2)
    }


def test_languages_beside_the_teacher(base: Path, speech: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed = study("languages", base, speech, out)
    assert code == 0, printed
    found = rows(out / "languages.csv")
    assert {r["language"] for r in found} == {"all", "en", "ja"}
    page = (out / "languages.html").read_text(encoding="utf-8")
    assert "en WER" in page and "ja CER" in page and "By language" in page
    packed = tmp_path / "packed"
    options = ["compress", "--teacher", base, "--ptq-only", "--out", packed]
    assert CliRunner().invoke(app, [str(o) for o in options]).exit_code == 0
    again = tmp_path / "again"
    code, printed = study("languages", base, speech, again, "--student", packed)
    assert code == 0, printed
    assert {r["setting"] for r in rows(again / "languages.csv")} == {"float teacher", "student"}


@pytest.mark.parametrize("name", ["paper", "matching", "guidance", "ablation"])
def test_studies_that_train(name: str, base: Path, speech: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed = study(name, base, speech, out, "--steps", 1)
    assert code == 0, printed
    found = rows(out / f"{name}.csv")
    about = json.loads((out / "study.json").read_text())
    scope = Scope(load_whisper(base)[0], Recipe.from_dict(about["recipe"]), quick=True)
    wanted = {setting.name: 1 for setting in STUDIES[name].settings(scope)}
    cells = Counter(r["setting"] for r in found if r["language"] == "all")
    assert cells == wanted and all(
        float(r["kl"]) > 0 for r in found if "teacher" not in r["setting"]
    )
    assert "Answer" in (out / f"{name}.html").read_text(encoding="utf-8")
    assert not list((out / "runs").glob("*/checkpoint-*"))
    sizes = {r["setting"]: float(r["mib"]) for r in found}
    if name == "paper":
        assert "5.18" in (out / "paper.html").read_text(encoding="utf-8")
        assert sizes["distilled, uniform 8 bits"] < sizes["distilled, float"]
    if name == "ablation":
        logs = list((out / "runs").glob("one-after-the-other.0-*/log.jsonl"))
        assert len(logs) == 2 and "kl" in logs[0].read_text()
        logs = list((out / "runs").glob("distilled-then-rounded.0-*/log.jsonl"))
        assert len(logs) == 1, "the second phase rounds and trains nothing"
        assert (
            sizes["distilled, then rounded"] == sizes["jointly"] < sizes["distillation only, float"]
        )


def test_seeds_are_cells_of_their_own(
    base: Path, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More seeds later: the first ones are not run again."""
    from dqw.study import runner, table
    from dqw.study.runner import Request, run_study

    joint = table.Setting("jointly", phases=table.JOINT)
    few = table.Study("few", "?", "!", lambda scope: [joint, table.UNTRAINED])
    monkeypatch.setitem(runner.STUDIES, "few", few)
    recipe = tmp_path / "few.toml"
    recipe.write_text("[train]\nbatch_size = 1\nlr = 0.01\n[distill]\ncalibration_clips = 2\n")
    page = tmp_path / "out" / "few.html"
    for seeds, only in ((1, ("no training",)), (1, ()), (2, ())):
        request = Request("few", tmp_path / "out", str(base), data=str(speech),
                          eval_data=str(speech), seeds=seeds, steps=1,
                          recipe=str(recipe), only=only)  # fmt: skip
        run_study(request, lambda line: None)
        written = page.read_text(encoding="utf-8")
        assert ("jointly" in written) == (not only) == ("--only" not in written)
    names = sorted(p.name for p in (tmp_path / "out" / "cells").iterdir())
    assert names == ["calibrated-rounding-no-training.0.json", "jointly.0.json", "jointly.1.json"]
    both = [json.loads((tmp_path / "out" / "cells" / n).read_text())["kl"] for n in names[1:]]
    assert both[0] != both[1]
    assert "2 seeds" in written and f"--recipe {recipe}" in written


# ---------------------------------------------------------------- bad input


def test_settings_that_no_name_has() -> None:
    from dqw.study import table
    from dqw.study.runner import chosen

    joint = table.Setting("jointly", phases=table.JOINT)
    settings = [table.TEACHER, table.UNTRAINED, joint]
    assert chosen(settings, ()) == settings
    assert chosen(settings, ("no training",)) == settings[:2]
    assert chosen(settings, ("jointly", "no training")) == settings
    for texts in (("teacher",), ("jointly", "teacher")):
        with pytest.raises(UserError, match="'teacher' is in no setting's name: give a part of"):
            chosen(settings, texts)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("choose one of paper, matching", ["best"]),
        ("give 1 or more", ["grids", "--seeds", "0"]),
        ("give 1 or more", ["grids", "--limit", "0"]),
        ("--eval-data is missing", ["grids", "--data", "SPEECH"]),
        ("--data is missing", ["grids", "--eval-data", "SPEECH"]),
        ("no study's folder", ["sensitivity", "--out", "USED", "--eval-data", "SPEECH"]),
        ("like 4,4", ["matching", "--student-layers", "4", "--eval-data", "SPEECH"]),
        ("is not known", ["grids", "--recipe", "nice"]),
    ],
)
def test_bad_input_is_one_sentence(
    words: str, options: list[str], base: Path, speech: Path, tmp_path: Path
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("precious")
    given = {"SPEECH": str(speech), "USED": str(tmp_path / "used")}
    arguments = ["study", *(given.get(o, o) for o in options), "--model", str(base)]
    if "--out" not in options:
        arguments += ["--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "Traceback" not in result.output, result.output
    assert words in result.output and result.output.strip().startswith("Error: "), result.output
    assert torch.is_grad_enabled() and not (tmp_path / "out").exists()
