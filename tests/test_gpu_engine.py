"""Decoding as on a GPU, with the CPU in its place: the same functions, not captured, and the
reference of their kernels. tests/decoder_step_cases.py holds the kernels to that reference."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from speech_helpers import one_thread  # noqa: F401
from test_fast import save_packed
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput
from whisper_helpers import save_tiny, tiny, voices

import dqw
from dqw.errors import UserError
from dqw.recipe import Recipe
from dqw.whisper import gpu
from dqw.whisper.checkpoint import load_whisper
from dqw.whisper.coverage import gpu_uncovered
from dqw.whisper.decoding import Rules
from dqw.whisper.engines import NativeEngine, PlainEngine, open_engine
from dqw.whisper.gpu import Graphs, graphs_of
from dqw.whisper.listener import Listener
from dqw.whisper.transcribe import iter_transcripts, transcribe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_packed(tmp_path_factory.mktemp("packed"))


def graphed(folder) -> NativeEngine:
    """Float32 on the CPU, decoded as on a GPU."""
    engine = open_engine(folder)
    assert isinstance(engine, NativeEngine)
    return NativeEngine(engine.model, engine.settings, engine.log_mel, engine.pieces, graphs=True)


def exact(folder) -> tuple:
    """The model as float32 layers of transformers, which no processor rounds, and its processor."""
    model, processor = load_whisper(folder)
    return dqw.dequantize(model).eval(), processor


@pytest.mark.parametrize("options", [{}, {"timestamps": True}, {"language": "de"},
                                     {"task": "translate", "batch_size": 3}])  # fmt: skip
def test_it_says_what_transformers_says(folder, options):
    audios = voices(0.4, 0.9, 2.5, 0.2, 3.7, 1.0)
    wanted = transcribe(*exact(folder), audios, **options)
    assert dict(iter_transcripts(graphed(folder), audios, **options)) == dict(enumerate(wanted))
    assert len({t.text for t in wanted}) > 2 and wanted[2].segments


def test_a_float_model_on_a_gpu_is_decoded_so_too(tmp_path, monkeypatch):
    model, processor = tiny(tmp_path)
    audios = voices(0.4, 0.9, 2.5)
    wanted = transcribe(model.eval(), processor, audios)
    engine = PlainEngine(model, processor)
    monkeypatch.setattr(engine, "generate", None)
    engine._graphs = Graphs(model)
    assert dict(iter_transcripts(engine, audios)) == dict(enumerate(wanted))


def attentive(path) -> tuple:
    """A model that says something else of every audio, and its processor."""
    model, processor = tiny(path)
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.encoder_attn.v_proj.weight.mul_(30)
            layer.encoder_attn.out_proj.weight.mul_(30)
    return model.eval(), processor


@torch.inference_mode()
def plainly(model, states: Tensor, prompt: Tensor, rules: Rules) -> list[list[int]]:
    """One sequence at a time, all of it anew for every token; up to the end."""
    rows = []
    for row, state in zip(prompt, states, strict=True):
        ids = row[None]
        while ids.shape[1] < rules.longest and (ids[0, rules.begin :] != rules.end).all():
            hidden = model.model.decoder(input_ids=ids, encoder_hidden_states=state[None])
            scores = model.proj_out(hidden[0][:, -1]).float()
            for processor in rules.processors():
                scores = processor(ids, scores)
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
        rows.append(ids[0].tolist())
    return rows


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("clips", [1, 3])
def test_rules_ends_and_padding(tmp_path, clips, timestamps):
    """Row by row what the model says under the rules, whenever the others end."""
    model, _ = attentive(tmp_path)
    settings = model.generation_config
    first, end = settings.no_timestamps_token_id + 1, settings.eos_token_id
    states = 3 * torch.randn(clips, 50, model.config.d_model)
    prompt = torch.tensor([[end + 1, end + 2, end + 5, first - 1][: 4 - timestamps]] * clips)
    decoder, lengths = Graphs(model), set()
    spoken = first if timestamps else model.config.vocab_size
    few = tuple(i for i in range(spoken) if i not in (5, 6, end))
    for always in ((), tuple(range(0, end, 2)), few):
        rules = Rules(
            prompt.shape[1], 24, end, first, always, first=(end,), timestamps=timestamps, latest=20
        )
        found = decoder.greedy(states, prompt, rules).tolist()
        wanted = plainly(model, states, prompt, rules)
        longest = max(map(len, wanted))
        assert found == [row + [end] * (longest - len(row)) for row in wanted]
        lengths |= set(map(len, wanted))
    assert clips == 1 or len(lengths) > 1


def test_a_loop_ends_where_the_guard_ends_it(tmp_path):
    """One token without end, until the guard's look at 40 tokens; as on the native networks."""
    model, _ = tiny(tmp_path)
    config = model.generation_config
    model.config.max_target_positions = 60
    embedding = torch.nn.Embedding(60, model.config.d_model)
    embedding.weight.data = model.model.decoder.embed_positions.weight[:1].detach().repeat(60, 1)
    model.model.decoder.embed_positions.weight = embedding.weight
    end, first = config.eos_token_id, config.no_timestamps_token_id + 1
    only = tuple(i for i in range(model.config.vocab_size) if i != 5)
    rules = Rules(4, 60, end, first, always=only)
    prompt = torch.tensor([[end + 1, end + 2, end + 5, first - 1]])
    states = torch.randn(1, 50, model.config.d_model)
    found = Graphs(model.eval()).greedy(states, prompt, rules)[0].tolist()
    assert found == [*prompt[0].tolist(), *[5] * 36, end]
    assert found == plainly(model, states, prompt, rules)[0]


def test_the_language_is_that_of_transformers(tmp_path):
    model, processor = attentive(tmp_path)
    engine, states = PlainEngine(model, processor), torch.randn(5, 50, model.config.d_model)
    wanted = model.detect_language(encoder_outputs=BaseModelOutput(states)).tolist()
    for graphs in (None, Graphs(model)):
        engine._graphs = graphs
        listener = Listener(engine)
        found, _ = listener.said(states, [None] * 5, False)
        assert found == [listener.languages[i] for i in wanted] and len(set(wanted)) > 1


def test_keys_of_the_audio_are_made_once_for_language_and_text(tmp_path, monkeypatch):
    """And anew whenever there could be others in the same tensor."""
    model, _ = attentive(tmp_path)
    graphs, made, hear = Graphs(model), [], Graphs._hear
    monkeypatch.setattr(Graphs, "_hear", lambda *a: made.append(1) or hear(*a))
    states, start = torch.randn(3, 50, model.config.d_model), model.config.decoder_start_token_id
    prompt = torch.full((3, 1), start)
    rules = Rules(1, 20, model.generation_config.eos_token_id, 300)

    def decoded():
        graphs.session(states, 1).step(prompt)
        return graphs.greedy(states, prompt, rules)

    first = decoded()
    assert len(made) == 1
    assert torch.equal(graphs.greedy(states, prompt, rules), first) and len(made) == 2
    graphs.session(states, 1).step(prompt)
    states.copy_(torch.randn_like(states))
    changed = graphs.greedy(states, prompt, rules)
    assert len(made) == 4 and not torch.equal(changed, first)
    assert torch.equal(changed, decoded())


def test_memory_is_free_when_nobody_refers_to_it(tmp_path, monkeypatch):
    """Without waiting for Python's search for cycles."""
    monkeypatch.setattr(gpu, "_on_gpu", lambda model: True)
    gc.collect()
    gc.disable()
    try:
        model, processor = load_whisper(save_tiny(tmp_path))
        graphs = graphs_of(model)
        assert PlainEngine(model, processor)._graphs is graphs is graphs_of(model)
        states = torch.randn(1, 50, model.config.d_model)
        for count in (1, 8, 64, 512):  # the first ones make room
            graphs.session(states.expand(count, -1, -1))
        assert list(graphs._batches) == [8, 64, 512]
        graphs.session(states.expand(5, -1, -1))
        assert list(graphs._batches) == [64, 512, 8]  # a larger one does
        alive = [weakref.ref(graphs._batches[8]), weakref.ref(graphs), weakref.ref(model)]
        del graphs
        model.train()
        assert graphs_of(model) is None
        assert alive[0]() is None and alive[1]() is None
        del model
        assert alive[2]() is None
    finally:
        gc.enable()


def test_too_little_memory_is_tried_again_and_then_a_sentence(tmp_path, monkeypatch):
    model, _ = attentive(tmp_path)
    graphs, heard = Graphs(model), Graphs._heard
    states = torch.randn(2, 50, model.config.d_model)
    graphs.session(states.expand(2, -1, -1))
    failures = [True]

    def narrow(self, *args, **options):
        if failures.pop() if failures else False:
            raise torch.OutOfMemoryError("no room")
        return heard(self, *args, **options)

    monkeypatch.setattr(Graphs, "_heard", narrow)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert graphs.session(states).step(torch.full((2, 1), 7)).shape[0] == 2
    failures += [True, True]
    with pytest.raises(UserError, match="smaller --batch-size"):
        graphs.session(states)


def test_a_session_ends_with_the_positions(tmp_path):
    model, _ = attentive(tmp_path)
    session = Graphs(model).session(torch.randn(1, 50, model.config.d_model))
    session.step(torch.full((1, 24), 7))
    with pytest.raises(IndexError, match="24 tokens at most"):
        session.step(torch.full((1, 1), 7))


def test_a_packed_folder_with_a_float_vocabulary(tmp_path, monkeypatch):
    save_packed(tmp_path, embedding_bits=0)
    monkeypatch.setattr("dqw.whisper.engines.move_to", lambda *_: None)
    engine = open_engine(tmp_path, device="cuda")
    assert isinstance(engine.native(), Graphs)
    wanted = transcribe(*exact(tmp_path), voices(0.4, 0.9))
    assert dict(iter_transcripts(engine, voices(0.4, 0.9))) == dict(enumerate(wanted))


def test_what_graphs_do_not_serve_is_named(tmp_path, folder):
    model, _ = load_whisper(folder)
    assert gpu_uncovered(model) == ""
    model.model.encoder.layers[0].register_forward_hook(lambda *_: None)
    assert "has hooks" in gpu_uncovered(model)
    model, _ = load_whisper(folder)
    layer = model.model.decoder.layers[0]
    layer.forward = layer.forward
    assert "a forward of its own" in gpu_uncovered(model)
    del layer.forward
    layer.fc1 = type("Linear4bit", (torch.nn.Linear,), {})(64, 64).eval()
    assert "fc1 is a Linear4bit" in gpu_uncovered(model)
    model, _ = load_whisper(save_tiny(tmp_path))
    assert gpu_uncovered(model) == ""
    assert "training mode" in gpu_uncovered(model.train())
    assert "not packed" in gpu_uncovered(dqw.quantize(model, Recipe()).eval())
    model.config.activation_function = "relu"
    assert "activation function" in gpu_uncovered(model)


def test_projections_packed_alike_share_a_launch(folder, monkeypatch):
    engine = graphed(folder)
    assert all(engine.native().same_levels)
    layer = engine.model.model.decoder.layers[0].self_attn
    layer.k_proj.levels = layer.k_proj.levels.flip(0)
    assert Graphs(engine.model).same_levels[0] is False


@pytest.mark.parametrize("options", [
    {"language": "en"}, {}, {"return_timestamps": True}, {"language": "de", "num_beams": 2},
])  # fmt: skip
def test_generate_runs_on_the_graphs(folder, monkeypatch, options):
    """The same tokens, language detected or given; beams stay with transformers."""
    model, processor = load_whisper(folder)
    features = processor(
        voices(0.4, 0.9, 0.7), sampling_rate=16_000, return_tensors="pt"
    ).input_features
    plain = dqw.dequantize(copy.deepcopy(model))
    want = plain.generate(features, **options)
    monkeypatch.setattr(gpu, "_on_gpu", lambda model: True)
    steps, step = [], gpu.GpuSession.step
    monkeypatch.setattr(
        gpu.GpuSession, "step", lambda self, ids: steps.append(1) or step(self, ids)
    )
    for _ in range(2):
        assert torch.equal(model.generate(features, **options), want)
    assert bool(steps) == ("num_beams" not in options)
    known = model._dqw_graphs[1]
    asked = {**options, "return_dict_in_generate": True, "output_scores": True}
    if "return_timestamps" not in options:
        found, theirs = model.generate(features, **asked), plain.generate(features, **asked)
        assert torch.equal(found.sequences, theirs.sequences) and known is model._dqw_graphs[1]
        for mine, other in zip(found.scores, theirs.scores, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    assert model.float() is model and not hasattr(model, "_dqw_graphs")
    model.generate(features, **options)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin._dqw_graphs[1] is None
        assert torch.equal(twin.generate(features, **options), want)


def test_generate_makes_graphs_anew_when_layers_change(folder, monkeypatch):
    monkeypatch.setattr(gpu, "_on_gpu", lambda model: True)
    model, processor = load_whisper(folder)
    features = processor(voices(0.4), sampling_rate=16_000, return_tensors="pt").input_features
    before = model.generate(features, language="en")
    embedding = model.model.decoder.embed_tokens
    embedding.scale = embedding.scale * torch.linspace(0.1, 3.0, len(embedding.scale))[:, None]
    after = model.generate(features, language="en")
    plain = dqw.dequantize(copy.deepcopy(model))
    assert torch.equal(after, plain.generate(features, language="en"))
    assert not torch.equal(after, before)
    model.model.decoder.layers[0].fc1.register_forward_hook(lambda *_: None)
    assert graphs_of(model) is None and not hasattr(model, "_dqw_graphs")
