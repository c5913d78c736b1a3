"""Audio to text with any Whisper, float or packed: clips in batches, long ones by windows.

Clips of at most 30 s are sorted by length and decoded in batches: the encoder runs once, detects
the language where none is given, and feeds the decoder. Longer audio goes by OpenAI's sequential
algorithm: a 30 s window moves along the timestamps that the model predicts; several recordings
move together. A model that learned a dynamic audio context (`dqw.whisper.context`) hears short
clips, and the short last window of a recording, without padding; those of one length in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dqw.errors import UserError
from dqw.whisper.audio import (
    SAMPLE_RATE,
    EncodedAudio,
    audio_seconds,
    is_silent,
    load_audio,
)
from dqw.whisper.context import CHOICES
from dqw.whisper.decoding import cut_loop, is_time
from dqw.whisper.engines import Engine, PlainEngine
from dqw.whisper.features import silence
from dqw.whisper.listener import NO_SPEECH, Listener
from dqw.whisper.transcript import TICK, Segment, Transcript, segment_of
from dqw.whisper.windows import Recording, Stretch

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

Source = str | Path | EncodedAudio | np.ndarray
TASKS = ("transcribe", "translate")
_LONG_BATCH = 4 * 3600.0  # seconds of recordings that are heard at once: 460 MB of features


_Run = Callable[[Sequence["_Clip"]], Iterable[tuple[int, Transcript]]]


@dataclass
class _Clip:
    """audio: samples at 16 kHz, 230 MB an hour; dropped where they are no longer needed."""

    index: int
    audio: np.ndarray
    language: str | None
    seconds: float = field(init=False)

    def __post_init__(self) -> None:
        self.seconds = len(self.audio) / SAMPLE_RATE


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
    audio_context: str = "auto",
    damaged: Callable[[int, UserError], None] | None = None,
    prompt: str | None = None,
    no_speech: float = NO_SPEECH,
) -> list[Transcript]:
    """One transcript per audio, in order; of those that are not ``damaged``, as there.

    `audios`: paths, objects with read_bytes(), or mono float32 arrays at 16 kHz. `language`: a
    code for all, one per audio, or None for the one that the model was tuned to, where its
    generation_config names it, or to detect it. `task`: "transcribe", or "translate" into
    English. `beam_size` 1 is greedy; there is no temperature fallback. `timestamps`: segments with
    times (the text may differ a little: Whisper decodes differently then). `progress` is called
    with the seconds of audio finished, after each clip. `audio_context`: "auto" (short clips are
    not padded where the model learned that) or "full". `prompt`: words to expect, such as names, or
    a text in the style wanted, at most half of the tokens that a sequence may have; each window
    is decoded as if it had been said before. `no_speech`: a window that the model takes for no
    speech with more than this probability, and whose words it doubts (a mean log-probability below
    -1), is silence, by the rule and with the numbers of OpenAI's whisper; 1: none is.
    Raises UserError for bad audio, an unknown language, task or context, a prompt that is too long,
    and numbers below 1.
    """
    results: dict[int, Transcript] = {}
    engine = PlainEngine(model, processor)
    steps = iter_transcripts(
        engine, audios, language, task, beam_size, timestamps, batch_size,
        audio_context=audio_context, damaged=damaged, prompt=prompt, no_speech=no_speech,
    )  # fmt: skip
    done = 0.0
    for index, transcript in steps:
        results[index] = transcript
        done += transcript.seconds
        if progress:
            progress(done)
    return [results[index] for index in sorted(results)]


def iter_transcripts(
    engine: Engine,
    audios: Sequence[Source],
    language: str | Sequence[str | None] | None = None,
    task: str = "transcribe",
    beam_size: int = 1,
    timestamps: bool = False,
    batch_size: int = 8,
    heard: Callable[[float], None] | None = None,
    audio_context: str = "auto",
    damaged: Callable[[int, UserError], None] | None = None,
    seconds: Sequence[float | None] | None = None,
    ahead: int | None = None,
    prompt: str | None = None,
    no_speech: float = NO_SPEECH,
) -> Iterator[tuple[int, Transcript]]:
    """(index, transcript) as they get ready, longest clips first; arguments as `transcribe`.

    `heard` is called with the seconds of audio that were done since its last call, after each
    batch or window; `damaged` with audio that turns out to be so, which is then left out. None:
    its UserError is raised. `seconds`: lengths, where they are known. `ahead`: so many are done
    before any behind them; None: all are one lot.
    """
    if task not in TASKS:
        raise UserError(f"the task is '{task}'; choose transcribe or translate")
    for name, value in (("beam size", beam_size), ("batch size", batch_size)):
        if value < 1:
            raise UserError(f"the {name} is {value}; give 1 or more")
    if not 0 <= no_speech <= 1:
        raise UserError(f"the no-speech threshold is {no_speech}; give 0 to 1")
    if audio_context not in CHOICES:
        raise UserError(f"the audio context is '{audio_context}'; choose auto or full")
    listener = Listener(engine, task, beam_size, prompt, no_speech)
    decoder = _Decoder(listener, timestamps, heard or (lambda seconds: None))
    if audio_context == "full":
        decoder.context = None
    each = [language] * len(audios) if language is None or isinstance(language, str) else language
    codes = [listener.code(code) or listener.own_language() for code in each]
    if len(codes) != len(audios):
        raise UserError(f"{len(codes)} languages for {len(audios)} audios; give one for each")
    # Longest first: rows of a batch end together, and too little memory shows at once.
    known = seconds or [None] * len(audios)
    hints = [_seconds_hint(a) if s is None else s for a, s in zip(audios, known, strict=True)]
    step = ahead or max(len(audios), 1)
    for start in range(0, len(audios), step):
        lot = sorted(range(start, min(start + step, len(audios))), key=lambda i: -hints[i])
        yield from _lot(decoder, lot, audios, codes, batch_size, damaged)


def _lot(
    decoder: _Decoder,
    order: Sequence[int],
    audios: Sequence[Source],
    codes: Sequence[str | None],
    batch_size: int,
    damaged: Callable[[int, UserError], None] | None,
) -> Iterator[tuple[int, Transcript]]:
    """`iter_transcripts` of the audios `order`, in it."""
    batches: dict[tuple[_Run, int], list[_Clip]] = {}
    for index in order:
        source = audios[index]
        try:
            audio = load_audio(source, SAMPLE_RATE if isinstance(source, np.ndarray) else None)
        except UserError as error:
            if damaged is None:
                raise
            damaged(index, error)
            continue
        clip, silent = _Clip(index, audio, codes[index]), is_silent(audio)
        del audio  # hours of it: the clip alone says when it is not needed any more
        if silent:
            decoder.heard(clip.seconds)
            yield index, Transcript("", clip.language, clip.seconds)
            continue
        run: _Run = decoder.long if clip.seconds > decoder.window else decoder.short
        kind = run, decoder.heard_positions(clip.seconds)
        batch = batches.setdefault(kind, [])
        batch.append(clip)
        full = run == decoder.long and sum(clip.seconds for clip in batch) >= _LONG_BATCH
        if len(batch) == batch_size or full:
            yield from run(batches.pop(kind))
    for (run, _), batch in batches.items():
        yield from run(batch)


def _silent_seconds(audio: np.ndarray) -> list[bool]:
    """Whether each second is silent."""
    return [is_silent(audio[i : i + SAMPLE_RATE]) for i in range(0, len(audio), SAMPLE_RATE)]


def _seconds_hint(source: Source) -> float:
    if isinstance(source, np.ndarray):
        return len(source) / SAMPLE_RATE
    try:
        return audio_seconds(source) if isinstance(source, str | Path) else 0.0
    except UserError:  # it is told where it is loaded: first, before there is work to lose
        return math.inf


class _Decoder:
    """One model with one set of decoding options."""

    def __init__(
        self,
        listener: Listener,
        timestamps: bool,
        heard: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.listener, self.engine = listener, listener.engine
        self.timestamps, self.heard = timestamps, heard
        self.first_timestamp = listener.first_timestamp
        self.window = self.engine.log_mel.samples / SAMPLE_RATE  # 30 s in every Whisper
        self.context = self.engine.context

    def heard_positions(self, seconds: float) -> int:
        """The encoder's positions for a clip or the rest of a recording."""
        all_of_it = self.engine.log_mel.frames // 2
        return self.context.positions(seconds, all_of_it) if self.context else all_of_it

    @torch.inference_mode()
    def short(self, clips: Sequence[_Clip]) -> list[tuple[int, Transcript]]:
        """Clips of at most 30 s and of one context, one batch."""
        features = self.engine.log_mel.clips([clip.audio for clip in clips])
        positions = self.heard_positions(clips[0].seconds)
        states = self.engine.encode(features[..., : 2 * positions])
        known: list[str | None] = [clip.language for clip in clips]
        languages, said = self.listener.said(states, known, self.timestamps)
        results = []
        for clip, code, tokens in zip(clips, languages, said, strict=True):
            tokens = tokens or []
            kept = cut_loop(tokens, self.first_timestamp)
            segments = self._segments(kept, clip.seconds) if self.timestamps else []
            language, looped = self.listener.reported(code), len(kept) < len(tokens)
            found = Transcript(self.listener.text(kept), language, clip.seconds, segments, looped)
            results.append((clip.index, found))
            self.heard(clip.seconds)
        return results

    @torch.inference_mode()
    def long(self, clips: Sequence[_Clip]) -> Iterator[tuple[int, Transcript]]:
        """Audio of any length, window by window; each recording as it ends."""
        log_mel, first = self.engine.log_mel, self.first_timestamp
        recordings = []
        for clip in clips:
            features, quiet = log_mel.long(clip.audio), _silent_seconds(clip.audio)
            clip.audio = clip.audio[:0].copy()
            # A student of short contexts learned with silence behind the clips.
            padding = silence(features) if self.context else 0.0
            recordings.append(Recording(features, log_mel.frames, first, padding, quiet))
        languages = {clip.index: clip.language for clip in clips}
        running = list(zip(clips, recordings, strict=True))
        while running:
            for clip, recording in running:
                if skipped := recording.skip():
                    self.heard(skipped * log_mel.hop / SAMPLE_RATE)
                if recording.ended:
                    yield clip.index, self._joined(clip, languages[clip.index], recording.stretches)
            running = [pair for pair in running if not pair[1].ended]
            if not running:
                break
            # Those whose windows have the length of the first one's: all, but for last windows.
            lengths = [self.heard_positions(r.left * log_mel.hop / SAMPLE_RATE) for _, r in running]
            alike = [pair for pair, n in zip(running, lengths, strict=True) if n == lengths[0]]
            going = [pair for pair, n in zip(running, lengths, strict=True) if n != lengths[0]]
            windows = torch.stack([recording.window() for _, recording in alike])
            states = self.engine.encode(windows[..., : 2 * lengths[0]])
            codes, said = self.listener.said(
                states, [languages[clip.index] for clip, _ in alike], True
            )
            for (clip, recording), code, tokens in zip(alike, codes, said, strict=True):
                if tokens is not None:  # what is no speech is in no language
                    languages[clip.index] = code
                self.heard(recording.take(tokens or []) * log_mel.hop / SAMPLE_RATE)
                going.append((clip, recording))
            running = going

    def _joined(self, clip: _Clip, code: str | None, stretches: list[Stretch]) -> Transcript:
        segments, spoken = [], list[int]()
        for stretch in stretches:
            tokens = cut_loop(stretch.tokens, self.first_timestamp)
            spoken += tokens
            text = self.listener.text(tokens)
            if text:
                segments.append(segment_of(stretch.start, stretch.end, clip.seconds, text))
        return Transcript(
            self.listener.text(spoken), self.listener.reported(code), clip.seconds, segments
        )

    def _segments(self, tokens: list[int], seconds: float) -> list[Segment]:
        """Tokens between timestamps; a piece without an end lasts to the end of the clip."""
        segments: list[Segment] = []
        start, piece = 0.0, list[int]()

        def close(end: float) -> None:
            text = self.listener.text(piece)
            if text:
                segments.append(segment_of(start, end, seconds, text))
            piece.clear()

        for token in tokens:
            if not is_time(token, self.first_timestamp):
                piece.append(token)
                continue
            moment = (token - self.first_timestamp) * TICK
            close(moment)
            start = moment
        close(seconds)
        return segments
