"""Shared fixtures: a tiny random Whisper, and uninitialised memory that shows."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# With these typer and rich colour what they print, and tests look for plain words.
for _name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"):
    os.environ.pop(_name, None)
os.environ["DQW_POISON"] = "1"  # before the library is loaded: see csrc/cpu/tensors.h


def make_tiny_whisper(**changes: int):  # type: ignore[no-untyped-def]
    """A random Whisper of 2+2 layers, width 64, 120 tokens, 3000 mel frames, in eval mode."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    settings = {
        "vocab_size": 120,
        "num_mel_bins": 80,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "max_source_positions": 1500,
        "max_target_positions": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    torch.manual_seed(0)
    config = WhisperConfig(**(settings | changes))
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "embed_positions" not in name:
                p.normal_(0, 0.08)
            elif name.endswith("bias"):
                p.normal_(0, 0.02)
    return model


@pytest.fixture
def tiny_whisper():  # type: ignore[no-untyped-def]
    return make_tiny_whisper()


@pytest.fixture
def encoder():  # type: ignore[no-untyped-def]
    """Labels as the tiny processor's tokenizer makes them, of up to 64 tokens."""
    from speech_helpers import tiny_processor

    from dqw.distill.data import LabelEncoder

    return LabelEncoder(tiny_processor().tokenizer, True, 64)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny float Whisper as a Hugging Face folder."""
    from whisper_helpers import save_tiny

    return save_tiny(tmp_path / "base")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three labelled clips and a manifest."""
    from whisper_helpers import save_speech

    return save_speech(tmp_path / "clips", ("hello", "hello world", "wow"))


@pytest.fixture(autouse=True)
def _poisoned_empty() -> Iterator[None]:
    """torch.empty gives NaN, as the C++ library's memory does, so a kernel that forgets to write an
    element fails its test. Threads are as they were for the next test."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
