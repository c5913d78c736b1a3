"""faster-whisper folders: every storage type gives the weights back, and damage is named."""

import json

import pytest
import torch
from whisper_helpers import MERGES, ct2_bytes, ct2_variables, save_ct2, tiny, tokenizer_json

from dqw.errors import UserError
from dqw.whisper.ct2 import load_ct2, read_model_bin
from dqw.whisper.tokenizer import load_tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float_weights_come_back_bit_for_bit(tmp_path, dtype):
    source = save_ct2(tmp_path, dtype).state_dict()
    model, _ = load_ct2(tmp_path)
    loaded = model.state_dict()
    assert loaded.keys() == source.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, source[name].to(dtype).float()), name
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    assert load_ct2(tmp_path, torch.float16)[0].dtype == torch.float16


@pytest.mark.parametrize(("dtype", "steps"), [(torch.int8, 127), (torch.int16, 1024)])
def test_quantized_weights_come_back_within_half_a_step(tmp_path, dtype, steps):
    source = save_ct2(tmp_path, dtype).state_dict()
    largest = max(tensor.abs().max() for tensor in source.values())
    for name, tensor in load_ct2(tmp_path)[0].state_dict().items():
        # int8 has a scale a row, int16 one for all of a fused matrix
        bound = 0.5001 * (source[name].abs().max() if dtype == torch.int8 else largest) / steps
        assert (tensor - source[name]).abs().max() <= bound, name


def test_configs_and_processor(tmp_path):
    source = save_ct2(tmp_path)
    (tmp_path / "normalizer.json").write_text('{"colour": "color"}')
    model, processor = load_ct2(tmp_path)
    shape = (
        "vocab_size", "d_model", "num_mel_bins", "encoder_layers", "decoder_attention_heads",
        "decoder_ffn_dim", "max_source_positions", "eos_token_id",
    )  # fmt: skip
    for key in shape:
        assert getattr(model.config, key) == getattr(source.config, key), key
    ours, theirs = model.generation_config.to_dict(), source.generation_config.to_dict()
    for key in ("lang_to_id", "task_to_id", "no_timestamps_token_id", "suppress_tokens",
                "begin_suppress_tokens", "is_multilingual", "max_length"):  # fmt: skip
        assert ours[key] == theirs[key], key
    tokenizer = processor.tokenizer
    assert processor.feature_extractor.n_samples == 16_000
    assert tokenizer.english_spelling_normalizer == {"colour": "color"}
    ids = tokenizer("hello, wörld 世界").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello, wörld 世界"
    assert len(tokenizer("hello", add_special_tokens=False).input_ids) == 1
    first = model.generation_config.no_timestamps_token_id + 1
    timed = [first, *tokenizer("hello", add_special_tokens=False).input_ids, first + 50]
    assert tokenizer.decode(timed, decode_with_timestamps=True) == "<|0.00|>hello<|1.00|>"


def test_a_tokenizer_without_timestamps_gets_them(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(times=())))
    tokenizer = load_tokenizer(tmp_path)
    last = tokenizer.convert_tokens_to_ids("<|30.00|>")
    assert last == tokenizer.convert_tokens_to_ids("<|notimestamps|>") + 1501


def test_a_file_cut_anywhere_is_named(tmp_path):
    save_ct2(tmp_path)
    path = tmp_path / "model.bin"
    data = path.read_bytes()
    for size in (0, 3, 9, 40, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"model\.bin is (cut off|empty)"):
            load_ct2(tmp_path)
    path.write_bytes(data + b"x")
    with pytest.raises(UserError, match="1 bytes too many"):
        load_ct2(tmp_path)


def test_files_that_are_something_else(tmp_path):
    model, _ = tiny(tmp_path)
    variables = ct2_variables(model, torch.float16)
    path = tmp_path / "model.bin"
    path.write_bytes(ct2_bytes(variables, version=3))
    with pytest.raises(UserError, match="binary version 3, and 4 to 6"):
        read_model_bin(path)
    path.write_bytes(ct2_bytes(variables, spec="TransformerSpec"))
    with pytest.raises(UserError, match="'TransformerSpec', not a WhisperSpec"):
        read_model_bin(path)
    path.write_bytes(ct2_bytes({k: v for k, v in variables.items() if "conv2" not in k}))
    with pytest.raises(UserError, match="lacks the variable encoder/conv2/weight"):
        load_ct2(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read_model_bin(tmp_path / "none" / "model.bin")


def test_tokenizers_that_would_encode_wrongly(tmp_path):
    save_ct2(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json(merges=MERGES[1:])))
    with pytest.raises(UserError, match="261 pieces for 4 merges"):
        load_ct2(tmp_path)
    path.write_text(json.dumps(tokenizer_json())[:-40])
    with pytest.raises(UserError, match="is damaged"):
        load_ct2(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"lacks tokenizer\.json"):
        load_ct2(tmp_path)
