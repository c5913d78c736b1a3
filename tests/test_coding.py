"""Entropy-coded tensors: the same bytes back, few of them, and damage that is noticed."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperForConditionalGeneration
from whisper_helpers import tiny

import dqw
from dqw.choices import _coded_bytes, _some
from dqw.coding import LONG, decoded, decoded_weight, encoded, encoded_weight, huffman_bits
from dqw.convert import quant_modules
from dqw.errors import UserError
from dqw.hf import packed_state
from dqw.packing import pack, packed_bytes
from dqw.recipe import Override, QuantConfig, Recipe
from dqw.save import save_student
from dqw.whisper.checkpoint import verify_folder
from dqw.whisper.native import load
from dqw.whisper.report import inspect_folder

MIXED = Recipe(
    quant=QuantConfig(
        grid="lloyd",
        override=[
            Override(match="*fc1", bits=5, step=0.5),
            Override(match="*embed_tokens", bits=6, step=0.3),
            Override(match="*conv2", bits=4, step=0.9),
            Override(match="*fc2", bits=3, group_size=16),
        ],
    )
)


@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 64), (7, 130), (40, 1023)])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("pieces", [False, True])
def test_a_weight_comes_back(
    bits: int, shape: tuple[int, int], pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:  # and a table for each column
        monkeypatch.setattr("dqw.coding.PIECE", 1000)
        monkeypatch.setattr("dqw.coding.CHUNK", 50)
        monkeypatch.setattr("dqw.coding.LONG", 7)
    packed = pack(torch.randint(0, 2**bits, shape, dtype=torch.uint8), bits)
    stream = encoded_weight(packed, *shape, bits)
    assert torch.equal(decoded_weight(stream, *shape, bits), packed)
    assert len(packed) == packed_bytes(*shape, bits)


def test_codes_take_what_they_say() -> None:
    """Within 3 % of the entropy; a table of ten thousands of codes costs 1 %."""
    level = (torch.randn(400_000) / 0.5).round().clamp(-15, 15).to(torch.uint8)
    share = level.unique(return_counts=True)[1] / level.numel()
    entropy = -float((share * share.log2()).sum())
    assert entropy == pytest.approx(math.log2(math.sqrt(2 * math.pi * math.e) / 0.5), abs=0.02)
    assert entropy < 8 * len(encoded(level)) / level.numel() < 1.03 * entropy


def test_columns_of_other_spreads_have_tables_of_their_own() -> None:
    """Near the sum of the columns' own codes, which is less than one table for all comes to."""
    spread = torch.logspace(-1, 4, 48, base=2.0)
    level = (torch.randn(LONG, 48) * spread).round().clamp(-63, 63)
    codes = (level + 64).to(torch.uint8)
    own = sum(huffman_bits(torch.bincount(column.long())) for column in codes.T) / 8
    packed = pack(codes, 8)
    stream = encoded_weight(packed, *codes.shape, 8)
    assert own - 100 < len(stream) < 1.02 * own + 48 * 70
    assert len(stream) < 0.9 * len(encoded(codes))
    assert torch.equal(decoded_weight(stream, *codes.shape, 8), packed)


def test_huffman_bits_are_those_of_the_shortest_codes() -> None:
    assert huffman_bits(torch.tensor([8, 4, 2, 1, 1, 0])) == 8 * 1 + 4 * 2 + 2 * 3 + 4 + 4
    assert huffman_bits(torch.tensor([0, 5])) == 5  # a code has a bit at least
    assert huffman_bits(torch.tensor([0, 0])) == 0


@pytest.mark.parametrize("rows", [700, 3 * LONG])
def test_some_rows_tell_what_all_will_take(rows: int) -> None:
    spread = torch.logspace(-1, 3, 64, base=2.0)[torch.randperm(64)]
    level = (torch.randn(rows, 64) * spread).round().clamp(-63, 63)
    codes = (level + 64).to(torch.uint8)
    size = len(encoded_weight(pack(codes, 8), *codes.shape, 8))
    assert 0.997 * size < _coded_bytes(_some(codes), rows) < 1.02 * size


def test_a_folder_that_users_have_is_read_as_ever() -> None:
    """`folders/format4` was written once and stays; its vocabulary has a table for each column.
    weights.json: SHA-256 of every dequantized weight, float32."""
    folder = Path(__file__).parent / "folders" / "format4"
    wanted = json.loads((folder / "weights.json").read_text())
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    assert {
        name: hashlib.sha256(module.dequantized_weight().numpy().tobytes()).hexdigest()
        for name, module in quant_modules(model).items()
    } == wanted


def test_damage_is_noticed() -> None:
    stream = encoded(torch.randint(0, 9, (5000,), dtype=torch.uint8))
    for broken in (stream[:-9], stream.flip(0), torch.zeros_like(stream)):
        with pytest.raises(UserError, match="copy the folder again"):
            decoded(broken, 5000)
    with pytest.raises(UserError, match="5000 values instead of 4999"):
        decoded(stream, 4999)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("coding")
    whisper, processor = tiny(path / "float")
    return save_student(dqw.quantize(whisper, MIXED), processor, path / "packed")


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_folder_is_read_as_it_was_written(folder: Path, tmp_path: Path) -> None:
    """By transformers and by the engine, and once more after a save of what was read."""
    coded = verify_folder(folder)["quantization_config"]["coded"]
    assert {name.rpartition(".")[2] for name in coded} == {"weight", "scale"}
    first = WhisperForConditionalGeneration.from_pretrained(folder)
    assert not any(module.coded for module in quant_modules(first).values())
    native = load(folder, verify_folder(folder))
    wanted = packed_state(first)
    for name, tensor in packed_state(native).items():
        assert torch.equal(tensor, wanted[name]), name
    first.save_pretrained(tmp_path)
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    kept = state(again)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in state(first).items())


def test_a_folder_of_format_2_is_read(folder: Path, tmp_path: Path) -> None:
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    own = config["quantization_config"]
    del own["coded"], own["weights_sha256"]
    own["format_version"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(packed_state(model), tmp_path / "model.safetensors", {"format": "pt"})
    found = state(WhisperForConditionalGeneration.from_pretrained(tmp_path))
    assert all(torch.equal(tensor, found[name]) for name, tensor in state(model).items())
    assert load(tmp_path, config).model.decoder.layers[0].fc1.scale.shape == (1, 1)


def test_a_stream_of_another_length_is_named(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.decoder.layers.0.fc1.weight"
    tensors[name] = tensors[name].flip(0).contiguous()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["weights_sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="copy the folder again"):
        WhisperForConditionalGeneration.from_pretrained(tmp_path)


def test_info_counts_weights_and_bytes_of_the_folder(folder: Path) -> None:
    config = verify_folder(folder)
    parts = {part.kind: part for part in inspect_folder(folder).parts}
    assert parts["embedding"].parameters == config["vocab_size"] * config["d_model"]
    coded = config["quantization_config"]["coded"]
    assert parts["embedding"].codes == coded["model.decoder.embed_tokens.weight"]
