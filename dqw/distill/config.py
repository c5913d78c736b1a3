"""What a training run is told: small dataclasses of plain data, one per concern.

Nothing heavy is imported here, so a recipe can hold these as `recipe.distill`, `recipe.guidance`
and `recipe.train` and read them from TOML: every field is a string, a number, a truth value, a
list or a nested table of those. A field that may be absent is `None` by default. Construction
checks every value and raises `UserError` naming the key.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from dqw.errors import UserError

MATCHINGS = ("static_odd", "static_uniform", "dynamic", "restrained", "optimal", "none")
HIDDEN_LOSSES = ("standard", "relative", "mse", "ffn")
GUIDANCE_MODES = ("all", "random", "quant_guided", "distill_guided", "mutual")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
PRECISIONS = ("auto", "float32", "bf16", "fp16")
TEACHER_DTYPES = ("keep", "float32", "bfloat16", "float16")


def _one_of(key: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{key} = {value!r} is not known: choose one of {', '.join(allowed)}.")


def _in_range(
    key: str, value: float, low: float, high: float = float("inf"), open_low: bool = False
) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (low < value if open_low else low <= value) or not value <= high:
        bound = f"more than {low:g}" if open_low else f"at least {low:g}"
        above = "" if high == float("inf") else f" and at most {high:g}"
        raise UserError(f"{key} = {value!r} is out of range: give a number of {bound}{above}.")


def table(kind: Any, values: Any, where: str) -> Any:
    """The dataclass `kind` of a table's `values`, as TOML and JSON give them.

    Raises UserError, starting with `where`, for what is no table, a key that `kind` does not have
    or lacks, and a value of another type.
    """
    if isinstance(values, kind):
        return values
    known = {entry.name: entry for entry in fields(kind)}
    if not isinstance(values, dict):
        raise UserError(f"{where} is {values!r}, no table: give {', '.join(known)} under it.")
    hints = get_type_hints(kind)
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where} has the unknown key {key!r}: known are {', '.join(known)}.")
        if value is None and known[key].default not in (MISSING, None):
            continue  # of settings that 0 turns off
        if not _is_a(hints[key], value):
            default = known[key].default
            like = f", like {default!r}" if default not in (MISSING, None) else ""
            raise UserError(
                f"{where}: {key} is {value!r}, but {_called(hints[key])} is needed{like}."
            )
    for key, entry in known.items():
        if key not in values and entry.default is MISSING and entry.default_factory is MISSING:
            raise UserError(f"{where} lacks {key}: add it.")
    return kind(**values)


def _is_a(hint: Any, value: Any) -> bool:
    """Whether `value` is of a type of `table`'s: plain ones, lists, unions and dataclasses."""
    parts = get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_is_a(parts[0], v) for v in value)
    if parts:
        return any(_is_a(part, value) for part in parts)
    if is_dataclass(hint):
        return True  # its own table is read on its own
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _called(hint: Any) -> str:
    """A type in words."""
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    if get_origin(hint) is list:
        return "a list"
    parts = [part for part in get_args(hint) if part is not type(None)]
    return words.get(parts[0] if parts else hint, str(hint))


@dataclass
class SpecAugmentConfig:
    """SpecAugment as transformers applies it to the student's log-mel features (3000 frames).

    `time_prob` is the share of frames that masked spans cover, `time_length` a span in frames of
    10 ms; `feature_prob` and `feature_length` the same over mel bins. Both probabilities 0: off.
    """

    time_prob: float = 0.0
    time_length: int = 10
    time_min_masks: int = 0
    feature_prob: float = 0.0
    feature_length: int = 10
    feature_min_masks: int = 0

    def __post_init__(self) -> None:
        for axis in ("time", "feature"):
            _in_range(f"spec_augment.{axis}_prob", getattr(self, f"{axis}_prob"), 0, 1)
            _in_range(f"spec_augment.{axis}_length", getattr(self, f"{axis}_length"), 1)
            _in_range(f"spec_augment.{axis}_min_masks", getattr(self, f"{axis}_min_masks"), 0)

    @property
    def active(self) -> bool:
        return self.time_prob > 0 or self.feature_prob > 0


@dataclass
class AugmentConfig:
    """Waveform augmentation for small data; everything is off by default.

    `concatenate` is the probability that clips of the same language are joined, a short pause
    between them, until 30 s are full; `noise` the probability of adding white noise at
    `noise_snr` dB (low, high); `speed` the largest relative change of speed (0.1: 0.9 to 1.1).
    `redraw`: every epoch draws anew; false: a window is the same in every epoch, so that what a
    frozen encoder and the teacher make of it can be kept. `seed` draws the windows; None:
    `train.seed`, which draws their order, too.
    """

    concatenate: float = 0.0
    pause_seconds: float = 0.3
    noise: float = 0.0
    noise_snr: list[float] = field(default_factory=lambda: [10.0, 40.0])
    speed: float = 0.0
    redraw: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        _in_range("augment.concatenate", self.concatenate, 0, 1)
        _in_range("augment.pause_seconds", self.pause_seconds, 0, 10)
        _in_range("augment.noise", self.noise, 0, 1)
        _in_range("augment.speed", self.speed, 0, 0.5)
        if len(self.noise_snr) != 2 or self.noise_snr[0] > self.noise_snr[1]:
            raise UserError(
                f"augment.noise_snr = {self.noise_snr!r} is not a range: give two numbers in dB, "
                "the lower one first."
            )

    @property
    def active(self) -> bool:
        return self.concatenate > 0 or self.noise > 0 or self.speed > 0


@dataclass
class DistillConfig:
    """What the student learns from: loss = ce·CE + kl·KL + hidden·(mean over distilled layers).

    Attributes:
        ce: weight of the cross entropy on the labels.
        kl: weight of the logits KL, temperature² · KL(teacher ‖ student), mean over tokens.
        temperature: softens both distributions of the KL.
        hidden: weight of the hidden-state term; 0 turns its computation off.
        hidden_loss: `standard` (squared error over the teacher state's variance, per feature),
            `relative` (the same over all features at once), `mse`, or `ffn` (the authors' variant:
            softmax over the activations inside the feed-forward block).
        hidden_temperature: temperature of the softmax in `ffn`.
        matching: which teacher layer a student layer learns from.
        matching_interval: optimizer steps between two choices of a matching that depends on losses.
        matching_rows: at most this many rows per layer decide such a matching (all rows train).
        encoder_states: distil encoder layers: `auto` (if the widths are equal), `always`, `never`.
        projection: `shared` (one per stack) or `layer` (one per teacher layer), teacher → student
            width; trained, then thrown away.
        teacher_masked: the teacher also sees the SpecAugment mask (default: clean features).
        teacher_labels: `missing` (label audio without text), `all` (replace every text), `never`.
        teacher_dtype: the teacher's own dtype, or `keep`.
        audio_context: `full`, or `dynamic`: the student hears its clips and a random margin, not
            padded to 30 s (`dqw.whisper.context`), the teacher all of it; hidden states are
            compared where both have some. Batches are then made of clips of about one length.
        calibration_clips: before the first step, the quantized weights are rounded with
            error compensation on this many training windows (`dqw.calibrate`); 0: not.
    """

    ce: float = 0.1
    kl: float = 0.9
    temperature: float = 1.0
    hidden: float = 0.5
    hidden_loss: str = "standard"
    hidden_temperature: float = 1.0
    matching: str = "optimal"
    matching_interval: int = 1
    matching_rows: int = 1024
    encoder_states: str = "auto"
    projection: str = "shared"
    teacher_masked: bool = False
    teacher_labels: str = "missing"
    teacher_dtype: str = "keep"
    audio_context: str = "full"
    calibration_clips: int = 0
    spec_augment: SpecAugmentConfig = field(default_factory=SpecAugmentConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        self.spec_augment = table(SpecAugmentConfig, self.spec_augment, "distill.spec_augment")
        self.augment = table(AugmentConfig, self.augment, "distill.augment")
        for key in ("ce", "kl", "hidden"):
            _in_range(f"distill.{key}", getattr(self, key), 0)
        if self.ce == self.kl == self.hidden == 0:
            raise UserError(
                "distill.ce, distill.kl and distill.hidden are all 0, so there is nothing to "
                "learn: give at least one of them a positive weight."
            )
        for key in ("temperature", "hidden_temperature"):
            _in_range(f"distill.{key}", getattr(self, key), 0, open_low=True)
        _in_range("distill.calibration_clips", self.calibration_clips, 0)
        for key in ("matching_interval", "matching_rows"):
            _in_range(f"distill.{key}", getattr(self, key), 1)
        _one_of("distill.hidden_loss", self.hidden_loss, HIDDEN_LOSSES)
        _one_of("distill.matching", self.matching, MATCHINGS)
        _one_of("distill.encoder_states", self.encoder_states, ("auto", "always", "never"))
        _one_of("distill.projection", self.projection, ("shared", "layer"))
        _one_of("distill.teacher_labels", self.teacher_labels, ("missing", "all", "never"))
        _one_of("distill.teacher_dtype", self.teacher_dtype, TEACHER_DTYPES)
        _one_of("distill.audio_context", self.audio_context, ("full", "dynamic"))

    @property
    def uses_hidden(self) -> bool:
        return self.hidden > 0 and self.matching != "none"


@dataclass
class GuidanceConfig:
    """Which layers are distilled and which are quantized, chosen anew every `interval` steps.

    Attributes:
        mode: `all` (no choice), `random`, `mutual`, or one of its rules alone: `quant_guided`
            (quantization loss chooses the distilled layers, all are quantized) and
            `distill_guided` (distillation loss chooses the quantized layers, all are distilled).
        quantize_ratio: share of the transformer layers that is quantized.
        distill_ratio: share of the transformer layers that is distilled.
        quantize_first: `smallest` or `largest` distillation loss first.
        distill_first: `smallest` or `largest` quantization loss first.
        scope: rank within each `stack` (encoder, decoder) or over the whole `model`.
        interval: optimizer steps between two choices.
        smoothing: share of the old value in the moving average of each loss (0: none).
        probe_clips: clips of the current batch on which the losses are measured.
        seed: seed of `random`.
    """

    mode: str = "all"
    quantize_ratio: float = 0.5
    distill_ratio: float = 0.5
    quantize_first: str = "smallest"
    distill_first: str = "largest"
    scope: str = "stack"
    interval: int = 100
    smoothing: float = 0.5
    probe_clips: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("guidance.mode", self.mode, GUIDANCE_MODES)
        _one_of("guidance.scope", self.scope, ("stack", "model"))
        for key in ("quantize_first", "distill_first"):
            _one_of(f"guidance.{key}", getattr(self, key), ("smallest", "largest"))
        for key in ("quantize_ratio", "distill_ratio"):
            _in_range(f"guidance.{key}", getattr(self, key), 0, 1)
        for key in ("interval", "probe_clips"):
            _in_range(f"guidance.{key}", getattr(self, key), 1)
        if not 0 <= self.smoothing < 1:
            raise UserError(
                f"guidance.smoothing = {self.smoothing!r} is out of range: give a number of at "
                "least 0 and less than 1."
            )


@dataclass
class TrainConfig:
    """How long and how fast: the optimizer, its schedule, batches, checkpoints, logs.

    `steps` 0 means `epochs` passes over the data, and both 0 that nothing is trained. `lr`,
    `clip_lr` (learned clips) and `projection_lr` are peak learning rates under one schedule; only
    matrices under `lr` decay.
    `language` is taken for items that name none. `save_steps` 0 writes one checkpoint, at the
    end. `cache_features` keeps log-mel features in memory as float16 (480 kB a clip at 80 mels);
    `auto` does so up to 2,000 clips. `cache_states` keeps, on disk beside the run, what the
    teacher and a frozen encoder make of each window (1.7 MB for base): `auto` does so where that
    does not change from epoch to epoch (`dqw.distill.states`), `always` insists. `precision` is
    that of the matrix products: `auto` takes bf16 where the machine multiplies it in hardware
    (weights, optimizer and losses stay float32; measured on two Zen 4 cores: 1.4 times the speed of
    float32), else float32.
    """

    steps: int = 0
    epochs: float = 1.0
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 1e-5
    clip_lr: float = 1e-4
    projection_lr: float = 1e-3
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    max_grad_norm: float = 1.0
    schedule: str = "linear"
    warmup_steps: int = 0
    precision: str = "auto"
    freeze_encoder: bool = False
    freeze_embedding: bool = False
    language: str | None = None
    seed: int = 0
    workers: int = 0
    cache_features: str = "auto"
    cache_states: str = "auto"
    save_steps: int = 0
    keep_checkpoints: int = 2
    log_steps: int = 1
    label_batch_size: int = 8
    tensorboard: bool = True

    @property
    def wanted(self) -> bool:
        """Whether there is anything to train."""
        return bool(self.steps or self.epochs)

    def __post_init__(self) -> None:
        _in_range("train.steps", self.steps, 0)
        _in_range("train.epochs", self.epochs, 0)
        for key in ("batch_size", "accumulate", "keep_checkpoints", "log_steps"):
            _in_range(f"train.{key}", getattr(self, key), 1)
        _in_range("train.label_batch_size", self.label_batch_size, 1)
        for key in ("warmup_steps", "save_steps", "workers"):
            _in_range(f"train.{key}", getattr(self, key), 0)
        for key in ("lr", "clip_lr", "projection_lr", "weight_decay", "max_grad_norm"):
            _in_range(f"train.{key}", getattr(self, key), 0)
        _in_range("train.seed", self.seed, 0, 2**32 - 1)
        _one_of("train.schedule", self.schedule, SCHEDULES)
        _one_of("train.precision", self.precision, PRECISIONS)
        _one_of("train.cache_features", self.cache_features, ("auto", "always", "never"))
        _one_of("train.cache_states", self.cache_states, ("auto", "always", "never"))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(
                f"train.betas = {self.betas!r} is not a pair: give two numbers of at least 0 and "
                "less than 1."
            )


def check_settings(config: DistillConfig, train: TrainConfig) -> None:
    """Raise UserError where there is nothing to train, or two tables exclude each other."""
    if not train.wanted:
        raise UserError("train.steps and train.epochs are both 0: give one of them to train.")
    if train.cache_features == "always" and train.workers:
        raise UserError(
            "train.cache_features = 'always' keeps nothing where train.workers read the clips, as "
            "they end with each epoch: set one of them to 'auto' or 0."
        )
    if train.cache_features == "always" and config.augment.active:
        raise UserError(
            "train.cache_features = 'always' keeps nothing where clips are augmented: set it to "
            "'auto', or every number of distill.augment to 0."
        )
    if config.audio_context == "dynamic" and train.freeze_encoder:
        raise UserError(
            "distill.audio_context = 'dynamic' needs an encoder that learns to hear less: set "
            "train.freeze_encoder = false."
        )
