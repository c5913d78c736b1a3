"""One step's forward pass: student and teacher on the same batch, all losses from that one pass.

`DistillModel` is the module the trainer wraps and optimizes: the student and the projections, so
that data-parallel training reduces both. The teacher is outside it and never gets a gradient.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqw.attention import native_attention
from dqw.distill.config import DistillConfig
from dqw.distill.layers import STACKS, LayerTap, stack_layers
from dqw.distill.losses import IGNORE, ProjectionBank, hidden_loss, pairwise_costs, token_losses
from dqw.distill.matching import Matching, match, needs_costs
from dqw.processes import mean
from dqw.whisper.context import narrowed

States = dict[str, dict[int, Tensor]]
FRAMES_A_SECOND = 100


@dataclass
class Batch:
    """The tensors of one micro-batch, and which of its positions count.

    Attributes:
        features: (batch, mel, 3000) for the student; teacher_features the same for the teacher.
            Empty where the frozen encoder's output was kept instead.
        ids: (batch, length) int64 decoder inputs.
        labels: (tokens,) int64 of the positions with a label; token_rows their flat places.
        decoder_rows: flat places of the decoder positions that are not padding.
        heard: (batch, source positions, width), the frozen encoder's output, if it was kept.
        taught: the teacher's rows, if they were kept: last decoder states of the labelled
            positions under −1, of layer J at all decoder rows under J.
        seconds: (batch,) of the clips, without padding; None where features were not made.
        positions: what the student's encoder is given of the source positions; None: all.
    """

    features: Tensor
    teacher_features: Tensor
    ids: Tensor
    labels: Tensor
    token_rows: Tensor
    decoder_rows: Tensor
    heard: Tensor | None = None
    taught: dict[int, Tensor] | None = None
    seconds: Tensor | None = None
    positions: int | None = None

    @classmethod
    def of(cls, inputs: dict[str, Tensor]) -> Batch:
        flat = inputs["labels"].reshape(-1)
        token_rows = (flat != IGNORE).nonzero().squeeze(1)
        heard = inputs.get("heard")
        taught = None
        if "taught" in inputs:
            taught = {-1: inputs["taught"]}
            taught |= {int(n[7:]): t for n, t in inputs.items() if n.startswith("taught.")}
        features = inputs["input_features"] if heard is None else heard.new_empty(0)
        return cls(
            features=features,
            teacher_features=inputs.get("teacher_features", features),
            ids=inputs["decoder_input_ids"],
            labels=flat.index_select(0, token_rows),
            token_rows=token_rows,
            decoder_rows=inputs["decoder_mask"].reshape(-1).nonzero().squeeze(1),
            heard=heard,
            taught=taught,
            seconds=inputs.get("seconds"),
        )

    @property
    def longest(self) -> float:
        """Seconds of the longest clip."""
        return 0.0 if self.seconds is None else float(self.seconds.max())

    def spoken(self) -> Tensor | None:
        """(batch, frames) int64: 1 where a clip is, 0 where padding is."""
        if self.seconds is None:
            return None
        frames = torch.arange(self.features.shape[-1], device=self.seconds.device)
        return (frames < self.seconds[:, None] * FRAMES_A_SECOND).long()

    def head(self, clips: int) -> Batch:
        """The first `clips` clips."""
        cut = clips * self.ids.shape[1]
        keep, rows = self.token_rows < cut, self.decoder_rows < cut
        taught = None
        if self.taught is not None:
            taught = {j: t[keep if j < 0 else rows] for j, t in self.taught.items()}
        return Batch(
            self.features[:clips],
            self.teacher_features[:clips],
            self.ids[:clips],
            self.labels[keep],
            self.token_rows[keep],
            self.decoder_rows[rows],
            heard=None if self.heard is None else self.heard[:clips],
            taught=taught,
        )


@dataclass
class TeacherOutput:
    """What the teacher says to a batch: logits (tokens, vocabulary), states as flat rows."""

    logits: Tensor | None
    states: States


@dataclass
class StepLosses:
    """Losses of one micro-batch. `tokens` (weighted), `ce` and `kl` are sums over `count` tokens,
    `hidden` is a mean over layers, `per_layer` maps encoder.3 to its hidden loss, `matching` is
    the one that was used."""

    tokens: Tensor
    hidden: Tensor
    ce: Tensor
    kl: Tensor
    count: int
    per_layer: dict[str, Tensor]
    matching: dict[str, Matching]


def forward_pass(
    model: Any,
    features: Tensor,
    batch: Batch,
    taps: dict[str, LayerTap],
    wanted: dict[str, set[int]],
) -> tuple[Tensor, States]:
    """Last decoder states at the labelled positions (tokens, width), and the tapped layers' rows.

    Encoder and decoder are called on their own: no cache is built, and the projection to the
    vocabulary is left to the caller, who applies it to the positions that count. `features` may be
    shorter than the model's window; encoder rows are those of `batch.positions`.
    """
    with ExitStack() as opened:
        seen = {s: opened.enter_context(tap.open(wanted[s])) for s, tap in taps.items()}
        heard = batch.heard
        if heard is None:
            with narrowed(model.model.encoder, features.shape[-1] // 2):
                heard = model.model.encoder(features).last_hidden_state
        last = model.model.decoder(
            input_ids=batch.ids, encoder_hidden_states=heard, use_cache=False
        ).last_hidden_state
    rows = last.flatten(0, 1).index_select(0, batch.token_rows)
    states: States = {}
    for stack, layers in seen.items():
        cut = batch.positions if stack == "encoder" else None
        flat = {index: state[:, :cut].flatten(0, 1) for index, state in layers.items()}
        if stack == "decoder":
            flat = {i: state.index_select(0, batch.decoder_rows) for i, state in flat.items()}
        states[stack] = flat
    return rows, states


class DistillModel(nn.Module):
    """Student and projections; its forward pass gives the losses of a micro-batch.

    Raises ValueError if no stack can be distilled although the configuration asks for it.
    """

    def __init__(self, student: Any, teacher: Any, config: DistillConfig) -> None:
        super().__init__()
        self.student = student
        self.settings = config
        self.kind = "ffn" if config.hidden_loss == "ffn" else "states"
        self.depth = {s: len(stack_layers(student, s)) for s in STACKS}
        self.teacher_width = int(teacher.config.d_model)
        self.teacher_depth = {s: len(stack_layers(teacher, s)) for s in STACKS}
        self.widths = {
            s: (_width(teacher, s, self.kind), _width(student, s, self.kind)) for s in STACKS
        }
        self.stacks = tuple(s for s in STACKS if self._distilled(s))
        self.taps = {s: LayerTap(student, s, self.kind) for s in self.stacks}
        self.projections = nn.ModuleDict()
        for stack in self.stacks:
            wide, narrow = self.widths[stack]
            if wide != narrow:
                self.projections[stack] = ProjectionBank(
                    wide, narrow, self.teacher_depth[stack], config.projection
                )

    @property
    def config(self) -> Any:
        return self.student.config

    @property
    def encoder_learns(self) -> bool:
        return any(p.requires_grad for p in self.student.model.encoder.parameters())

    def _distilled(self, stack: str) -> bool:
        """Whether the hidden states of `stack` can and shall be compared."""
        if not self.settings.uses_hidden:
            return False
        if stack == "encoder":
            if not self.encoder_learns:
                return False
            if self.settings.encoder_states == "auto":
                return self.widths[stack][0] == self.widths[stack][1]
            return self.settings.encoder_states == "always"
        return True

    def projected(self, stack: str, state: Tensor, layer: int) -> Tensor:
        """Teacher rows in the student's width."""
        return self.projections[stack](state, layer) if stack in self.projections else state

    def costs(self, student: States, teacher: States, stack: str) -> Tensor:
        """Pairwise hidden losses (L_S, L_T) of `stack`, without gradients."""
        with torch.no_grad():
            learned = [student[stack][i].detach() for i in range(self.depth[stack])]
            rows = learned[0].shape[0]
            stride = max(-(-rows // self.settings.matching_rows), 1)
            targets = [
                self.projected(stack, teacher[stack][j][::stride], j)
                for j in range(self.teacher_depth[stack])
            ]
        costs = pairwise_costs(
            [state[::stride] for state in learned],
            targets,
            self.settings.hidden_loss,
            self.settings.hidden_temperature,
        )
        return mean(costs)  # so that all processes match alike

    def find_matching(self, student: States, teacher: States, stack: str) -> Matching:
        if not needs_costs(self.settings.matching):
            return self.static_matching(stack)
        return match(self.settings.matching, self.costs(student, teacher, stack))

    def static_matching(self, stack: str) -> Matching:
        return match(
            self.settings.matching, torch.zeros(self.depth[stack], self.teacher_depth[stack])
        )

    def layer_loss(self, student: States, teacher: States, stack: str, i: int, j: int) -> Tensor:
        """The hidden loss between student layer `i` and teacher layer `j`."""
        target = self.projected(stack, teacher[stack][j], j)
        return hidden_loss(
            student[stack][i], target, self.settings.hidden_loss, self.settings.hidden_temperature
        )

    def forward(
        self,
        features: Tensor,
        batch: Batch,
        teacher: TeacherOutput,
        matching: dict[str, Matching],
        distilled: dict[str, list[int]],
    ) -> StepLosses:
        """Losses of one micro-batch.

        Args:
            features: (batch, mel, 3000 or 2 · batch.positions) for the student, masked or not.
            matching: per stack; a stack that it lacks is matched here, from this batch's losses.
            distilled: per stack the student layers that have a hidden loss.
        """
        # In one order: processes put their costs together.
        open_matching = [s for s in self.stacks if s not in matching]
        wanted = {
            s: set(range(self.depth[s])) if s in open_matching else set(distilled[s])
            for s in self.stacks
        }
        rows, states = forward_pass(self.student, features, batch, self.taps, wanted)
        found = {s: self.find_matching(states, teacher.states, s) for s in open_matching}
        matching = {s: found[s] if s in found else matching[s] for s in self.stacks}
        config = self.settings
        tokens, ce, kl = token_losses(
            vocabulary_logits(self.student, rows),
            teacher.logits,
            batch.labels,
            ce_weight=config.ce,
            kl_weight=config.kl if teacher.logits is not None else 0.0,
            temperature=config.temperature,
        )
        per_layer = {
            f"{stack}.{i}": self.layer_loss(states, teacher.states, stack, i, matching[stack][i])
            for stack in self.stacks
            for i in distilled[stack]
        }
        hidden = torch.stack(list(per_layer.values())).mean() if per_layer else tokens.new_zeros(())
        detached = {name: loss.detach() for name, loss in per_layer.items()}
        return StepLosses(tokens, hidden, ce, kl, batch.labels.numel(), detached, matching)


def vocabulary_logits(model: Any, rows: Tensor) -> Tensor:
    """Float32 logits (tokens, vocabulary), whatever the precision of the rest.

    bfloat16 logits would be wrong by up to 0.06 at the size they have (about 20), which is more
    than what a KL late in training is about. The rows are few, so float32 costs little here.
    """
    with torch.autocast(rows.device.type, enabled=False):
        projection = model.proj_out
        if isinstance(projection, nn.Linear) and projection.weight.dtype != torch.float32:
            return nn.functional.linear(rows.float(), projection.weight.float())
        logits: Tensor = projection(rows.float())
    return logits


@torch.no_grad()
def teacher_pass(
    teacher: Any, features: Tensor, batch: Batch, taps: dict[str, LayerTap],
    wanted: dict[str, set[int]], logits: bool,
) -> TeacherOutput:  # fmt: skip
    """The frozen teacher on a batch, in its own dtype, without a graph."""
    with native_attention(teacher):
        rows, states = forward_pass(teacher, features.to(teacher.dtype), batch, taps, wanted)
    return TeacherOutput(vocabulary_logits(teacher, rows) if logits else None, states)


@torch.no_grad()
def teacher_recalled(
    teacher: Any, batch: Batch, wanted: dict[str, set[int]], logits: bool
) -> TeacherOutput:
    """The same from kept rows."""
    assert batch.taught is not None
    states = {s: {j: batch.taught[j] for j in layers} for s, layers in wanted.items()}
    return TeacherOutput(vocabulary_logits(teacher, batch.taught[-1]) if logits else None, states)


def _width(model: Any, stack: str, kind: str) -> int:
    if kind == "states":
        return int(model.config.d_model)
    return int(getattr(model.config, f"{stack}_ffn_dim"))
