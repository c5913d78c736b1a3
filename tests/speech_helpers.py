"""A tiny Whisper's surroundings for the trainer's tests: one-second windows, bytes for tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import make_tiny_whisper
from tokenizers.pre_tokenizers import ByteLevel
from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

SPECIALS = (
    "<|startoftranscript|>", "<|en|>", "<|ja|>",
    "<|transcribe|>", "<|translate|>", "<|notimestamps|>",
)  # fmt: skip


def tiny_processor() -> WhisperProcessor:
    """A byte-level tokenizer of 263 tokens and a feature extractor of 100 frames (1 s)."""
    vocabulary = {"<|endoftext|>": 0}
    for token in [*sorted(ByteLevel.alphabet()), *SPECIALS]:
        vocabulary[token] = len(vocabulary)
    tokenizer = WhisperTokenizer(
        vocab=vocabulary, merges=[], additional_special_tokens=list(SPECIALS)
    )
    return WhisperProcessor(WhisperFeatureExtractor(chunk_length=1), tokenizer)


def tiny_model(**changes):
    """The tiny Whisper of conftest, with `tiny_processor`'s tokens and windows."""
    settings = {
        "vocab_size": 263, "max_source_positions": 50, "pad_token_id": 0, "bos_token_id": 0,
        "eos_token_id": 0, "decoder_start_token_id": 257,
    }  # fmt: skip
    model = make_tiny_whisper(**(settings | changes))
    config = model.generation_config
    config.is_multilingual = True
    config.lang_to_id = {"<|en|>": 258, "<|ja|>": 259}
    config.task_to_id = {"transcribe": 260, "translate": 261}
    config.no_timestamps_token_id = 262
    config.max_length = 64
    return model


@dataclass(frozen=True)
class Noise:
    """A clip of white noise, made from its seed."""

    id: str
    text: str | None = "hello"
    language: str | None = "en"
    seconds: float | None = 0.5
    seed: int = 0
    real_seconds: float = 0.5

    def load(self) -> np.ndarray:
        samples = int(16_000 * self.real_seconds)
        return (np.random.default_rng(self.seed).standard_normal(samples) / 10).astype(np.float32)


def clips(count: int = 6) -> list[Noise]:
    """Labelled clips of different texts and lengths of text."""
    return [Noise(f"clip{i}", "speech " + "abcdefgh"[: i % 5 + 1], seed=i) for i in range(count)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from a second thread, and waiting for one on a busy machine costs
    fifty times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_windows() -> list[dict[str, torch.Tensor]]:
    """A batch of two windows of a tiny Whisper of 50 positions."""
    return [
        {
            "input_features": torch.randn(2, 80, 100),
            "decoder_input_ids": torch.randint(0, 120, (2, 9)),
            "decoder_mask": torch.ones(2, 9, dtype=torch.bool),
        }
    ]
