"""KL from the teacher: the formula, what it is paired with, and what `dqw eval --teacher` says."""

import copy
import json

import pytest
import torch
from typer.testing import CliRunner
from whisper_helpers import save_tiny, tiny, write_tone

import dqw
from dqw.cli import app
from dqw.distill.pair import Pair
from dqw.errors import UserError
from dqw.recipe import QuantConfig, Recipe
from dqw.speech import clip_batches
from dqw.whisper.data import Item
from dqw.whisper.divergence import divergence


@pytest.fixture
def pair(tmp_path):
    torch.manual_seed(0)
    teacher, processor = tiny(tmp_path / "teacher")
    student = copy.deepcopy(teacher)
    dqw.quantize(student, Recipe(quant=QuantConfig(bits=3, embedding_bits=3, group_size=16)))
    return Pair(teacher.eval(), student.eval(), processor, processor)


@pytest.fixture
def clips(tmp_path):
    return [
        Item("one", write_tone(tmp_path / "a.wav", 0.5), "good morning", "en", 0.5),
        Item("two", write_tone(tmp_path / "b.wav", 0.8), "guten Tag", None, 0.8),
        Item("long", write_tone(tmp_path / "c.wav", 31.0), "too long", "en", 31.0),
    ]


def test_the_sum_over_tokens_of_both_models_logits(pair, clips):
    done = []
    found = divergence(pair, clips, ["en", "de", "en"], done.append)
    total = tokens = 0
    named = [clips[0], Item("two", clips[1].audio, clips[1].text, "de", 0.8)]
    for batch in clip_batches(named, Recipe(), pair, print):
        inputs = {k: batch[k] for k in ("input_features", "decoder_input_ids")}
        with torch.no_grad():
            p, q = (m(**inputs).logits.double().log_softmax(-1) for m in pair[:2])
        total += float((p.exp() * (p - q)).sum())
        tokens += p.shape[1]
    assert (found.tokens, found.clips, done) == (tokens, 2, [1, 2])
    assert found.kl == pytest.approx(total / tokens, rel=1e-4) and found.kl > 0
    assert found.low <= found.kl <= found.high


def test_a_model_is_no_distance_from_itself(pair, clips):
    found = divergence(pair._replace(student=pair.teacher), clips[:1], [None])
    assert found.kl == pytest.approx(0, abs=1e-6) and found.kl >= 0


def test_only_long_clips(pair, clips):
    with pytest.raises(UserError, match=r"no clip is left .longer than"):
        divergence(pair, clips[2:], [None])


def test_eval_prints_and_stores_it(tmp_path):
    torch.manual_seed(0)
    save_tiny(tmp_path / "teacher")
    torch.manual_seed(1)
    save_tiny(tmp_path / "student")
    write_tone(tmp_path / "a.wav", 0.5)
    manifest, figures = tmp_path / "manifest.jsonl", tmp_path / "figures.json"
    manifest.write_text(json.dumps({"audio": "a.wav", "text": "good morning", "language": "en"}))

    def evaluate(*more):
        words = ["eval", "--model", tmp_path / "student", "--data", manifest,
                 "--teacher", tmp_path / "teacher", *more]  # fmt: skip
        return CliRunner().invoke(app, [str(word) for word in words])

    out = evaluate("--json", figures)
    assert out.exit_code == 0 and "KL from the teacher: " in out.stdout
    assert "(one clip: no interval; " in out.stdout
    stored = json.loads(figures.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert stored["kl"]["interval"] is None
    assert stored["kl"]["clips"] == 1 and stored["kl"]["nats_per_token"] >= 0
    assert stored["teacher"].endswith("teacher")
    manifest.write_text(json.dumps({"audio": "b.wav", "text": "too long", "language": "en"}))
    write_tone(tmp_path / "b.wav", 31.0)
    out = evaluate("--json", figures)  # what can be measured is
    assert out.exit_code == 0 and "KL not measured: no clip is left" in out.stderr
    assert "WER" in out.stdout and "kl" not in json.loads(figures.read_text())
    other = evaluate("--engine", "whisper.cpp")
    assert other.exit_code == 1 and "leave one out" in other.stderr
