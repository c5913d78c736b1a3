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
from typing import TYPE_CHECKING, Any

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
from dqw.whisper.data import language_code
from dqw.whisper.decoding import Rules, cut_loop, is_time
from dqw.whisper.engines import Engine, PlainEngine
from dqw.whisper.features import silence
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
    is decoded as if it had been said before.
    Raises UserError for bad audio, an unknown language, task or context, a prompt that is too long,
    and numbers below 1.
    """
    results: dict[int, Transcript] = {}
    engine = PlainEngine(model, processor)
    steps = iter_transcripts(
        engine, audios, language, task, beam_size, timestamps, batch_size,
        audio_context=audio_context, damaged=damaged, prompt=prompt,
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
    if audio_context not in CHOICES:
        raise UserError(f"the audio context is '{audio_context}'; choose auto or full")
    silent = heard or (lambda seconds: None)
    decoder = _Decoder(engine, task, beam_size, timestamps, silent, prompt)
    if audio_context == "full":
        decoder.context = None
    each = [language] * len(audios) if language is None or isinstance(language, str) else language
    codes = [decoder.code(code) or decoder.own_language() for code in each]
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
        engine: Engine,
        task: str,
        beam_size: int,
        timestamps: bool,
        heard: Callable[[float], None] = lambda seconds: None,
        prompt: str | None = None,
    ) -> None:
        self.engine, self.task, self.beams = engine, task, beam_size
        self.timestamps, self.heard = timestamps, heard
        self.settings: Any = engine.settings
        self.multilingual = bool(getattr(self.settings, "is_multilingual", True))
        self.first_timestamp = self.settings.no_timestamps_token_id + 1
        self.end: int = self.settings.eos_token_id
        self.window = engine.log_mel.samples / SAMPLE_RATE  # 30 s in every Whisper
        self.context = engine.context
        if task == "translate" and not self.multilingual:
            raise UserError("this model only knows English and can't translate; leave --task out")
        self.languages: dict[int, str] = {}  # token id -> code
        if self.multilingual:
            self.languages = {i: token[2:-2] for token, i in self.settings.lang_to_id.items()}
        self.before = self._before(prompt) if prompt and prompt.strip() else []

    def _before(self, prompt: str) -> list[int]:
        """The tokens of what counts as said before, by OpenAI's rules for `initial_prompt`."""
        start = getattr(self.settings, "prev_sot_token_id", None)
        if start is None:
            raise UserError("this model was made without a place for a prompt; leave --prompt out")
        tokens = self.engine.tokens(" " + prompt.strip())
        last = self.first_timestamp + round(self.window / TICK)
        if any(self.end <= token <= last for token in tokens):
            raise UserError("the prompt holds one of Whisper's own tokens, <|…|>; leave it out")
        most = self.engine.positions // 2 - 1
        if len(tokens) > most:
            raise UserError(f"the prompt has {len(tokens)} tokens; {most} is the most, shorten it")
        return [start, *tokens]

    def code(self, language: str | None) -> str | None:
        """Whisper's code for a language; UserError if the model does not know it."""
        known = set(self.languages.values()) or {"en"}
        code = language if language in known else language_code(language, "the language")
        if code is not None and code not in known:
            raise UserError(f"this model does not know the language '{code}'; take a "
                            "multilingual one or leave the language out")  # fmt: skip
        return code

    def own_language(self) -> str | None:
        """The one that a fine-tune's generation_config names, if it knows that."""
        named = getattr(self.settings, "language", None)
        if not self.multilingual or not isinstance(named, str):
            return None
        try:
            return self.code(named.strip("<|>"))
        except UserError:
            return None

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
        languages = self._detected([clip.language for clip in clips], states)
        results = []
        for clip, code, tokens in zip(
            clips, languages, self._tokens(states, languages, self.timestamps), strict=True
        ):
            kept = cut_loop(tokens, self.first_timestamp)
            segments = self._segments(kept, clip.seconds) if self.timestamps else []
            language, looped = self._reported(code), len(kept) < len(tokens)
            found = Transcript(self._text(kept), language, clip.seconds, segments, looped)
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
            codes = self._detected([languages[clip.index] for clip, _ in alike], states)
            for (clip, recording), code, tokens in zip(
                alike, codes, self._tokens(states, codes, True), strict=True
            ):
                languages[clip.index] = code
                self.heard(recording.take(tokens) * log_mel.hop / SAMPLE_RATE)
                going.append((clip, recording))
            running = going

    def _joined(self, clip: _Clip, code: str | None, stretches: list[Stretch]) -> Transcript:
        segments, spoken = [], list[int]()
        for stretch in stretches:
            tokens = cut_loop(stretch.tokens, self.first_timestamp)
            spoken += tokens
            text = self._text(tokens)
            if text:
                segments.append(segment_of(stretch.start, stretch.end, clip.seconds, text))
        return Transcript(self._text(spoken), self._reported(code), clip.seconds, segments)

    def _detected(self, languages: list[str | None], states: torch.Tensor) -> list[str | None]:
        """The clips' languages, detected where none is given; None for all in an English model."""
        if not self.multilingual or None not in languages:
            return languages
        ids = self.engine.detect(states)
        return [code or self.languages[found] for code, found in zip(languages, ids, strict=True)]

    def _tokens(
        self, states: torch.Tensor, languages: list[str | None], timestamps: bool
    ) -> list[list[int]]:
        """What is said in each window, without prompt and end."""
        prompt = self._prompts(languages, timestamps)
        begin = prompt.shape[1]
        decoder = self.engine.native() if self.beams == 1 else None
        # generate has rules of its own for times, but these come after what is suppressed.
        rules = self._rules(begin, timestamps)
        if decoder is not None:
            rows = decoder.greedy(states, prompt, rules)
        else:
            options: dict[str, Any] = {"task": self.task} if self.multilingual else {}
            if self.before:
                options["prompt_ids"] = torch.tensor(self.before)
            rows = self.engine.generate(
                states,
                languages,
                num_beams=self.beams,
                do_sample=False,
                logits_processor=rules.processors(),
                return_timestamps=timestamps,
                **options,
            )
        tokens = [row[begin:] for row in rows.tolist()]
        return [row[: row.index(self.end)] if self.end in row else row for row in tokens]

    def _prompts(self, languages: list[str | None], timestamps: bool) -> torch.Tensor:
        """The tokens that every row begins with, as generate would put them."""
        config = self.settings
        rows = []
        for code in languages:
            row = [*self.before, config.decoder_start_token_id]
            if self.multilingual:
                row += [config.lang_to_id[f"<|{code}|>"], config.task_to_id[self.task]]
            rows.append(row if timestamps else [*row, config.no_timestamps_token_id])
        return torch.tensor(rows)

    def _rules(self, begin: int, timestamps: bool) -> Rules:
        settings, positions = self.settings, self.engine.positions
        return Rules(
            begin,
            longest=min((settings.max_length or positions) + begin, positions),
            end=self.end,
            first_timestamp=self.first_timestamp,
            always=tuple(settings.suppress_tokens or ()),
            first=tuple(settings.begin_suppress_tokens or ()),
            timestamps=timestamps,
            latest=getattr(settings, "max_initial_timestamp_index", None),
        )

    def _reported(self, code: str | None) -> str | None:
        return code if self.multilingual else "en"

    def _text(self, tokens: list[int]) -> str:
        said = [token for token in tokens if not is_time(token, self.first_timestamp)]
        return self.engine.text(said).strip()

    def _segments(self, tokens: list[int], seconds: float) -> list[Segment]:
        """Tokens between timestamps; a piece without an end lasts to the end of the clip."""
        segments: list[Segment] = []
        start, piece = 0.0, list[int]()

        def close(end: float) -> None:
            text = self._text(piece)
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
