"""What a frozen encoder hears and the teacher says, worked out once and kept beside the run.

With `train.freeze_encoder` nothing before the student's decoder learns. If the windows are the same
in every epoch too (`augment.redraw = false`), the encoder's output and all that the teacher gives
are functions of the window: whisper-base then trains at 1.3 s a step of four windows instead of
9.5 s. One safetensors file a window (1.7 MB for base), whole or not there, so a killed run goes on
where it was. Windows are worked out one by one: what is kept does not depend on their order.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Dataset

from dqw.distill.config import DistillConfig, GuidanceConfig, TrainConfig
from dqw.distill.data import Collator, SpeechDataset
from dqw.distill.layers import LayerTap
from dqw.distill.model import Batch, DistillModel, forward_pass
from dqw.errors import UserError
from dqw.whisper.files import write_atomic

FOLDER = "states"


def obstacle(config: DistillConfig, guidance: GuidanceConfig, train: TrainConfig) -> str | None:
    """Why states cannot be kept under these settings, as the cure; None if they can."""
    if not train.freeze_encoder:
        return "set train.freeze_encoder = true"
    if config.augment.active and config.augment.redraw:
        return "set distill.augment.redraw = false"
    if config.spec_augment.active:
        return "leave out distill.spec_augment"
    if guidance.mode != "all":
        return "set guidance.mode = 'all'"
    return None


def keeps_states(config: DistillConfig, guidance: GuidanceConfig, train: TrainConfig) -> bool:
    """Whether a run keeps states. Raises UserError where they are asked for and cannot be kept."""
    cure = obstacle(config, guidance, train)
    if train.cache_states == "always" and cure is not None:
        raise UserError(f"train.cache_states = 'always' needs states that do not change: {cure}.")
    return train.cache_states != "never" and cure is None


class StatesDataset(Dataset[dict[str, Any]]):
    """The windows of a SpeechDataset as kept states and tokens; keys as there.

    An item has ids, labels, `heard` (source positions, width) float16, `taught` (labelled tokens,
    teacher width): the teacher's last decoder states, and `taught.J`: its layer J's (length, …).
    """

    def __init__(self, folder: Path, windows: int) -> None:
        self.folder, self.windows = folder, windows

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, key: int) -> dict[str, Any]:
        kept = load_file(_path(self.folder, key % self.windows))
        return {**kept, "ids": kept["ids"].tolist(), "labels": kept["labels"].tolist()}


def keep_states(
    dataset: SpeechDataset,
    pupil: DistillModel,
    teacher: Any,
    folder: Path,
    content: str,
    autocast: torch.dtype | None,
    progress: Callable[[int, int], object],
) -> StatesDataset:
    """Work out the states of every window that `folder` lacks, and return them as a dataset.

    Args:
        pupil: the student with the encoder it will keep; teacher: in its own dtype, same device.
        content: what else the states depend on (data, augmentation); with other content, or
            another encoder, what the folder holds is thrown away.
        autocast: precision of the matrix products, or None.
        progress: called with (done, windows).
    """
    fingerprint = _fingerprint(pupil, content)
    mark = folder / "made_from.json"
    if not mark.exists() or json.loads(mark.read_text(encoding="utf-8")) != fingerprint:
        shutil.rmtree(folder, ignore_errors=True)
        write_atomic(mark, json.dumps(fingerprint))
    pupil.eval()
    teacher.eval()
    collate = Collator(pad=dataset.encoder.end)
    taps = {s: LayerTap(teacher, s, pupil.kind) for s in pupil.stacks}
    wanted = {s: set(range(pupil.teacher_depth[s])) for s in pupil.stacks}
    device = next(pupil.parameters()).device
    for index in range(len(dataset)):
        path = _path(folder, index)
        if path.exists():
            continue
        item = dataset[index]  # outside autocast: the mel filters must not run in bf16
        inputs = {name: value.to(device) for name, value in collate([item]).items()}
        batch = Batch.of(inputs)
        with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            heard = pupil.student.model.encoder(batch.features).last_hidden_state[0]
            features = batch.teacher_features.to(teacher.dtype)
            last, states = forward_pass(teacher, features, batch, taps, wanted)
        tensors = {"heard": heard.half(), "taught": last}
        tensors |= {f"taught.{j}": state for j, state in states.get("decoder", {}).items()}
        tensors |= {"ids": torch.tensor(item["ids"]), "labels": torch.tensor(item["labels"])}
        _write(path, {name: t.cpu().contiguous() for name, t in tensors.items()})
        progress(index + 1, len(dataset))
    return StatesDataset(folder, len(dataset))


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:07}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        write_atomic(path, [save(tensors)])
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot take another window ({error.strerror}): free some space and "
            "resume, or set train.cache_states = 'never'."
        ) from error


def _fingerprint(pupil: DistillModel, content: str) -> dict[str, str]:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(pupil.student.model.encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {"content": content, "encoder": digest.hexdigest()}
