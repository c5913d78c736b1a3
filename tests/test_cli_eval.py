"""dqw eval: what it prints and writes."""

import importlib.metadata
import json

import pytest
from test_cli import dqw_
from whisper_helpers import save_tiny, write_tone

import dqw
from dqw.cli_eval import _machine
from dqw.whisper.evaluate import Evaluation
from dqw.whisper.scoring import Rate, Scores
from dqw.whisper.tables import print_scores


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("eval") / "model")


@pytest.fixture
def audio(tmp_path):
    return [write_tone(tmp_path / "a.wav", 0.5), write_tone(tmp_path / "b.flac", 0.8, 8_000)]


def test_tables_keep_their_columns_where_no_terminal_is(capsys):
    rate = Rate("WER", 10_000, 12_345, 12_345, 123_456, 12_345, 0, 0.1, 0.2)
    scores = Scores({"en": rate}, rate, None)
    print_scores(Evaluation([], scores, [], 1.0, 1.0), True)
    printed = capsys.readouterr().out
    assert "all words" in printed and "…" not in printed and "10.00 to 20.00" in printed


def test_eval_prints_counts_and_writes_figures(model, audio, tmp_path):
    rows = [
        {"id": "one", "audio": "a.wav", "text": "good morning", "language": "en"},
        {"id": "two", "audio": "b.flac", "text": "はい。", "language": "ja"},
        {"id": "three", "audio": "a.wav", "text": None, "language": "ja"},
    ]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures, saved = tmp_path / "figures.json", tmp_path / "saved.jsonl"
    result = dqw_(
        "eval", "--model", model, "--data", manifest, "--json", figures,
        "--save-transcripts", saved,
    )  # fmt: skip
    assert result.exit_code == 0
    for word in ("en", "ja", "WER", "CER", "95 % interval", "all words", "× real time"):
        assert word in result.stdout, word
    assert "no normalizer.json" in result.stdout
    stored = json.loads(figures.read_text())
    assert stored["languages"]["en"]["units"] == 2 and stored["languages"]["ja"]["units"] == 2
    assert "1 of 3 clips are left out, as they have no text" in result.stderr
    assert stored["clips"] == 2 and stored["versions"]["dqw"] == dqw.__version__
    lines = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [(row["id"], row["reference"]) for row in lines] == [
        ("one", "good morning"),
        ("two", "はい。"),
    ]
    only = dqw_("eval", "--model", model, "--data", manifest, "--language", "ja", "--limit", 1)
    assert only.exit_code == 0 and "WER" not in only.stdout


def test_eval_scores_what_is_not_damaged(model, audio, tmp_path):
    cut = write_tone(tmp_path / "cut.flac", 5.0)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    rows = [{"audio": name, "text": "hello", "language": "en"} for name in ("cut.flac", "a.wav")]
    manifest, figures, saved = (tmp_path / f"{name}.jsonl" for name in ("data", "json", "saved"))
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = dqw_(
        "eval", "--model", model, "--data", manifest, "--json", figures,
        "--save-transcripts", saved, "--teacher", model,
    )  # fmt: skip
    assert result.exit_code == 1 and "1 clips are damaged, and not in" in result.stderr, (
        result.output
    )
    assert "cut.flac is corrupt or cut off" in result.stderr and "the others go on" in result.stderr
    stored = json.loads(figures.read_text())
    assert stored["clips"] == 1 and stored["kl"]["nats_per_token"] == pytest.approx(0, abs=1e-5)
    assert [json.loads(line)["id"] for line in saved.read_text().splitlines()] == ["a"]
    manifest.write_text(json.dumps(rows[0]) + "\n")
    result = dqw_("eval", "--model", model, "--data", manifest)
    assert result.exit_code == 1 and "corrupt or cut off" in result.stderr


def test_figures_are_written_from_a_checkout_that_was_not_installed(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "dqw":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    for package in ("dqw", "jiwer"):
        versions = _machine(package)["versions"]
        assert list(versions) == list(dict.fromkeys(("dqw", "torch", "transformers", package)))
        assert versions["dqw"] == dqw.__version__
