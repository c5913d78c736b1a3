"""Error rates against counts made by hand."""

import math

import pytest

from dqw.whisper.scoring import Normalizers, score


def test_english_words_counted_by_hand():
    scores = score(
        ["the cat sat on the mat", "Hello, world!"],
        ["the cat sit on mat", "hello big world"],
        ["en", "en"],
    )
    rate = scores.languages["en"]
    assert (rate.substitutions, rate.deletions, rate.insertions, rate.units) == (1, 1, 1, 8)
    assert (rate.metric, rate.clips, rate.errors, rate.rate) == ("WER", 2, 3, 3 / 8)
    assert scores.wer == rate and scores.cer is None


def test_japanese_characters_without_spaces_and_marks():
    scores = score(["はい、 ガンダム です。"], ["はい カンダムです"], ["ja"])
    rate = scores.languages["ja"]
    assert (rate.metric, rate.substitutions, rate.errors, rate.units) == ("CER", 1, 1, 8)
    assert scores.wer is None and scores.cer == rate


def test_rates_are_of_the_corpus_and_not_means_of_clips():
    scores = score(["a b c d e f g h i j", "x"], ["a b c d e f g h i j", "y"], ["de", "de"])
    assert scores.languages["de"].rate == 1 / 11


def test_languages_apart_and_together():
    references = ["eins zwei", "un deux trois", "你好", "x y"]
    hypotheses = ["eins zwo", "un deux", "你好吗", "x"]
    scores = score(references, hypotheses, ["de", "fr", "zh", None])
    assert {code: rate.errors for code, rate in scores.languages.items()} == {
        "de": 1, "fr": 1, "zh": 1, "?": 1,
    }  # fmt: skip
    assert scores.wer and scores.cer
    assert (scores.wer.errors, scores.wer.units, scores.wer.clips) == (3, 7, 3)
    assert (scores.cer.insertions, scores.cer.units) == (1, 2)
    assert (scores.errors, scores.units) == (4, 9)
    figures = scores.to_dict()
    assert figures["overall"]["WER"]["percent"] == 42.86
    assert figures["languages"]["zh"]["units"] == 2


def test_empty_references_are_dropped_and_counted():
    scores = score(["[music]", "ja"], ["what", ""], ["de", "de"])
    rate = scores.languages["de"]
    assert (rate.empty, rate.clips, rate.deletions, rate.units, rate.insertions) == (1, 1, 1, 1, 0)
    nothing = score(["..."], ["x"], ["de"]).languages["de"]
    assert nothing.units == 0 and math.isnan(nothing.rate)
    assert nothing.to_dict()["percent"] is None


def test_insertions_can_pass_a_hundred_percent():
    rate = score(["hi"], ["hi hi hi hi"], ["en"]).languages["en"]
    assert (rate.insertions, rate.rate) == (3, 3.0)


def test_one_clip_tells_no_interval():
    rate = score(["a b c"], ["a b d"], ["de"]).languages["de"]
    assert rate.errors == 1 and rate.low != rate.low and rate.high != rate.high


def test_intervals_are_seeded_and_hold_the_rate():
    references = ["a b c d"] * 30
    hypotheses = ["a b c d", "a b x d", "x"] * 10
    first = score(references, hypotheses, ["de"] * 30).languages["de"]
    again = score(references, hypotheses, ["de"] * 30).languages["de"]
    assert first == again
    assert first.low < first.rate < first.high
    # the exact standard deviation of the mean of clip rates 0, 1/4, 1 over 30 clips
    deviation = (sum((x - 5 / 12) ** 2 for x in (0, 0.25, 1)) / 3 / 30) ** 0.5
    assert first.high - first.low == pytest.approx(2 * 1.96 * deviation, rel=0.15)
    assert score(references, hypotheses, ["de"] * 30, seed=1).languages["de"].low != first.low
    same = score(["a"] * 5, ["a"] * 5, ["de"] * 5).languages["de"]
    assert (same.low, same.high) == (0.0, 0.0)


def test_normalizers():
    normalize = Normalizers({"colour": "color"})
    text = "Um, Mr. Smith's colour cost $20.5 million (laughs)"
    assert normalize(text, "en") == "mister smith is color cost $20500000"
    assert Normalizers()("Colour", "en") == "colour"
    assert normalize("Ça, c'est très—bien!", "fr") == "ça c est très bien"
    assert normalize("データー ＡＢＣで１２３円", "ja") == "データーabcで123円"
    # Whisper's rule, with what it costs: marks that don't join with their letter are gone
    assert normalize("ที่นี่", "th") == "ทน" and normalize("हिन्दी", "hi") == "ह न द"
