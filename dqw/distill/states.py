"""What a frozen encoder hears and the teacher says, worked out once and kept beside the run.

If the windows are the same in every epoch (`augment.redraw = false`), all that the teacher says is
a function of the window: two thirds of a step on short clips (`audio_context = "dynamic"`). With
`train.freeze_encoder` nothing before the student's decoder learns, so the encoder's output is kept,
too: whisper-base then trains at 1.3 s a step of four windows instead of 9.5 s.

    states/HASH/0000017.safetensors    a window: 1.7 MB for base, 0.1 MB of the teacher's alone

HASH is of all that the states depend on, so runs that differ in nothing of it can share a folder.
A file is whole or not there, so a killed run goes on where it was. Windows are worked out one by
one: what is kept does not depend on their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Dataset

from dqw.attention import native_attention
from dqw.digest import weights_digest
from dqw.distill.config import DistillConfig, GuidanceConfig, TrainConfig
from dqw.distill.data import Collator, SpeechDataset
from dqw.distill.layers import LayerTap
from dqw.distill.model import Batch, DistillModel, forward_pass
from dqw.errors import UserError
from dqw.whisper.files import write_atomic

FOLDER = "states"


def obstacle(config: DistillConfig, guidance: GuidanceConfig, train: TrainConfig) -> str | None:
    """Why states cannot be kept under these settings, as the cure; None if they can."""
    if config.augment.active and config.augment.redraw:
        return "set distill.augment.redraw = false"
    if config.spec_augment.active:
        return "leave out distill.spec_augment"
    if guidance.mode != "all" and not (train.freeze_encoder and config.uses_hidden):
        # Elsewhere guidance probes, or chooses, layers of the encoder.
        return "set guidance.mode = 'all', or train.freeze_encoder = true and compare hidden states"
    if not train.freeze_encoder and config.uses_hidden and config.encoder_states != "never":
        # 3 MB a window and layer of base
        return "set train.freeze_encoder = true or distill.encoder_states = 'never'"
    return None


def keeps_states(config: DistillConfig, guidance: GuidanceConfig, train: TrainConfig) -> bool:
    """Whether a run keeps states. Raises UserError where they are asked for and cannot be kept."""
    cure = obstacle(config, guidance, train)
    if train.cache_states == "always" and cure is not None:
        raise UserError(f"train.cache_states = 'always' needs states that do not change: {cure}.")
    return train.cache_states != "never" and cure is None


def window_bytes(pupil: DistillModel) -> int:
    """About what a window's states take, with 100 tokens: see ``StatesDataset``."""
    student, width = pupil.student.config, pupil.teacher_width
    heard = 0 if pupil.encoder_learns else student.max_source_positions * student.d_model * 2
    if "decoder" in pupil.stacks:
        width += pupil.teacher_depth["decoder"] * pupil.widths["decoder"][0]
    return int(heard + 100 * width * 4)


class StatesDataset(Dataset[dict[str, Any]]):
    """The windows of a SpeechDataset as kept states and tokens; keys as there.

    An item has ids, labels, `taught` (labelled tokens, teacher width): the teacher's last decoder
    states, `taught.J`: its layer J's (length, …), and `heard` (source positions, width) float16, or
    what the window itself has where the encoder learns.
    """

    def __init__(self, folder: Path, windows: SpeechDataset, encoder_learns: bool) -> None:
        self.folder, self.windows, self.encoder_learns = folder, windows, encoder_learns

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def seconds(self) -> list[float]:
        return self.windows.seconds

    def __getitem__(self, key: int) -> dict[str, Any]:
        kept: dict[str, Any] = load_file(_path(self.folder, key % len(self)))
        kept |= {name: kept[name].tolist() for name in ("ids", "labels")}
        return {**self.windows[key], **kept} if self.encoder_learns else kept


def keep_states(
    dataset: SpeechDataset,
    keys: Iterable[int],
    pupil: DistillModel,
    teacher: Any,
    folder: Path,
    autocast: torch.dtype | None,
    progress: Callable[[int, int], object],
) -> StatesDataset:
    """Work out the states that `folder` lacks, and return them as a dataset.

    Args:
        keys: of `dataset`, those that will be asked for.
        pupil: the student, whose encoder is heard if it is frozen; teacher: in its own dtype, on
            the same device.
        folder: see ``states_folder``.
        autocast: precision of the matrix products, or None.
        progress: called with (done, windows).
    """
    pupil.eval()
    teacher.eval()
    collate = Collator(pad=dataset.encoder.end)
    taps = {s: LayerTap(teacher, s, pupil.kind) for s in pupil.stacks}
    wanted = {s: set(range(pupil.teacher_depth[s])) for s in pupil.stacks}
    device = next(pupil.parameters()).device
    windows = sorted({key % len(dataset) for key in keys})
    for done, index in enumerate(windows, 1):
        path = _path(folder, index)
        if path.exists():
            continue
        item = dataset[index]  # outside autocast: the mel filters must not run in bf16
        inputs = {name: value.to(device) for name, value in collate([item]).items()}
        batch = Batch.of(inputs)
        with (
            torch.no_grad(),
            torch.autocast(device.type, autocast, enabled=autocast is not None),
            native_attention(pupil, teacher),
        ):
            heard = {}
            if not pupil.encoder_learns:
                state = pupil.student.model.encoder(batch.features).last_hidden_state[0]
                heard = {"heard": state.half()}
            features = batch.teacher_features.to(teacher.dtype)
            last, states = forward_pass(teacher, features, batch, taps, wanted)
        tensors = {**heard, "taught": last}
        tensors |= {f"taught.{j}": state for j, state in states.get("decoder", {}).items()}
        tensors |= {"ids": torch.tensor(item["ids"]), "labels": torch.tensor(item["labels"])}
        _write(path, {name: t.cpu().contiguous() for name, t in tensors.items()})
        progress(done, len(windows))
    return StatesDataset(folder, dataset, pupil.encoder_learns)


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:07}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        write_atomic(path, [save(tensors)])
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot take another window ({error.strerror}): free some space and "
            "resume, or begin anew with train.cache_states = 'never'."
        ) from error


def states_folder(
    folder: Path, pupil: DistillModel, teacher: Any, content: str, autocast: torch.dtype | None
) -> Path:
    """Where in ``folder`` the states of these lie. content: what else they depend on (data,
    augmentation)."""
    heard = "" if pupil.encoder_learns else weights_digest(pupil.student.model.encoder)
    return folder / weights_digest(teacher, heard, content, autocast, pupil.stacks, pupil.kind)
