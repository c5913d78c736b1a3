"""From clips to batches: labels, log-mel features, the order of an epoch.

Nothing here draws from a global random generator. Order and augmentation are functions of (seed,
epoch, index), so a run that goes on from a checkpoint sees exactly the batches it would have seen.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from dqw.distill.augment import concatenate_clips, perturb, warn_unread
from dqw.distill.config import AugmentConfig, TrainConfig
from dqw.distill.losses import IGNORE
from dqw.errors import UserError
from dqw.whisper.audio import SAMPLE_RATE

SHUFFLED = 4096  # clips of a language up to which all of them are shuffled
STAND_INS = 100  # clips in a row that cannot be read, at which a run ends
# Whisper puts a space before a transcript, except in scripts that do not separate words.
SPACELESS = frozenset({"zh", "ja", "th", "lo", "my", "yue"})


class SpeechItem(Protocol):
    """What a clip has to have; `dqw.whisper.data.Item` has it."""

    @property
    def id(self) -> str: ...
    @property
    def text(self) -> str | None: ...
    @property
    def language(self) -> str | None: ...
    @property
    def seconds(self) -> float | None: ...
    def load(self) -> np.ndarray:
        """Mono float32 samples at 16 kHz, shape (samples,)."""


@dataclass(frozen=True)
class Example:
    """A clip with the text to learn. `language` is a Whisper code, or None in an English model;
    `seconds` its length, before augmentation."""

    item: SpeechItem
    text: str
    language: str | None
    seconds: float = 0.0


class LabelEncoder:
    """Texts to Whisper's token sequences.

    `<|startoftranscript|><|xx|><|transcribe|><|notimestamps|> text <|endoftext|>`; an
    English-only model has neither language nor task. The decoder reads all but the last token and
    predicts all but the first. Task and timestamp tokens are always given at inference, so
    predicting them is not trained (it would unlearn translation and timestamps); the language is,
    because detection needs it.
    """

    def __init__(self, tokenizer: Any, multilingual: bool, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.multilingual = multilingual
        self.max_length = max_length
        self.vocabulary: dict[str, int] = tokenizer.get_vocab()  # 0.1 s each time it is asked for
        self.start = self._id("<|startoftranscript|>")
        self.end = self._id("<|endoftext|>")
        self.no_timestamps = self._id("<|notimestamps|>")
        self.transcribe = self._id("<|transcribe|>") if multilingual else None

    def _id(self, token: str) -> int:
        index = self.vocabulary.get(token)
        if index is None:
            raise UserError(
                f"the tokenizer lacks {token}: give the tokenizer of the student's checkpoint."
            )
        return int(index)

    def prefix(self, language: str | None) -> list[int]:
        if not self.multilingual:
            return [self.start, self.no_timestamps]
        assert language is not None and self.transcribe is not None
        return [self.start, self._id(f"<|{language}|>"), self.transcribe, self.no_timestamps]

    def encode(self, text: str, language: str | None) -> tuple[list[int], list[int]]:
        """(decoder input ids, labels), of one length; forced positions have the label −100."""
        prefix = self.prefix(language)
        lead = "" if language in SPACELESS else " "
        ids = self.tokenizer(lead + text.strip(), add_special_tokens=False).input_ids
        tokens = [*prefix, *ids, self.end]
        labels = tokens[1:]
        trained = 1 if self.multilingual else 0
        for place in range(trained, len(prefix) - 1):
            labels[place] = IGNORE
        return tokens[:-1], labels

    def fits(self, text: str, language: str | None) -> bool:
        return len(self.encode(text, language)[0]) <= self.max_length


class SpeechDataset(Dataset[dict[str, Any]]):
    """Examples as features and tokens; a key is epoch · len + index (see `EpochSampler`).

    cache: keep features in memory as float16. Features pass through float16 either way, so that
    a cached clip and a fresh one are the same to the last bit.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        encoder: LabelEncoder,
        extractor: Any,
        teacher_extractor: Any = None,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        cache: bool = False,
    ) -> None:
        self.examples = examples
        self.encoder = encoder
        self.extractors = {"input_features": extractor}
        if teacher_extractor is not None:
            self.extractors["teacher_features"] = teacher_extractor
        self.augment = augment or AugmentConfig()
        self.seed = seed
        # What the model hears at once, in samples: 30 s.
        self.window = int(extractor.chunk_length * SAMPLE_RATE)
        spoken: dict[str | None, list[int]] = {}
        for index, example in enumerate(examples):
            spoken.setdefault(example.language, []).append(index)
        # Arrays: workers that count references to a million objects copy their memory.
        self.spoken = {code: np.array(places) for code, places in spoken.items()}
        self.cache: dict[int, dict[str, Tensor]] | None = None
        if cache and not self.augment.active:
            self.cache = {}

    def __len__(self) -> int:
        return len(self.examples)

    def joined(self) -> SpeechDataset:
        """The same clips, most of them joined to others until 30 s are full."""
        other = copy.copy(self)
        other.augment, other.cache = AugmentConfig(concatenate=0.8), None
        return other

    @property
    def seconds(self) -> list[float]:
        """Of each clip, before augmentation."""
        return [example.seconds for example in self.examples]

    def __getitem__(self, key: int) -> dict[str, Any]:
        """The window of ``key``; of a clip that cannot be read, of the next one that can: a long
        run does not end at a file that has been damaged, and a resumed one sees the same."""
        for stand_in in range(STAND_INS):
            try:
                return self.read(key + stand_in)
            except UserError as error:
                if stand_in + 1 in (STAND_INS, len(self)):
                    raise
                warn_unread(error)
        raise AssertionError

    def read(self, key: int) -> dict[str, Any]:
        """The window of ``key``. Raises UserError where its clip cannot be read."""
        epoch, index = divmod(key, len(self.examples))
        example = self.examples[index]
        text = example.text
        if self.augment.active:
            drawn = epoch if self.augment.redraw else 0
            dice = random.Random(f"{self.seed} {drawn} {index}")
            wave, text = self._augmented(index, dice)
            features = self._features(wave)
        elif self.cache is None:
            features = self._features(example.item.load())
        else:
            if index not in self.cache:
                self.cache[index] = self._features(example.item.load())
            features = self.cache[index]
        ids, labels = self.encoder.encode(text, example.language)
        return {**features, "ids": ids, "labels": labels}

    def _augmented(self, index: int, dice: random.Random) -> tuple[np.ndarray, str]:
        """One waveform and its text; both lengths stay inside what the model takes."""
        example = self.examples[index]
        wave, text = example.item.load(), example.text
        if dice.random() < self.augment.concatenate:
            others = (self.examples[i] for i in drawn(self.spoken[example.language], dice))
            wave, text = concatenate_clips(
                wave,
                text,
                ((o.item.load, o.text, o.seconds) for o in others if o is not example),
                pause=int(self.augment.pause_seconds * SAMPLE_RATE),
                limit=self.window,
                joint="" if example.language in SPACELESS else " ",
                fits=lambda joined: self.encoder.fits(joined, example.language),
            )
        return perturb(wave, self.augment, dice, self.window), text

    def _features(self, wave: np.ndarray) -> dict[str, Tensor]:
        """Log-mel features by name, each (mel bins, 3000) float16, and `seconds` of the clip."""
        made = {"seconds": torch.tensor(len(wave) / SAMPLE_RATE)}
        for name, extractor in self.extractors.items():
            mel = extractor(wave, sampling_rate=SAMPLE_RATE, return_tensors="np").input_features[0]
            made[name] = torch.from_numpy(np.ascontiguousarray(mel)).half()
        return made


def drawn(places: np.ndarray, dice: random.Random) -> Iterator[int]:
    """``places`` in an order of chance, each once. Of many, of which a window takes a few, they
    are drawn one by one: 360,000 take 0.18 s to shuffle (``random.Random.shuffle``)."""
    if len(places) <= SHUFFLED:
        order = places.tolist()
        dice.shuffle(order)
        yield from order
        return
    seen = set[int]()
    while len(seen) < len(places):
        place = int(places[dice.randrange(len(places))])
        if place not in seen:
            seen.add(place)
            yield place


class EpochSampler(Sampler[int]):
    """An order for each epoch, from (seed, epoch) alone; yields epoch · length + index.

    With the clips' `seconds` every `batch` clips that follow each other are of about one length:
    the best among `_POOL` batches' clips, so that an epoch's batches are not the last one's.
    """

    _POOL = 16

    def __init__(
        self, length: int, seed: int, seconds: Sequence[float] | None = None, batch: int = 1
    ) -> None:
        self.length, self.seed, self.epoch = length, seed, 0
        self.seconds, self.batch = seconds, batch

    @classmethod
    def over(cls, dataset: Any, train: TrainConfig, by_length: bool) -> EpochSampler:
        """A run's order of ``dataset``; by_length: batches of clips of about one length."""
        seconds = dataset.seconds if by_length else None
        return cls(len(dataset), train.seed, seconds, train.batch_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.length))
        dice = random.Random(f"{self.seed} {self.epoch}")
        dice.shuffle(order)
        if self.seconds is not None:
            pool = self._POOL * self.batch
            for start in range(0, self.length, pool):
                order[start : start + pool] = sorted(
                    order[start : start + pool], key=self.seconds.__getitem__
                )
            whole = self.length // self.batch * self.batch
            batches = [order[i : i + self.batch] for i in range(0, whole, self.batch)]
            dice.shuffle(batches)
            order = [index for batch in batches for index in batch] + order[whole:]
        return iter([self.epoch * self.length + index for index in order])


class Collator:
    """Stacks examples: features float32 (batch, mel, 3000), `seconds` (batch,), tokens padded on
    the right.

    Kept states (see `dqw.distill.states`) come instead of features: `heard` stacked as float32,
    the teacher's rows one after the other. `decoder_mask` (batch, length) bool marks what is not
    padding; `labels` has −100 at padding and at forced positions.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        length = max(len(example["ids"]) for example in examples)
        batch: dict[str, Tensor] = {
            name: torch.stack([example[name] for example in examples]).float()
            for name in ("input_features", "teacher_features", "seconds", "heard")
            if name in examples[0]
        }
        for name in examples[0]:
            if name.startswith("taught"):
                batch[name] = torch.cat([example[name] for example in examples])
        ids = torch.full((len(examples), length), self.pad, dtype=torch.long)
        labels = torch.full((len(examples), length), IGNORE, dtype=torch.long)
        mask = torch.zeros((len(examples), length), dtype=torch.bool)
        for row, example in enumerate(examples):
            size = len(example["ids"])
            ids[row, :size] = torch.tensor(example["ids"])
            labels[row, :size] = torch.tensor(example["labels"])
            mask[row, :size] = True
        return {**batch, "decoder_input_ids": ids, "labels": labels, "decoder_mask": mask}
