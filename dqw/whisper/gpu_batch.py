"""What a GPU keeps of sequences that are decoded together; ``gpu`` decodes them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dqw.whisper import gpu_steps
from dqw.whisper.capture import Captures
from dqw.whisper.decoding import Rules


@dataclass(frozen=True)
class Shape:
    """Of a decoder: layers, heads, width, tokens of a sequence, positions of audio, vocabulary."""

    layers: int
    heads: int
    width: int
    positions: int
    audio: int
    vocabulary: int


class Batch:
    """The memory of ``rows`` sequences that are decoded together, and the graph of their step.

    heard: whose keys and values ``cross`` has, if the next call may ask for them again."""

    def __init__(self, like: Tensor, rows: int, shape: Shape) -> None:
        """like: has the device and the dtype of keys and values."""
        here, s = like.device, shape
        self.rows = rows
        self.tokens = torch.zeros(rows, s.positions + 1, dtype=torch.long, device=here)
        self.state = torch.zeros(gpu_steps.STATE, dtype=torch.long, device=here)
        self.bans = torch.zeros(s.vocabulary, dtype=torch.uint8, device=here)
        self.cache = like.new_zeros(s.layers, 2, rows, s.positions, s.width)
        self.cross = like.new_zeros(s.layers, 2, rows, s.audio, s.width)
        self.scratch = gpu_steps.audio_scratch(rows, s.width, s.heads, here)
        self.votes = gpu_steps.choice_scratch(rows, s.vocabulary, here)
        self.logits: Tensor | None = None
        self.graph: Any = None  # its first step, before any audio, is of NaN: nothing reads it
        self.hearings = Captures()
        self.heard: tuple[weakref.ref, int] | None = None
        self.positions = 0  # of the audio

    def start(
        self, prompt: Tensor | None = None, rules: Rules | None = None, bans: Tensor | None = None
    ) -> None:
        """The next step reads the first token: of ``prompt``, or of what is put in ``tokens`` by
        someone who chooses them (no rules)."""
        last, room = self.bans.numel() - 1, self.tokens.shape[1]
        state = [0] * gpu_steps.STATE
        state[gpu_steps.HEARD], state[gpu_steps.BEGIN] = self.positions, room + 1
        if prompt is not None and rules is not None and bans is not None:
            state[gpu_steps.BEGIN], state[gpu_steps.TIMES] = rules.begin, int(rules.timestamps)
            latest = last if rules.latest is None else rules.first_timestamp + rules.latest
            state[gpu_steps.LATEST] = min(latest, last)
            state[gpu_steps.END], state[gpu_steps.TIME] = rules.end, rules.first_timestamp
            self.bans.copy_(bans)
            self.tokens[:, : rules.begin] = prompt[-1:]
            self.tokens[: len(prompt), : rules.begin] = prompt
        self.state.copy_(torch.tensor(state))
