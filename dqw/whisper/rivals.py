"""Engines of other packages that turn a clip into text, for ``dqw eval --engine`` and the bench.

All decode alike: greedy or with beams, at temperature 0 without fallback, no text before, no
timestamps where the clip is at most 30 s. A package is imported when its engine is opened; what is
missing or wrong is one sentence. To add an engine: a subclass of ``Rival`` and its name in
``RIVALS``.
"""

from __future__ import annotations

import importlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dqw.errors import UserError
from dqw.whisper.audio import SAMPLE_RATE

WINDOW = 30 * SAMPLE_RATE
Heard = tuple[str, str | None]  # text, language: the one given, or found; None where it is not said


class Rival(ABC):
    """module: imported, of ``package``; reads: what ``model`` has to be; batches: whether
    ``hear_all`` decodes several clips at once; kind: of arithmetic, "" is the package's choice."""

    package: ClassVar[str]
    module: ClassVar[str]
    reads: ClassVar[str]
    batches: ClassVar[bool] = False

    def __init__(self, model: Path, threads: int, beam_size: int, kind: str) -> None:
        self.beam_size, self.path = beam_size, model
        self.load(model, threads, kind)

    @cached_property
    def spelling(self) -> dict[str, str] | None:
        """British → American, for scoring English: the normalizer.json beside the model."""
        from dqw.whisper.scoring import read_spelling

        folder = self.path if self.path.is_dir() else self.path.parent
        return read_spelling(folder) if (folder / "normalizer.json").is_file() else None

    @staticmethod
    @abstractmethod
    def fits(model: Path) -> bool:
        """Whether ``model`` looks like what this engine reads."""

    @abstractmethod
    def load(self, model: Path, threads: int, kind: str) -> None: ...

    @abstractmethod
    def hear(self, audio: np.ndarray, language: str | None) -> Heard:
        """Mono float32 samples at 16 kHz; language None: detect it."""

    def hear_all(
        self, audios: Sequence[np.ndarray], language: str | None, batch_size: int
    ) -> list[str]:
        """Texts of clips of at most 30 s; one by one unless the package batches."""
        return [self.hear(audio, language)[0] for audio in audios]


class WhisperCpp(Rival):
    package, module = "pywhispercpp", "pywhispercpp.model"
    reads = "a ggml .bin file"

    @staticmethod
    def fits(model: Path) -> bool:
        return ggml_vocabulary_bytes(model) is not None

    def load(self, model: Path, threads: int, kind: str) -> None:
        from pywhispercpp.model import Model

        beams = self.beam_size > 1
        self.model: Any = Model(
            str(model), params_sampling_strategy=int(beams), n_threads=threads,
            redirect_whispercpp_logs_to=None,
        )  # fmt: skip
        self.options: dict[str, Any] = {"temperature_inc": 0.0, "print_progress": False}
        self.options |= {"no_context": True, "greedy": {"best_of": 1}}
        if beams:
            self.options["beam_search"] = {"beam_size": self.beam_size, "patience": -1.0}

    def hear(self, audio: np.ndarray, language: str | None) -> Heard:
        short = len(audio) <= WINDOW
        segments = self.model.transcribe(
            audio, language=language or "auto", no_timestamps=short, single_segment=short,
            **self.options,
        )  # fmt: skip
        text = " ".join(segment.text.strip() for segment in segments)
        return text, language or self._found()

    def _found(self) -> str:
        import _pywhispercpp as native

        return native.whisper_lang_str(native.whisper_full_lang_id(self.model._ctx))


class FasterWhisper(Rival):
    package, module = "faster-whisper", "faster_whisper"
    reads = "a CTranslate2 folder with model.bin"
    batches = True

    @staticmethod
    def fits(model: Path) -> bool:
        return (model / "model.bin").is_file()

    def load(self, model: Path, threads: int, kind: str) -> None:
        from faster_whisper import BatchedInferencePipeline, WhisperModel

        # As stored; what has no kernel on a CPU (float16) it turns into float32 itself.
        kind = kind or "default"
        self.model = WhisperModel(str(model), device="cpu", compute_type=kind, cpu_threads=threads)
        self.batched = BatchedInferencePipeline(self.model)
        self.options: dict[str, Any] = {"beam_size": self.beam_size, "temperature": 0.0}

    def hear(self, audio: np.ndarray, language: str | None) -> Heard:
        segments, found = self.model.transcribe(
            audio, language=language, without_timestamps=len(audio) <= WINDOW,
            condition_on_previous_text=False, **self.options,
        )  # fmt: skip
        return "".join(segment.text for segment in segments).strip(), found.language

    def hear_all(
        self, audios: Sequence[np.ndarray], language: str | None, batch_size: int
    ) -> list[str]:
        """One recording of all clips and where each lies: the pipeline batches such parts."""
        if min(len(audios), batch_size) <= 1:
            return super().hear_all(audios, language, batch_size)
        ends = np.cumsum([len(audio) for audio in audios]) / SAMPLE_RATE
        starts = [0.0, *ends[:-1]]
        parts = [{"start": float(a), "end": float(b)} for a, b in zip(starts, ends, strict=True)]
        segments, _ = self.batched.transcribe(
            np.concatenate(audios), language=language, clip_timestamps=parts, vad_filter=False,
            without_timestamps=True, batch_size=batch_size, **self.options,
        )  # fmt: skip
        texts = [""] * len(audios)
        for segment in segments:
            middle = (segment.start + segment.end) / 2
            texts[int(np.searchsorted(ends, middle).clip(0, len(texts) - 1))] += segment.text
        return [text.strip() for text in texts]


class OpenVino(Rival):
    package, module = "openvino-genai", "openvino_genai"
    reads = "a folder that optimum-cli exported"

    @staticmethod
    def fits(model: Path) -> bool:
        return (model / "openvino_encoder_model.xml").is_file()

    def load(self, model: Path, threads: int, kind: str) -> None:
        from openvino_genai import WhisperPipeline

        self.pipe = WhisperPipeline(str(model), "CPU", INFERENCE_NUM_THREADS=threads)

    def hear(self, audio: np.ndarray, language: str | None) -> Heard:
        options: dict[str, Any] = {"return_timestamps": len(audio) > WINDOW}
        if language:
            options["language"] = f"<|{language}|>"
        if self.beam_size > 1:
            options["num_beams"] = self.beam_size
        found = self.pipe.generate(audio, **options)
        languages = getattr(found, "languages", None) or [None]
        return str(found.texts[0]).strip(), language or languages[0] or None


class Transformers(Rival):
    """Any folder or hub id that dqw reads, in transformers' own modules and loop; packed ones too.

    kind: the dtype of float weights, or the activations ("int8", "float") of packed ones.
    """

    package = module = "transformers"
    reads = "a Hugging Face, faster-whisper or packed folder, or a hub id"

    @staticmethod
    def fits(model: Path) -> bool:
        return True  # load_whisper says what is wrong

    def load(self, model: Path, threads: int, kind: str) -> None:
        import torch
        from transformers import WhisperForConditionalGeneration
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        from dqw.convert import choose_activations
        from dqw.recipe import ACTIVATIONS
        from dqw.whisper.checkpoint import load_whisper

        torch.set_num_threads(threads)
        packed = kind in ACTIVATIONS
        dtype = torch.float32 if packed or not kind else getattr(torch, kind)
        loaded: Any = load_whisper(str(model), dtype)
        self.model, self.processor = loaded
        self.spelling = getattr(self.processor.tokenizer, "english_spelling_normalizer", None)
        if packed:
            choose_activations(self.model, kind)
        # What dqw made of a packed model's class it is no longer.
        self.model.__class__ = WhisperForConditionalGeneration
        self.model.model.encoder.__class__ = WhisperEncoder

    def hear(self, audio: np.ndarray, language: str | None) -> Heard:
        from dqw.whisper.checkpoint import quiet_transformers

        long = len(audio) > WINDOW
        with quiet_transformers():
            inputs = self.processor.feature_extractor(
                audio, sampling_rate=SAMPLE_RATE, return_tensors="pt", truncation=not long,
                padding="longest" if long else "max_length", return_attention_mask=long,
            )  # fmt: skip
            features = inputs["input_features"].to(self.model.dtype)
            options: dict[str, Any] = {"num_beams": self.beam_size, "do_sample": False}
            if getattr(self.model.generation_config, "is_multilingual", True):
                if language is None:
                    language = self._detected(features)
                options["language"] = language
            if long:
                options["attention_mask"] = inputs["attention_mask"]
            else:
                options["force_unique_generate_call"] = True
            ids = self.model.generate(features, return_timestamps=long, **options)
        text = self.processor.batch_decode(ids, skip_special_tokens=True)[0]
        return text.strip(), language or "en"

    def _detected(self, features: Any) -> str:
        found = self.model.detect_language(features[..., :3000])
        return self.processor.tokenizer.convert_ids_to_tokens(int(found[0]))[2:-2]


RIVALS: dict[str, type[Rival]] = {
    "whisper.cpp": WhisperCpp,
    "faster-whisper": FasterWhisper,
    "openvino": OpenVino,
    "transformers": Transformers,
}


def open_rival(
    name: str, model: str | Path, threads: int, beam_size: int = 1, kind: str = ""
) -> Rival:
    """The engine ``name`` with ``model`` loaded.

    Raises UserError for an unknown name, a package that is not installed, a model that is missing
    or of another engine's kind, and whatever the package says when it fails to load it.
    """
    if name not in RIVALS:
        raise UserError(f"the engine is '{name}'; choose dqw, {', '.join(RIVALS)}")
    if beam_size < 1:
        raise UserError(f"the beam size is {beam_size}; give 1 or more")
    rival = RIVALS[name]
    try:
        importlib.import_module(rival.module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != rival.module.split(".")[0]:
            raise UserError(f"{rival.package} does not work here ({error}); install it again with "
                            f"pip install --upgrade {rival.package}") from None  # fmt: skip
        raise UserError(
            f"the engine {name} needs {rival.package}; pip install {rival.package}"
        ) from None
    path = Path(model)
    if rival is not Transformers and not path.exists():
        raise UserError(f"the model {path} does not exist; {name} reads {rival.reads}")
    if not rival.fits(path):
        raise UserError(f"{path} is no model for {name}, which reads {rival.reads}")
    try:
        return rival(path, threads, beam_size, kind)
    except UserError:
        raise
    except Exception as error:  # each package has exceptions of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{rival.package} could not load {path} ({reason}); make it again"
        ) from None


def rival_bytes(model: str | Path) -> int:
    """Bytes of a model as ``report.model_bytes`` counts: all but the tokenizer."""
    from dqw.whisper.report import model_bytes

    path = Path(model)
    if path.is_dir():
        return model_bytes(path)
    return path.stat().st_size - (ggml_vocabulary_bytes(path) or 0)


def ggml_vocabulary_bytes(file: Path) -> int | None:
    """Bytes that the vocabulary takes in whisper.cpp's file; None where it is no such file.

    Little endian: u32 magic; i32 settings[11]; i32 mels, bins and their float32 filters; i32 count;
    a piece: i32 length and the bytes.
    """
    try:
        with open(file, "rb") as stream:
            magic, *_ = struct.unpack("<I11i", stream.read(48))
            mels, bins = struct.unpack("<2i", stream.read(8))
            if magic != 0x67676D6C or not (0 < mels <= 1024 and 0 < bins <= 65536):
                return None
            stream.seek(4 * mels * bins, 1)
            start = stream.tell()
            (count,) = struct.unpack("<i", stream.read(4))
            for _ in range(count):
                (length,) = struct.unpack("<i", stream.read(4))
                if length < 0:
                    return None
                stream.seek(length, 1)
            return stream.tell() - start
    except (OSError, struct.error):
        return None
