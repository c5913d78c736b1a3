"""Audio to text with any Whisper, float or packed: short clips in batches, long ones by windows.

Clips of at most 30 s are sorted by length and decoded in batches: the encoder runs once, detects
the language where none is given, and feeds the decoder. Longer audio goes through transformers'
sequential algorithm, which moves its 30 s window along the timestamps that the model predicts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.generation import WhisperTimeStampLogitsProcessor

from dqw.errors import UserError
from dqw.whisper.audio import (
    SAMPLE_RATE,
    EncodedAudio,
    audio_seconds,
    is_silent,
    load_audio,
)
from dqw.whisper.checkpoint import quiet_transformers
from dqw.whisper.data import language_code
from dqw.whisper.decoding import LoopGuard, SuppressTokens, cut_loop
from dqw.whisper.fast import FastDecoder
from dqw.whisper.fast_greedy import Stop, greedy
from dqw.whisper.fast_model import native_decoder

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

Source = str | Path | EncodedAudio | np.ndarray
TASKS = ("transcribe", "translate")
_TICK = 0.02  # seconds a timestamp token stands for


@dataclass(frozen=True)
class Segment:
    """A stretch of speech; start and end in seconds."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """`language`: the code used, given or detected; None for silence and unknown. `segments` are
    empty unless timestamps were asked for or the audio is longer than 30 s. `looped`: the decoder
    repeated itself at the end and was stopped; one copy is left (clips of at most 30 s)."""

    text: str
    language: str | None
    seconds: float
    segments: list[Segment] = field(default_factory=list)
    looped: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Clip:
    index: int
    audio: np.ndarray
    language: str | None

    @property
    def seconds(self) -> float:
        return len(self.audio) / SAMPLE_RATE


def transcribe(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    audios: Sequence[Source],
    language: str | Sequence[str | None] | None = None,
    task: str = "transcribe",
    beam_size: int = 1,
    timestamps: bool = False,
    batch_size: int = 8,
    progress: Callable[[float], None] | None = None,
) -> list[Transcript]:
    """One transcript per audio, in order.

    `audios`: paths, objects with read_bytes(), or mono float32 arrays at 16 kHz. `language`: a
    code for all, one per audio, or None to detect it. `task`: "transcribe", or "translate" into
    English. `beam_size` 1 is greedy; there is no temperature fallback. `timestamps`: segments with
    times (the text may differ a little: Whisper decodes differently then). `progress` is called
    with the seconds of audio finished, after each clip.
    Raises UserError for bad audio, an unknown language or task, and numbers below 1.
    """
    results: dict[int, Transcript] = {}
    steps = iter_transcripts(
        model, processor, audios, language, task, beam_size, timestamps, batch_size
    )
    done = 0.0
    for index, transcript in steps:
        results[index] = transcript
        done += transcript.seconds
        if progress:
            progress(done)
    return [results[index] for index in range(len(audios))]


def iter_transcripts(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    audios: Sequence[Source],
    language: str | Sequence[str | None] | None = None,
    task: str = "transcribe",
    beam_size: int = 1,
    timestamps: bool = False,
    batch_size: int = 8,
) -> Iterator[tuple[int, Transcript]]:
    """(index, transcript) as they get ready, longest clips first; arguments as `transcribe`."""
    if task not in TASKS:
        raise UserError(f"the task is '{task}'; choose transcribe or translate")
    for name, value in (("beam size", beam_size), ("batch size", batch_size)):
        if value < 1:
            raise UserError(f"the {name} is {value}; give 1 or more")
    each = [language] * len(audios) if language is None or isinstance(language, str) else language
    codes = [language_code(code, "the language") for code in each]
    if len(codes) != len(audios):
        raise UserError(f"{len(codes)} languages for {len(audios)} audios; give one for each")
    decoder = _Decoder(model, processor, task, beam_size, timestamps)
    decoder.check_languages(codes)
    # Longest first: rows of a batch end together, and too little memory shows at once.
    order = sorted(range(len(audios)), key=lambda i: -_seconds_hint(audios[i]))
    batch: list[_Clip] = []
    for index in order:
        source = audios[index]
        audio = load_audio(source, SAMPLE_RATE if isinstance(source, np.ndarray) else None)
        clip = _Clip(index, audio, codes[index])
        if is_silent(audio):
            yield index, Transcript("", clip.language, clip.seconds)
        elif clip.seconds > decoder.window:
            yield index, decoder.long(clip)
        else:
            batch.append(clip)
        if len(batch) == batch_size:
            yield from zip((c.index for c in batch), decoder.short(batch), strict=True)
            batch = []
    if batch:
        yield from zip((c.index for c in batch), decoder.short(batch), strict=True)


def _seconds_hint(source: Source) -> float:
    if isinstance(source, np.ndarray):
        return len(source) / SAMPLE_RATE
    return audio_seconds(source) if isinstance(source, str | Path) else 0.0


class _Decoder:
    """One model with one set of decoding options."""

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        processor: WhisperProcessor,
        task: str,
        beam_size: int,
        timestamps: bool,
    ) -> None:
        self.model, self.processor, self.timestamps = model, processor, timestamps
        config: Any = copy.deepcopy(model.generation_config)
        self.config = config
        suppress = SuppressTokens(config.suppress_tokens or (), config.begin_suppress_tokens or ())
        config.suppress_tokens = config.begin_suppress_tokens = None
        self.multilingual = bool(getattr(config, "is_multilingual", True))
        self.first_timestamp = config.no_timestamps_token_id + 1
        self.end: int = config.eos_token_id
        self.window = processor.feature_extractor.n_samples / SAMPLE_RATE  # 30 s in every Whisper
        if task == "translate" and not self.multilingual:
            raise UserError("this model only knows English and can't translate; leave --task out")
        self.options: dict[str, Any] = {
            "generation_config": config,
            "num_beams": beam_size,
            "do_sample": False,
            "logits_processor": [suppress, LoopGuard(self.end, self.first_timestamp)],
        }
        self.languages: dict[int, str] = {}  # token id -> code
        if self.multilingual:
            self.options["task"] = task
            self.languages = {i: token[2:-2] for token, i in config.lang_to_id.items()}

    def check_languages(self, codes: Sequence[str | None]) -> None:
        known = set(self.languages.values()) or {"en"}
        for code in codes:
            if code is not None and code not in known:
                raise UserError(f"this model does not know the language '{code}'; take a "
                                "multilingual one or leave the language out")  # fmt: skip

    def features(self, audios: list[np.ndarray], **options: Any) -> dict[str, torch.Tensor]:
        batch = self.processor.feature_extractor(
            audios, sampling_rate=SAMPLE_RATE, return_tensors="pt", **options
        )
        batch["input_features"] = batch["input_features"].to(self.model.device, self.model.dtype)
        return dict(batch)

    def detect(self, clips: Sequence[_Clip], encoded: Any) -> list[str | None]:
        """The clips' languages, detected where none is given; None for all in an English model."""
        languages = [clip.language for clip in clips]
        if not self.multilingual or None not in languages:
            return languages
        ids = self.model.detect_language(encoder_outputs=encoded).tolist()
        return [code or self.languages[found] for code, found in zip(languages, ids, strict=True)]

    @torch.inference_mode()
    def short(self, clips: Sequence[_Clip]) -> list[Transcript]:
        """Clips of at most 30 s, one batch."""
        features = self.features([clip.audio for clip in clips])["input_features"]
        encoded = self.model.get_encoder()(features)
        languages = self.detect(clips, encoded)
        prompt = 1 + 2 * self.multilingual + (not self.timestamps)
        decoder = native_decoder(self.model) if self.options["num_beams"] == 1 else None
        if decoder is not None:
            rows = self._greedy(decoder, encoded[0], self._prompts(languages))
        else:
            with quiet_transformers():
                rows = self.model.generate(
                    encoder_outputs=encoded,
                    return_timestamps=self.timestamps,
                    force_unique_generate_call=True,  # else trailing silence would be decoded, too
                    **self._language(languages),
                    **self.options,
                )
        results = []
        for clip, code, row in zip(clips, languages, rows.tolist(), strict=True):
            tokens = row[prompt:]
            if self.end in tokens:
                tokens = tokens[: tokens.index(self.end)]
            kept = cut_loop(tokens, self.first_timestamp)
            segments = self._segments(kept, clip.seconds) if self.timestamps else []
            language, looped = self._reported(code), len(kept) < len(tokens)
            results.append(Transcript(self._text(kept), language, clip.seconds, segments, looped))
        return results

    def _prompts(self, languages: list[str | None]) -> torch.Tensor:
        """The tokens that every row begins with, as generate would put them."""
        config = self.config
        rows = []
        for code in languages:
            row = [config.decoder_start_token_id]
            if self.multilingual:
                row += [config.lang_to_id[f"<|{code}|>"], config.task_to_id[self.options["task"]]]
            rows.append(row if self.timestamps else [*row, config.no_timestamps_token_id])
        return torch.tensor(rows)

    def _greedy(
        self, decoder: FastDecoder, states: torch.Tensor, prompt: torch.Tensor
    ) -> torch.Tensor:
        """What generate gives for one window, without the 50 ms that it spends around its loop."""
        begin = prompt.shape[1]
        processors = [*self.options["logits_processor"]]
        processors[0].set_begin_index(begin)
        if self.timestamps:
            processors.insert(0, WhisperTimeStampLogitsProcessor(self.config, begin))
        longest = min(self.config.max_length + begin, self.model.config.max_target_positions)
        stop = Stop(longest, (self.end,))
        return greedy(decoder, states, prompt, processors, stop, pad=self.end).ids

    @torch.inference_mode()
    def long(self, clip: _Clip) -> Transcript:
        """Audio of any length, window by window."""
        inputs = self.features(
            [clip.audio], truncation=False, padding="longest", return_attention_mask=True
        )
        languages = [clip.language]
        if clip.language is None and self.multilingual:
            window = inputs["input_features"][
                :, :, : self.processor.feature_extractor.nb_max_frames
            ]
            languages = self.detect([clip], self.model.get_encoder()(window))
        with quiet_transformers():
            found = self.model.generate(
                **inputs,
                return_timestamps=True,
                return_segments=True,
                **self._language(languages),
                **self.options,
            )
        segments, spoken = [], list[int]()
        for part in found["segments"][0]:
            tokens = cut_loop(part["tokens"].tolist(), self.first_timestamp)
            spoken += tokens
            text = self._text(tokens)
            start, end = float(part["start"]), min(float(part["end"]), clip.seconds)
            if text and start < end:
                segments.append(Segment(round(start, 2), round(end, 2), text))
        return Transcript(self._text(spoken), self._reported(languages[0]), clip.seconds, segments)

    def _language(self, languages: list[str | None]) -> dict[str, Any]:
        return {"language": languages} if self.multilingual else {}

    def _reported(self, code: str | None) -> str | None:
        return code if self.multilingual else "en"

    def _text(self, tokens: list[int]) -> str:
        tokens = [token for token in tokens if token < self.first_timestamp]
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _segments(self, tokens: list[int], seconds: float) -> list[Segment]:
        """Tokens between timestamps; a piece without an end lasts to the end of the clip."""
        segments: list[Segment] = []
        start, piece = 0.0, list[int]()

        def close(end: float) -> None:
            text = self._text(piece)
            if text:
                end = min(max(end, start), seconds)
                segments.append(Segment(round(min(start, end), 2), round(end, 2), text))
            piece.clear()

        for token in tokens:
            if token < self.first_timestamp:
                piece.append(token)
                continue
            moment = (token - self.first_timestamp) * _TICK
            close(moment)
            start = moment
        close(seconds)
        return segments
