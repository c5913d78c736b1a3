"""Whisper checkpoints: a hub id, a Hugging Face folder, a faster-whisper folder or a packed one.

Only safetensors, JSON and CTranslate2's model.bin are read, never a pickle. What is wrong with a
folder (missing, cut off, edited) is said before the weights are loaded, in one sentence.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dqw.errors import UserError
from dqw.whisper.ct2 import is_ct2_folder, load_ct2
from dqw.whisper.tokenizer import prompt_ids

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COPY = "copy the folder again"
_hushing = threading.Lock()
_quiet, _loud = 0, (0, 0, False)  # blocks of quiet_transformers, and how it was before the first


def load_whisper(
    name_or_path: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """Model (eval mode, CPU) and processor of any checkpoint dqw knows.

    `name_or_path`: a Hugging Face folder or hub id, a faster-whisper (CTranslate2) folder, or a
    folder that `dqw compress` wrote. `dtype`: of the float weights; packed ones stay packed.
    Raises UserError for a missing or damaged folder and for a hub id that can't be had.
    """
    path = Path(name_or_path)
    if path.is_dir():
        if is_ct2_folder(path):
            return load_ct2(path, dtype)
        verify_folder(path)
    elif path.exists():
        raise UserError(f"{path} is a file; give the model's folder")
    elif path.is_absolute() or not _HUB_ID.fullmatch(str(name_or_path)):
        raise UserError(f"the model folder {path} does not exist; check the path")
    return _load_transformers(str(name_or_path), dtype, on_hub=not path.is_dir())


def verify_folder(folder: str | Path) -> dict[str, Any]:
    """Check a Hugging Face or packed folder without loading it; returns its config.json.

    Checked: the files are there, model.safetensors is as long as its header says, and, when
    config.json has quantization_config.weights_sha256, its bytes have that checksum.
    Raises UserError with the file and the cure.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "whisper":
        kind = config.get("model_type")
        raise UserError(f"{folder} holds a model of type {kind!r}; give a Whisper folder")
    for name in weight_files(folder):
        safetensors_header(folder / name)
    expected = (config.get("quantization_config") or {}).get("weights_sha256")
    if expected and file_sha256(folder / "model.safetensors") != expected:
        raise UserError(
            f"{folder / 'model.safetensors'} was changed after it was written (its sha256 is not "
            f"the one in config.json); {_COPY} or compress once more"
        )
    return config


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {dtype, shape, data_offsets} of a safetensors file; UserError if damaged."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; {_COPY}")
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        header = file.read(length) if 0 < length <= size - 8 else b""
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        needed = 8 + length + max(t["data_offsets"][1] for t in tensors.values())
    except (ValueError, AttributeError, KeyError, TypeError):
        raise UserError(
            f"{path} is cut off or damaged: its header can't be read; {_COPY}"
        ) from None
    if size != needed:
        fault = "is cut off" if size < needed else "has bytes too many"
        raise UserError(f"{path} {fault}: {size} bytes, and its header says {needed}; {_COPY}")
    return tensors


def file_sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_processor(processor: WhisperProcessor, folder: str | Path) -> None:
    """Write tokenizer and feature extractor, and the English spelling map that `save_pretrained`
    leaves out (without it, English would be scored by other rules after a reload)."""
    processor.save_pretrained(folder)
    spelling = getattr(processor.tokenizer, "english_spelling_normalizer", None)
    if spelling:
        text = json.dumps(spelling, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (Path(folder) / "normalizer.json").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Errors only, and no progress bars, from transformers and the hub within the block, and while
    another thread is within it."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    global _quiet, _loud
    with _hushing:
        if not _quiet:
            level, hub_level = logging.get_verbosity(), hub_logging.get_verbosity()
            _loud = level, hub_level, logging.is_progress_bar_enabled()
            logging.set_verbosity_error()
            hub_logging.set_verbosity_error()
            logging.disable_progress_bar()
        _quiet += 1
    try:
        yield
    finally:
        with _hushing:
            _quiet -= 1
            if not _quiet:
                logging.set_verbosity(_loud[0])
                hub_logging.set_verbosity(_loud[1])
                if _loud[2]:
                    logging.enable_progress_bar()


def weight_files(folder: Path) -> list[str]:
    if (folder / "model.safetensors.index.json").is_file():
        index = read_json(folder / "model.safetensors.index.json")
        return sorted(set(index.get("weight_map", {}).values()))
    if not (folder / "model.safetensors").is_file() and (folder / "pytorch_model.bin").is_file():
        raise UserError(
            f"{folder} holds its weights as a pickle (pytorch_model.bin), which dqw does not read; "
            "save it with save_pretrained in transformers 5, or take the safetensors version"
        )
    return ["model.safetensors"]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a model folder's JSON file. Raises UserError if there is none."""
    if not path.is_file():
        raise UserError(f"{path.parent} lacks {path.name}: it is no model folder; check the path")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); {_COPY}") from None
    if not isinstance(stored, dict):
        raise UserError(f"{path} holds no JSON object; {_COPY}")
    return stored


def _load_transformers(
    name: str, dtype: torch.dtype, on_hub: bool
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    import dqw  # noqa: F401  (registers the packed format with transformers)

    if not on_hub:
        _check_processor(Path(name))
    try:
        with quiet_transformers():
            loaded: Any = WhisperForConditionalGeneration.from_pretrained(
                name, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
            model, found = loaded
            processor = WhisperProcessor.from_pretrained(name)
    except UserError:
        raise
    except Exception as error:  # hub, JSON and tensor errors have no common base
        raise _explain(name, error, on_hub) from error
    faults = [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]
    if any(".quantizer." in fault for fault in faults):
        raise UserError(
            f"{name} holds a student that still learns: load its weights into one made by "
            "dqw.quantize, call dqw.freeze on it, and save that."
        )
    if faults:
        raise UserError(
            f"{name} does not hold the weights its config.json speaks of ({len(faults)} tensors "
            f"missing, unknown or of another shape, such as {faults[0]}); {_COPY}"
        )
    _modernize(model, processor)
    return model.eval(), processor


def _check_processor(folder: Path) -> None:
    """Raise UserError where a folder has weights alone, as ``model.save_pretrained`` leaves it."""
    parts = {
        "feature extractor": ("preprocessor_config.json", "processor_config.json"),
        "tokenizer": ("tokenizer.json", "vocab.json"),
    }
    for part, names in parts.items():
        if not any((folder / name).is_file() for name in names):
            raise UserError(
                f"{folder} lacks its {part} ({' or '.join(names)}); save the processor there, too "
                f"(processor.save_pretrained({str(folder)!r})), or {_COPY}"
            )


def _explain(name: str, error: Exception, on_hub: bool) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if on_hub:
        return UserError(
            f"{name} is neither a folder here nor a model that could be had from the hub "
            f"({reason}); check the name and the network"
        )
    return UserError(f"the model folder {name} could not be loaded ({reason}); {_COPY}")


def _modernize(model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
    """Before 2024 checkpoints forced decoder ids; language and task are settings today."""
    settings: Any = model.generation_config
    configs: list[Any] = [model.config, settings]
    # Those of config.json say nothing: OpenAI's own force English there.
    forced = dict(getattr(settings, "forced_decoder_ids", None) or [])
    # transformers heeds them only where neither task nor language is set.
    heeded = getattr(settings, "task", None) is None and getattr(settings, "language", None) is None
    for config in configs:
        if getattr(config, "forced_decoder_ids", None) is not None:
            config.forced_decoder_ids = None
    tasks = {token: task for task, token in (getattr(settings, "task_to_id", None) or {}).items()}
    if heeded and forced.get(2) in tasks:  # a fine-tune that translates
        settings.task = tasks[forced[2]]
    for name, value in prompt_ids(processor.tokenizer).items():
        if getattr(settings, name, None) is None:
            setattr(settings, name, value)
    spoken = forced.get(1)
    codes = {token: code for code, token in (getattr(settings, "lang_to_id", None) or {}).items()}
    if heeded and spoken in codes:  # a fine-tune of one language
        settings.language = codes[spoken]
