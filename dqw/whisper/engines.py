"""What transcribing asks of a model, and the two ways to have it.

``NativeEngine`` reads a packed folder itself and imports no transformers: a third of the time to
the first word, half of the memory. ``PlainEngine`` is a model and processor of transformers, for
everything else: float models, layers that the kernels do not take, beams. Where a packed model is
covered both decode on the same native networks and give the same tokens: those of ``fast`` on a
CPU, CUDA graphs (``gpu``) on a GPU, which serve float models too.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from dqw.convert import choose_activations, quant_modules
from dqw.devices import lowered, move_to
from dqw.whisper.checkpoint import load_whisper, quiet_transformers, read_json, verify_folder
from dqw.whisper.context import AudioContext, narrowed
from dqw.whisper.coverage import encoder_uncovered, gpu_uncovered, uncovered
from dqw.whisper.fast import FastDecoder, fast_decoder, fast_encoder
from dqw.whisper.features import LogMel
from dqw.whisper.gpu import Graphs, graphs_of
from dqw.whisper.native import Skeleton, load
from dqw.whisper.tokenizer import Pieces

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

# Settings of generation that change which token comes next, and only ``generate`` knows.
_RULES = (
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias",
    "max_new_tokens", "min_new_tokens", "min_length",
)  # fmt: skip
_hearing = threading.Lock()  # ``narrowed`` and ``lowered`` change a model that threads may share


def own_rules(settings: Any) -> list[str]:
    """Those of ``_RULES`` that a checkpoint's generation settings have."""
    found = {name: getattr(settings, name, None) for name in _RULES}
    if found["repetition_penalty"] == 1.0:
        del found["repetition_penalty"]
    return [name for name, value in found.items() if value]


class Stepper(Protocol):
    """Sequences, one for each of an encoder's states, that grow by what is told."""

    def step(self, ids: Tensor) -> Tensor:
        """ids (sequences, new tokens) → logits (sequences, vocabulary) of the last."""


class Engine(Protocol):
    """settings: Whisper's generation settings (ids of special tokens, tokens to suppress …).
    positions: tokens a sequence may have. log_mel: makes the features of audio. context: how much
    the model learned to hear of a short clip; None: the whole window."""

    settings: Any
    positions: int
    log_mel: LogMel
    context: AudioContext | None

    def encode(self, features: Tensor) -> Tensor:
        """Features (clips, mels, frames) → states (clips, frames / 2, width). frames: even, at
        most those of the window."""

    def native(self) -> FastDecoder | Graphs | None:
        """The native decoder, or None where ``generate`` must do."""

    def session(self, states: Tensor, longest: int) -> AbstractContextManager[Stepper]:
        """The decoder a step at a time, for the length of the block; at most ``longest`` tokens. 1:
        the start alone, and the next call decodes the same ``states``."""

    def generate(self, states: Tensor, languages: Sequence[str | None], **options: Any) -> Tensor:
        """transformers' generate for one window; options are its own."""

    def text(self, tokens: list[int]) -> str:
        """Words; special tokens left out."""

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, without any before and after it."""


class PlainEngine:
    """A Whisper of transformers, float or packed, on any device."""

    def __init__(self, model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
        self.model, self.processor = model, processor
        self.settings: Any = model.generation_config
        # Suppressing is done by our own processors.
        self._bare: Any = copy.deepcopy(model.generation_config)
        self._bare.suppress_tokens = self._bare.begin_suppress_tokens = None
        self.positions: int = model.config.max_target_positions
        on_gpu = model.device.type == "cuda"
        self.log_mel = LogMel.of(processor.feature_extractor, str(model.device))
        self.context = AudioContext.of(model.config)
        # A float model stays exact: others are measured against it.
        self._rounds = not on_gpu and bool(quant_modules(model))
        self._graphs = graphs_of(model)

    def encode(self, features: Tensor) -> Tensor:
        if self._graphs is not None:
            return self._graphs.encode(features)
        encoder: Any = self.model.get_encoder()
        # Directly, as forward would keep its products in float32.
        native = fast_encoder(encoder) if self._native() else None
        if native is not None:
            return native(features, bf16=True)
        rounding = lowered(encoder) if self._rounds else nullcontext()
        with _hearing, rounding, narrowed(encoder, features.shape[-1] // 2):
            return encoder(features.to(self.model.device, self.model.dtype))[0]

    def native(self) -> FastDecoder | Graphs | None:
        return None if own_rules(self.settings) else self._native()

    def _native(self) -> FastDecoder | Graphs | None:
        if self._graphs is not None:
            return self._graphs
        from dqw.whisper.fast_model import native_decoder

        return native_decoder(self.model)

    def session(self, states: Tensor, longest: int) -> AbstractContextManager[Stepper]:
        native = self._native()
        if native is not None:  # which keeps what it heard, for the text
            return _session(native, states, longest)
        return nullcontext(_PlainStepper(self.model, states))

    def generate(self, states: Tensor, languages: Sequence[str | None], **options: Any) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        if getattr(self.settings, "is_multilingual", True):
            options["language"] = list(languages)
        encoded: Any = BaseModelOutput(last_hidden_state=states)
        generate: Any = self.model.generate
        with quiet_transformers():
            return generate(
                encoder_outputs=encoded,
                generation_config=self._bare,
                force_unique_generate_call=True,  # else trailing silence would be decoded, too
                **options,
            )

    def text(self, tokens: list[int]) -> str:
        tokenizer: Any = self.processor.tokenizer
        return tokenizer.decode(tokens, skip_special_tokens=True)

    def tokens(self, text: str) -> list[int]:
        tokenizer: Any = self.processor.tokenizer
        return tokenizer.encode(text, add_special_tokens=False)


class NativeEngine:
    """A packed folder on the native encoder and decoder, or on a GPU's; see ``open_engine``."""

    def __init__(
        self, model: Skeleton, settings: Any, log_mel: LogMel, pieces: Pieces, graphs: bool = False
    ) -> None:
        """graphs: decode as on a GPU, wherever ``model`` is."""
        self.model, self.settings = model, settings
        self.positions: int = model.config.max_target_positions
        self.log_mel, self.pieces = log_mel, pieces
        self.context = AudioContext.of(model.config)
        self._graphs = Graphs(model) if graphs else None

    def encode(self, features: Tensor) -> Tensor:
        if self._graphs is not None:
            return self._graphs.encode(features)
        encoder = fast_encoder(self.model.model.encoder)
        assert encoder is not None
        return encoder(features, bf16=True)

    def native(self) -> FastDecoder | Graphs | None:
        return fast_decoder(self.model) if self._graphs is None else self._graphs

    def session(self, states: Tensor, longest: int) -> AbstractContextManager[Stepper]:
        decoder = self.native()
        assert decoder is not None
        return _session(decoder, states, longest)

    def generate(self, states: Tensor, languages: Sequence[str | None], **options: Any) -> Tensor:
        raise NotImplementedError("beams need transformers' generate: take a PlainEngine")

    def text(self, tokens: list[int]) -> str:
        return self.pieces.text(tokens)

    def tokens(self, text: str) -> list[int]:
        return self.pieces.tokens(text)


@contextmanager
def _session(decoder: FastDecoder | Graphs, states: Tensor, longest: int) -> Iterator[Stepper]:
    # A GPU's session lasts until another call.
    with decoder.lock if isinstance(decoder, Graphs) else nullcontext():
        yield decoder.session(states, longest, bf16=True)


class _PlainStepper:
    """``Stepper`` of a model of transformers; what was told is told again at every step, as a cache
    has another name from version to version. Few windows take more than one."""

    def __init__(self, model: Any, states: Tensor) -> None:
        self.model, self.states = model, states
        self.ids = torch.empty(len(states), 0, dtype=torch.long, device=states.device)

    def step(self, ids: Tensor) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        self.ids = torch.cat([self.ids, ids.to(self.ids.device)], dim=1)
        encoded = BaseModelOutput(last_hidden_state=self.states)
        found = self.model(encoder_outputs=encoded, decoder_input_ids=self.ids, use_cache=False)
        return found.logits[:, -1]


def open_engine(
    name_or_path: str | Path, beam_size: int = 1, activations: str = "auto", device: str = "cpu"
) -> Engine:
    """The quickest engine for a checkpoint of any kind that ``load_whisper`` knows.

    activations: as in ``choose_activations``. Raises UserError as ``load_whisper``,
    ``choose_activations`` and ``move_to`` do, and for a damaged tokenizer.json,
    generation_config.json or processor_config.json.
    """
    folder = Path(name_or_path)
    if beam_size == 1 and folder.is_dir():
        native = _open_native(folder, activations, device)
        if native is not None:
            return native
    model, processor = load_whisper(name_or_path)
    choose_activations(model, activations, device)
    move_to(model, device)
    return PlainEngine(model, processor)


_NEEDED = ("model.safetensors", "generation_config.json", "tokenizer.json")
_SETTINGS = ("no_timestamps_token_id", "decoder_start_token_id", "eos_token_id", "is_multilingual")


def _open_native(folder: Path, activations: str, device: str) -> NativeEngine | None:
    """None for a folder that transformers has to read, or to find fault with."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        plan = (config.get("quantization_config") or {}).get("plan")
    except (OSError, ValueError, AttributeError):
        return None
    if not plan or not all((folder / name).is_file() for name in _NEEDED):
        return None
    settings = _settings(folder)
    extractor = _extractor(folder)
    if settings is None or extractor is None:
        return None
    verify_folder(folder)
    model = load(folder, config)
    # Before the check: levels beyond 8 bits go with int8 alone.
    choose_activations(model, activations, device)
    move_to(model, device)
    on_gpu = device == "cuda"
    if on_gpu:
        for module in quant_modules(model).values():
            module.unpack_scales()
    if gpu_uncovered(model) if on_gpu else _cpu_uncovered(model):
        return None
    pieces = Pieces(folder / "tokenizer.json")
    log_mel = LogMel.of(extractor, str(next(model.parameters()).device))
    return NativeEngine(model, settings, log_mel, pieces, on_gpu)


def _cpu_uncovered(model: Skeleton) -> str:
    return uncovered(model) or encoder_uncovered(model.model.encoder)


def _settings(folder: Path) -> Any:
    """generation_config.json; None where it is older than what dqw writes."""
    stored = read_json(folder / "generation_config.json")
    needed = (
        [*_SETTINGS, "lang_to_id", "task_to_id"] if stored.get("is_multilingual") else _SETTINGS
    )
    if any(stored.get(name) is None for name in needed):
        return None
    if not isinstance(stored["eos_token_id"], int) or own_rules(SimpleNamespace(**stored)):
        return None
    defaults = dict.fromkeys(
        ("max_length", "suppress_tokens", "begin_suppress_tokens", "max_initial_timestamp_index")
    )
    return SimpleNamespace(**{**defaults, **stored})


def _extractor(folder: Path) -> dict[str, Any] | None:
    """The feature extractor's settings; None where LogMel does not do all that they ask."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            stored = read_json(folder / name)
            stored = stored.get("feature_extractor", stored)
            known = {"feature_size", "chunk_length", "n_fft", "hop_length", "sampling_rate"}
            return stored if known <= stored.keys() and not stored.get("dither") else None
    return None
