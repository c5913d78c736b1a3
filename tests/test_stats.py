"""Rates and their intervals: ties that are ties, seeds that count."""

from __future__ import annotations

import numpy as np
import pytest

from dqw.whisper.scoring import clip_counts, score
from dqw.whisper.stats import Rate, difference, rate, verdict


def cell(kl: list[tuple[float, int]], clips: list[tuple[str, int, int]] = [], seed: int = 0):  # noqa: B006
    return {"setting": "x", "seed": seed, "kl": kl, "clips": clips}


def test_a_difference_within_its_interval_is_a_tie() -> None:
    dice = np.random.default_rng(1)
    noise = dice.normal(1.0, 0.5, 60)
    same = rate([cell([(v, 10) for v in noise])], "KL")
    near = rate([cell([(v + e, 10) for v, e in zip(noise, dice.normal(0, 0.1, 60))])], "KL")
    far = rate([cell([(v + 0.1, 10) for v in noise])], "KL")
    assert same and near and far
    assert difference(near, same).tie
    # Far is beyond by less than the rates' own intervals: it is the pairing that tells.
    gap = difference(far, same)
    assert not gap.tie and gap.value == pytest.approx(0.01)
    assert far.value < same.interval[1]
    assert not difference(same, far).tie and difference(same, far).value < 0
    best, ties, worse = verdict({"same": same, "far": far, "again": same})
    assert (best, ties, worse) == ("same", ["again"], ["far"])


def test_many_that_are_alike_tie_with_the_least() -> None:
    """Of eight, each compared by itself, one would be called worse in every second try; of three
    seeds each, tails that replacement does not have would have it so in every third."""
    tries = 60
    for seeds, clips in ((1, 40), (1, 4), (3, 40)):
        wrong = 0
        for seed in range(tries):
            dice = np.random.default_rng(seed)
            rates = {}
            for k in range(8):
                shift = dice.normal(1, 0.05, seeds) if seeds > 1 else [1.0]
                noise = dice.normal(0, 0.5, clips) if seeds == 1 else np.zeros(clips)
                found = rate([cell([(m + v, 1) for v in noise]) for m in shift], "KL")
                assert found is not None
                rates[str(k)] = found
            wrong += bool(verdict(rates)[2])
        assert wrong <= 0.1 * tries, (seeds, clips, wrong)


def test_a_few_clips_tell_little_and_one_nothing() -> None:
    def of(values: list[float]) -> Rate:
        found = rate([cell([(v, 1) for v in values])], "KL")
        assert found is not None
        return found

    one = difference(of([1.0]), of([2.0]))
    assert one.tie and one.value == -1 and np.isnan(of([1.0]).interval).all()
    assert difference(of([1.0, 1.6]), of([2.0, 2.1])).tie  # one of two chances that both agree
    deviations = np.array([-1.0, -1.3, -0.8, -1.1])
    gap = difference(of(list(5 + deviations)), of([5.0] * 4))
    student = 3.182 * deviations.std(ddof=1) / 2
    assert not gap.tie and 0.93 * student < (gap.high - gap.low) / 2 < 1.07 * student


def test_rates_are_of_the_whole_corpus_and_know_words_from_characters() -> None:
    clips = [("en", 1, 4), ("en", 0, 16), ("ja", 3, 6), ("en", 9, 0)]
    words = rate([cell([(0.5, 1)], clips)], "WER")
    assert words and words.value == 0.05 and words.units == 20
    characters = rate([cell([(0.5, 1)], clips)], "CER", "ja")
    assert characters and characters.value == 0.5
    assert rate([cell([(0.5, 1)], clips)], "CER", "zh") is None


def test_seeds_widen_the_interval() -> None:
    kl = [(float(v), 10) for v in np.random.default_rng(0).normal(5, 1, 40)]
    other = [(v + 4, n) for v, n in kl]
    one = rate([cell(kl)], "KL")
    two = rate([cell(kl), cell(other, seed=1)], "KL")
    assert one and two and two.value == pytest.approx(one.value + 0.2)
    width = [high - low for low, high in (one.interval, two.interval)]
    assert width[1] > 2 * width[0]


def test_seeds_are_paired_and_their_interval_is_students() -> None:
    """Seeds move both settings alike; what is left is as sure as three values make it."""
    kl = np.full((40, 1), 50.0)  # no clip differs, so that seeds alone count

    def three(*values: float) -> Rate:
        cells = [cell([(float(k) * v, 10) for k in kl[:, 0]], seed=i) for i, v in enumerate(values)]
        found = rate(cells, "KL")
        assert found is not None
        return found

    first, second = three(0.9, 1.0, 1.4), three(1.0, 1.11, 1.5)
    gap = difference(first, second)
    assert not gap.tie and gap.value == pytest.approx(-0.5167, abs=1e-3)
    assert first.interval[1] > second.value  # alone they overlap
    deviations = np.array([-0.5, -0.55, -0.5])
    student = 4.303 * deviations.std(ddof=1) / np.sqrt(3)
    half = (gap.high - gap.low) / 2
    assert 0.93 * student < half < 1.07 * student
    assert difference(three(1.0, 1.0, 1.0), three(1.3, 1.02, 1.01)).tie


def test_clip_counts_are_what_score_adds_up() -> None:
    texts, heard, codes = ["a b c", "d e"], ["a x c", "d e f"], ["en", "en"]
    counts = clip_counts(texts, heard, codes)
    total = score(texts, heard, codes).wer
    assert total and total.errors == sum(int(row[:3].sum()) for row in counts) == 2
    assert [int(row[3]) for row in counts] == [3, 2]
