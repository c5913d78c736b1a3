"""The loop guard cuts loops and nothing else; suppressing tokens equals transformers' way."""

import pytest
import torch
from transformers.generation.logits_process import (
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from dqw.whisper.decoding import (
    LoopGuard,
    Rules,
    SuppressTokens,
    TimestampRules,
    cut_loop,
    loop_period,
)

TIME = 1000  # the first timestamp
SPEECH = [5, 9, 3, 7, 5, 9, 2, 8, 4, 6]


@pytest.mark.parametrize("period", [1, 2, 3, 7, 8, 20, 32])
def test_a_loop_is_found_and_one_copy_stays(period):
    piece = list(range(100, 100 + period))
    copies = max(4, -(-32 // period))
    loop = SPEECH + piece * copies + piece[: period // 2]
    assert loop_period(loop, TIME) == period
    assert cut_loop(loop, TIME) == SPEECH + piece


@pytest.mark.parametrize(
    "tokens",
    [
        [],
        SPEECH,
        SPEECH + [1] * 31,  # said often, but in less than 32 tokens
        SPEECH + list(range(100, 120)) * 3,  # a long sentence said three times
        [1] * 40 + SPEECH,  # a repetition that the decoder left by itself
        list(range(200)),
    ],
)
def test_speech_is_left_alone(tokens):
    assert loop_period(tokens, TIME) == 0
    assert cut_loop(tokens, TIME) == tokens


def test_growing_timestamps_do_not_hide_a_loop():
    loop = [token for i in range(12) for token in (TIME + 50 * i, 7, 8, TIME + 50 * i + 50)]
    assert loop_period(loop, TIME) == 4
    assert cut_loop(loop, TIME) == loop[:4]


def test_added_tokens_are_no_times():
    """A new language's pieces stand behind the times, and 32 of them are no loop."""
    added = [TIME + 1501 + i for i in range(40)]
    assert not loop_period(added, TIME) and cut_loop(added, TIME) == added
    assert loop_period([TIME + i for i in range(40)], TIME) == 1


def test_added_tokens_are_text_beside_times():
    first, end = 30, 20
    added = first + 1501
    rules = TimestampRules(first, end, None, begin=2)

    def possible(*said):
        scores = rules(torch.tensor([[1, 2, *said]]), torch.zeros(1, added + 3))[0]
        found = (scores > -torch.inf).nonzero().flatten().tolist()
        return {"text": 5 in found, "times": [t for t in found if first <= t < added],
                "added": added in found, "end": end in found}  # fmt: skip

    assert possible() == {
        "text": False,
        "times": list(range(30, 1531)),
        "added": False,
        "end": False,
    }
    after_pair = possible(first + 4, 5, first + 7, first + 7)
    assert after_pair["times"] == [] and after_pair["added"] and after_pair["text"]
    after_text = possible(first + 4, added)  # 0 each: times are likelier together
    assert after_text["times"][0] == first + 5 and not after_text["added"]
    closing = possible(first + 4, added, first + 7)
    assert closing["times"][0] == first + 7 and not closing["added"] and not closing["text"]


def test_the_guard_ends_looping_rows_only():
    guard = LoopGuard(end=0, first_timestamp=TIME)
    rows = torch.tensor([[9] * 8 + [1, 2] * 16, list(range(100, 140))])
    scores = torch.randn(2, 20)
    out = guard(rows, scores)
    assert out[0].argmax() == 0 and torch.isinf(out[0, 1:]).all()
    assert torch.equal(out[1], scores[1])
    assert torch.equal(guard(rows[:, :-1], scores), scores)  # looks at every eighth step


def test_suppressed_tokens_have_no_say_against_timestamps():
    """OpenAI's order, and transformers': else a weak word is taken where a time is due."""
    first, end = 30, 20
    rules = Rules(2, 40, end, first, always=(5,), timestamps=True)
    scores = torch.full((1, 60), 1e-4)
    scores[0, 5], scores[0, 7], scores[0, 40:] = 0.6, 0.06, 0.02  # times: 0.4 together
    scores = scores.log()
    said = torch.tensor([[1, 2, first, 3, 4]])
    for processor in rules.processors():
        scores = processor(said, scores)
    assert scores.argmax() >= first


@pytest.mark.parametrize("length", [3, 4, 5])
def test_suppressed_tokens_as_in_transformers(length):
    ids, scores = torch.ones(2, length, dtype=torch.long), torch.randn(2, 50)
    ours = SuppressTokens([1, 7], [3])
    ours.set_begin_index(4)
    theirs = SuppressTokensLogitsProcessor([1, 7])(ids, scores)
    theirs = SuppressTokensAtBeginLogitsProcessor([3], 4)(ids, theirs)
    assert torch.equal(ours(ids, scores), theirs)
    assert torch.equal(SuppressTokens([], [])(ids, scores), scores)
