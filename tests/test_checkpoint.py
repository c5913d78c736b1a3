"""Every kind of checkpoint loads; what is missing, cut or edited is said in one sentence."""

import json

import pytest
import torch
from whisper_helpers import save_ct2, save_tiny, tiny

import dqw
from dqw.errors import UserError
from dqw.whisper.checkpoint import file_sha256, load_whisper, save_processor, verify_folder


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "tiny")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_hugging_face_folder(folder):
    model, processor = load_whisper(folder)
    source, _ = tiny(folder)
    assert model.dtype == torch.float32 and not model.training
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert processor.feature_extractor.n_samples == 16_000
    assert load_whisper(folder, torch.float16)[0].dtype == torch.float16


def test_stored_float16_becomes_the_asked_for_type(folder):
    source, _ = tiny(folder)
    source.half().save_pretrained(folder)
    assert load_whisper(folder)[0].dtype == torch.float32


def test_ct2_folder(tmp_path):
    save_ct2(tmp_path)
    model, _ = load_whisper(tmp_path)
    assert model.dtype == torch.float32 and not model.training


def test_packed_folder(tmp_path):
    model, processor = tiny(tmp_path / "tokenizer")
    packed = dqw.freeze(dqw.quantize(model))
    packed.save_pretrained(tmp_path / "packed")
    save_processor(processor, tmp_path / "packed")
    loaded, _ = load_whisper(tmp_path / "packed")
    assert loaded.state_dict().keys() == packed.state_dict().keys()
    name = "model.encoder.layers.0.fc1.weight"
    assert loaded.state_dict()[name].dtype == torch.uint8
    assert torch.equal(loaded.state_dict()[name], packed.state_dict()[name])


def test_the_spelling_map_survives_a_save(tmp_path):
    _, processor = tiny(tmp_path)
    processor.tokenizer.english_spelling_normalizer = {"colour": "color"}
    save_tiny(tmp_path / "out")
    save_processor(processor, tmp_path / "out")
    _, again = load_whisper(tmp_path / "out")
    assert again.tokenizer.english_spelling_normalizer == {"colour": "color"}
    assert again.tokenizer.normalize("Colour!").strip() == "color"


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_cut_off_weights(folder, keep):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    keep = int(keep * len(data)) if isinstance(keep, float) else keep
    path.write_bytes(data[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is cut off"):
        load_whisper(folder)


def test_edited_weights(folder):
    path = folder / "model.safetensors"
    edit_config(folder, quantization_config={"weights_sha256": file_sha256(path)})
    verify_folder(folder)
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="was changed after it was written"):
        verify_folder(folder)


def test_weights_of_another_model(folder):
    edit_config(folder, encoder_layers=3)
    with pytest.raises(UserError, match="does not hold the weights"):
        load_whisper(folder)


def test_folders_that_are_no_whisper(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="as a pickle"):
        load_whisper(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        load_whisper(folder)
    edit_config(folder, model_type="bert")
    with pytest.raises(UserError, match="type 'bert'"):
        load_whisper(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        load_whisper(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"lacks config\.json"):
        load_whisper(folder)
    with pytest.raises(UserError, match="does not exist; check the path"):
        load_whisper(folder / "none")


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    from transformers import WhisperForConditionalGeneration

    def fail(*args, **kwargs):
        raise OSError("can't connect to the hub\nlong advice")

    monkeypatch.setattr(WhisperForConditionalGeneration, "from_pretrained", fail)
    with pytest.raises(UserError, match=r"openai/none is neither .*\(can't connect to the hub\)"):
        load_whisper("openai/none")


def test_old_checkpoints_stop_forcing_decoder_ids(folder):
    path = folder / "generation_config.json"
    stored = json.loads(path.read_text())
    languages = stored.pop("lang_to_id")
    path.write_text(json.dumps(stored | {"forced_decoder_ids": [[1, 3], [2, 4]]}))
    model, _ = load_whisper(folder)
    assert getattr(model.generation_config, "forced_decoder_ids", None) is None
    assert model.generation_config.lang_to_id == languages


@pytest.mark.parametrize("task", ["translate", "transcribe"])
def test_what_a_fine_tune_forced_are_its_settings(folder, task):
    path, config = folder / "generation_config.json", folder / "config.json"
    stored = json.loads(path.read_text())
    language, english = (stored["lang_to_id"][f"<|{code}|>"] for code in ("ja", "en"))
    forced = [[1, language], [2, stored["task_to_id"][task]]]
    plain = {key: value for key, value in stored.items() if key not in ("task", "language")}
    path.write_text(json.dumps(plain | {"forced_decoder_ids": forced}))
    settings = load_whisper(folder)[0].generation_config
    assert (settings.language, settings.task) == ("<|ja|>", task)
    # OpenAI's own config.json forces English on all.
    path.write_text(json.dumps(plain))
    before = json.loads(config.read_text())
    config.write_text(json.dumps(before | {"forced_decoder_ids": [[1, english], *forced[1:]]}))
    settings = load_whisper(folder)[0].generation_config
    assert (getattr(settings, "language", None), settings.task) == (None, "transcribe")


def test_a_student_that_still_learns_is_told_so(tmp_path):
    model, processor = tiny(tmp_path / "tokenizer")
    dqw.quantize(model).save_pretrained(tmp_path / "learning")
    processor.save_pretrained(tmp_path / "learning")
    with pytest.raises(UserError, match=r"still learns: .* call dqw\.freeze on it"):
        load_whisper(tmp_path / "learning")
