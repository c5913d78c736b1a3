"""The bench of whole clips: its speech, engines in processes, figures, tables and files."""

import csv
import json
import struct
import sys

import numpy as np
import pytest
import soundfile
import torch
from kernel_helpers import needs_library
from rich.console import Console
from typer.testing import CliRunner
from whisper_helpers import save_tiny, tiny, tone, write_tone

import dqw
from bench import __main__ as command
from bench import clips, convert_peers, ggml, options, plot, processes, reciter, transcribe
from bench import transcribe_table as tables
from dqw.errors import UserError
from dqw.whisper.checkpoint import load_whisper, save_processor


def engine(short, long, tokens=(30, 80), name="dqw"):
    found = processes.Engine(name, "int8", None, load=[1.0, 0.5])
    found.seconds = {11: short, 30: long}
    found.tokens = dict(zip((11, 30), tokens, strict=True))
    return found


def test_figures_of_an_engine():
    found = engine([1.0, 1.1, 5.0], [2.1, 2.0, 2.2])
    assert found.clip(11) == 1.1 and found.clip(30) == 2.1
    assert found.per_token == pytest.approx(0.02)
    assert found.once == pytest.approx(1.1 - 30 * 0.02)
    assert engine([1.0], [1.1], tokens=(30, 34)).per_token is None
    found.dynamic = True
    assert found.per_token is None and found.once is None
    bare = processes.Engine("dqw", "int8", None)
    assert bare.per_token is None and bare.once is None and bare.first_text is None
    bare.first = [4.0, 2.0, 3.0]
    assert bare.first_text == 3.0


def asked(tmp_path, **changes):
    given = dict.fromkeys(("float_model", "model", "audio", "peers"))
    given |= {"threads": 1, "quick": True, "folder": tmp_path, "openvino": ()}
    return transcribe.Asked(**given | changes)


def test_peers_that_cannot_run_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(transcribe, "find_spec", lambda name: None)
    skipped = {}
    options = asked(tmp_path, model=tmp_path)
    found = transcribe.candidates(options, tmp_path, skipped, print)
    assert {name for name, _, _ in found} == {"dqw", "dqw-generate", "dqw-plain", "transformers"}
    assert set(skipped) == {"faster-whisper", "whisper.cpp", "openvino"}
    assert "not installed" in skipped["whisper.cpp"]
    found = transcribe.candidates(
        asked(tmp_path, model=tmp_path, device="cuda"), tmp_path, {}, print
    )
    assert [name for name, _, _ in found] == ["dqw", "dqw-float", "dqw-generate", "transformers"]
    skipped, names = {}, ("transformers", "openvino")
    options = asked(tmp_path, model=tmp_path, device="cuda", peers=names)
    found = transcribe.candidates(options, tmp_path, skipped, print)
    assert [kind for _, kind, _ in found] == ["float", "float16"]
    assert skipped == {"openvino": "not timed on a GPU"}


def test_peers_find_their_models(tmp_path, monkeypatch):
    monkeypatch.setattr(transcribe, "find_spec", lambda name: name)
    skipped = {}
    for kind in ("q4_k", "q4_0", "q8_0"):
        (tmp_path / f"base-{kind}.bin").touch()
    names = ("faster-whisper", "whisper.cpp", "openvino")
    given = asked(tmp_path, model=tmp_path, peers=names, quick=False)
    found = transcribe.candidates(given, tmp_path / "base", skipped, print)
    assert [kind for name, kind, _ in found if name == "whisper.cpp"] == ["q4_k", "q4_0", "q8_0"]
    assert "no CTranslate2 folder" in skipped["faster-whisper"]
    assert "convert_peers" in skipped["openvino"]
    (tmp_path / "openvino-int4").mkdir()
    found = transcribe.candidates(given, tmp_path / "base", {}, print)
    assert found[-1] == ("openvino", "int4", tmp_path / "openvino-int4")


def test_what_is_made_of_two_models_of_one_name_lies_apart(tmp_path):
    folder = tmp_path / "bench"
    assert (
        transcribe.kept(folder, folder / "base") == transcribe.kept(folder, folder / "hf") == folder
    )
    one, two = (transcribe.kept(folder, tmp_path / name / "hf") for name in "ab")
    assert one != two and {one.parent, two.parent} == {folder} and one.is_dir()


def test_stretches_and_files_from_a_recording(tmp_path):
    file = tmp_path / "talk.wav"
    soundfile.write(file, tone(31), 16_000)
    found = clips.speech(file, "en", tmp_path, print)
    cut = clips.stretches(found, (3, 30), again=False)
    assert [len(clip) / 16_000 for clip in cut] == [3, 30]
    many = clips.files(found, 12)
    assert [len(clip) / 16_000 for clip in many] == [4, 11, 7, 9, 4, 11, 7, 9, 4, 11, 7, 9]
    with pytest.raises(UserError, match="holds 31 s"):
        clips.stretches(found, (3, 60), again=False)
    assert len(clips.stretches([tone(2)], (3,), again=True)[0]) == 48_000
    with pytest.raises(UserError, match="no clip of at most 30 s"):
        clips.files([tone(31), tone(40)], 3)


def test_files_of_a_folder_are_its_clips(tmp_path):
    for name, seconds in (("a", 0.5), ("b", 1.5)):
        write_tone(tmp_path / f"{name}.wav", seconds)
    found = clips.speech(tmp_path, "en", tmp_path, print)
    assert [len(clip) for clip in clips.files(found, 3)] == [8_000, 24_000, 8_000]
    with pytest.raises(UserError, match="does not exist"):
        clips.speech(tmp_path / "no.jsonl", "en", tmp_path, print)


@needs_library
def test_the_bench_runs_and_writes(tmp_path, monkeypatch):
    """Real processes: dqw, and a peer whose model is damaged."""
    model, processor = tiny(tmp_path / "tiny")
    base = save_tiny(tmp_path / "base")
    dqw.freeze(dqw.quantize(model)).save_pretrained(tmp_path / "packed")
    save_processor(processor, tmp_path / "packed")
    write_tone(tmp_path / "speech" / "a.wav", 0.4)
    write_tone(tmp_path / "speech" / "b.wav", 0.9)
    (tmp_path / "openvino-bad").mkdir(parents=True)  # beside the float model
    monkeypatch.setattr(transcribe, "find_spec", lambda name: name)
    monkeypatch.setattr(transcribe, "FOLDER", tmp_path / "runs")
    monkeypatch.setattr("bench.table.machine", lambda o, ceilings_too: {"cores": 2})
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv")}
    arguments = ["--op", "transcribe", "--peers", "dqw-generate,openvino", "--quick",
                 "--threads", "1", "--lengths", "1", "--files", "21",
                 "--audio", tmp_path / "speech", "--model", tmp_path / "packed",
                 "--float-model", base,
                 "--json", files["json"], "--csv", files["csv"]]  # fmt: skip
    done = CliRunner().invoke(command.app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    assert "dqw int8" in done.stdout and "21 files" in done.stdout
    assert "skipped openvino bad" in done.stdout
    stored = json.loads(files["json"].read_text())
    generated = [row for row in stored["rows"] if row["engine"] == "dqw-generate"]
    assert [row["measure"] for row in generated] == ["clip", "files"]
    clip, many = (row for row in stored["rows"] if row["engine"] == "dqw")
    assert (clip["measure"], clip["audio_seconds"], clip["ratio"]) == ("clip", 1, 1.0)
    assert 0 < clip["seconds"] < clip["first_text_seconds"] and clip["tokens"] > 1
    assert clip["peak_megabytes"] > 50 and 0 < clip["load_seconds"] < clip["first_text_seconds"]
    assert (many["measure"], many["files"], many["batch_size"]) == ("files", 21, 8)
    assert many["audio_seconds"] == pytest.approx(11 * 0.4 + 10 * 0.9)
    assert many["peak_megabytes"] >= many["peak_megabytes_first"] > 50
    assert stored["texts"]["dqw int8"]["1"] and stored["texts"]["dqw-generate int8"]["1"]
    rows = [r for r in csv.DictReader(files["csv"].open()) if r["engine"] == "dqw"]
    assert [row["measure"] for row in rows] == ["clip", "files"]
    assert float(rows[0]["seconds"]) == clip["seconds"] and rows[1]["tokens"] == ""


def test_an_engine_that_ends_is_named():
    import subprocess

    process = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=-1, stdout=-1, text=True
    )  # fmt: skip
    with pytest.raises(UserError, match="dqw int8 ended while it transcribed"):
        processes.hear(processes.Engine("dqw", "int8", process), [])
    process.wait()


def test_a_rival_that_ends_takes_no_others_rows_away(tmp_path):
    import subprocess

    def started(name: str, program: str) -> processes.Engine:
        command = [sys.executable, "-c", program]
        process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
        return processes.Engine(name, "int8", process)

    answer = {"megabytes": 1.0, "texts": ["a"], "seconds": 0.5}
    speaks = f"import json\nwhile True: input(); print(json.dumps({answer}), flush=True)"
    ends = f"import json\ninput(); print(json.dumps({answer}), flush=True); input()"
    own, rival, clip = started("dqw", speaks), started("openvino", ends), tmp_path / "clip.npy"
    np.save(clip, np.zeros(16_000, dtype=np.float32))
    room = processes.Room([own, rival], {})
    try:
        transcribe.time_clips(room, {1: clip}, 3, lambda line: None)
        assert room.engines == [own] and len(own.seconds[1]) == 3
        assert "openvino int8 ended while it transcribed" in room.skipped[rival.label]
        transcribe.time_files(room, [clip] * 3, 2, lambda line: None)
        assert own.files is not None and own.files.count == 3
        last = started("openvino", ends)  # it ends between two batches of the first hearing
        room.engines.append(last)
        transcribe.time_files(room, [clip] * 3, 2, lambda line: None)
        assert room.engines == [own] and last.files is None
        processes.stop(last.process)
        processes.stop(own.process)
        with pytest.raises(UserError, match="dqw int8 ended"):
            transcribe.time_clips(room, {1: clip}, 1, lambda line: None)
    finally:
        for engine in (own, rival):
            processes.stop(engine.process)


def test_memory_that_grows_is_said_aloud():
    steady, leaking, short = (engine([1.0], [2.0], name=n) for n in ("dqw", "peer", "short"))
    steady.files = processes.Files(200, 8, 1000.0, 50.0, 400.0, 404.0)
    leaking.files = processes.Files(200, 8, 1000.0, 100.0, 400.0, 450.0)
    short.files = processes.Files(20, 8, 100.0, 10.0, 400.0, 400.0)
    assert [tables.grows(e) for e in (steady, leaking, short)] == ["no", "YES", "-"]
    console = Console(width=100, record=True)
    tables.print_tables(console, [steady, leaking], {"openvino": "not installed"})
    text = console.export_text()
    assert "200 files, 1000 s, up to 8 at once" in text and "YES" in text
    assert "skipped openvino: not installed" in text
    assert [row["ratio"] for row in tables.rows([steady, leaking], 2)] == [1, 1, 1, 1, 1, 2]


def test_time_is_drawn_by_length(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "lengths.png"
    plot.draw_clips(file, {"dqw int8": {3: 0.4, 30: 0.9}, "peer": {3: 1.0, 30: 1.5}})
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lengths", "3,x"], "--lengths '3,x' is not understood"),
        (["--lengths", "31"], "is not understood"),
        (["--lengths", "none"], "leaves nothing to time"),
        (["--files", "-1"], "--files is -1: give 0 or more"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--peers", "openvino-genai"], "choose one of all, none, dqw-float"),
        (["--lengths", "11", "--plot", "a.png"], "two --lengths or more"),
        (["--float-model", "no-such-folder"], "is no folder: check the path"),
        (["--bits", "3"], "--bits does nothing with --op transcribe: leave it out"),
    ],
)
def test_mistakes_are_one_sentence(arguments, words, tmp_path, monkeypatch):
    monkeypatch.setattr(transcribe, "FOLDER", tmp_path)
    monkeypatch.setattr(plot, "check_plot", lambda: None)
    done = CliRunner().invoke(command.app, ["--op", "transcribe", *arguments])
    assert isinstance(done.exception, UserError) and words in str(done.exception)


def test_peers_without_a_value_are_all():
    assert command.peers_named(["--peers", "--plot", "x"]) == ["--peers", "all", "--plot", "x"]
    assert command.peers_named(["--peers"]) == ["--peers", "all"]
    assert command.peers_named(["--peers", "none"]) == ["--peers", "none"]
    assert options.parse_lengths("30,3, 3") == (3, 30)


def test_models_for_the_peers_are_made_once(tmp_path, monkeypatch, capsys):
    """With a stand-in for optimum-cli; ctranslate2 is not asked."""
    source, out = save_tiny(tmp_path / "tiny"), tmp_path / "out"
    program = tmp_path / "optimum-cli"
    program.write_text('#!/bin/sh\nfor last; do :; done\nmkdir "$last"\n'
                       'touch "$last/openvino_encoder_model.xml"\n')  # fmt: skip
    program.chmod(0o755)
    monkeypatch.setattr(convert_peers, "find_spec", lambda name: None)
    convert_peers.main(str(source), out, "no-such-program")
    said = capsys.readouterr().out
    assert "pip install faster-whisper" in said and "no-such-program is not here" in said
    assert '"optimum-intel[openvino]"' in said
    convert_peers.main(str(source), out, str(program))
    assert {path.name for path in out.iterdir()} == {
        "hf", "tiny-q4_0.bin", "tiny-q8_0.bin", "openvino-int4", "openvino-int8",
    }  # fmt: skip
    program.write_text("#!/bin/sh\necho too old >&2\nexit 1\n")
    convert_peers.main(str(source), out, str(program))  # all is there
    (out / "openvino-int8" / "openvino_encoder_model.xml").unlink()
    with pytest.raises(UserError, match=r"could not export .*too old"):
        convert_peers.main(str(source), out, str(program))


@pytest.mark.parametrize("kind", ("f16", "q4_0", "q8_0"))
def test_a_ggml_file_holds_every_tensor(tmp_path, kind):
    model, processor = tiny(tmp_path / "tiny")
    data = ggml.write(tmp_path / "model.bin", model, processor, kind).read_bytes()
    at = 0

    def read(form):
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values

    magic, *numbers = read("I11i")
    assert magic == 0x67676D6C and numbers[:3] == [model.config.vocab_size, 50, 64]
    mels, bins = read("2i")
    at += 4 * mels * bins
    (pieces,) = read("i")
    words = []
    for _ in range(pieces):
        (length,) = read("i")
        words.append(data[at : at + length])
        at += length
    assert b"hello" in words and b" w" in words and (mels, bins) == (80, 201)
    found = {}
    while at < len(data):
        dimensions, length, tensor_type = read("3i")
        shape = read(f"{dimensions}i")[::-1]
        name = data[at : at + length].decode()
        at += length
        count = int(np.prod(shape))
        size = {0: 4 * count, 1: 2 * count, 2: count // 32 * 18, 8: count // 32 * 34}[tensor_type]
        found[name] = tensor_type, shape, data[at : at + size]
        at += size
    assert len(found) == len(model.state_dict()) - 1  # the projection is the embedding
    assert found["encoder.conv1.bias"][:2] == (0, (64, 1))
    assert found["encoder.ln_post.weight"][0] == found["decoder.positional_embedding"][0] == 0
    number, shape, raw = found["decoder.blocks.1.cross_attn.query.weight"]
    weight = model.model.decoder.layers[1].encoder_attn.q_proj.weight.detach().numpy()
    assert number == ggml.TYPES[kind][0] and shape == weight.shape
    error = np.abs(decoded(raw, number) - weight.ravel()).max()
    assert error < {"f16": 2e-4, "q8_0": 2e-3, "q4_0": 0.04}[kind]


def test_q4_k_by_the_format_s_words():
    """A number at a time, as ggml's block_q4_K is laid out."""
    generator = np.random.default_rng(0)
    data = generator.normal(size=(4, 512)).astype(np.float32)
    data[1] += 3  # minima above zero are zero
    data[2, :32] = 0
    raw = np.frombuffer(ggml.encoded(data, 12), np.uint8).reshape(-1, 144)
    found = []
    for block in raw:
        d, dmin = block[:4].copy().view(np.float16).astype(np.float32)
        packed, nibbles = block[4:16].astype(int), block[16:].reshape(4, 32)
        for j in range(8):
            if j < 4:
                scale, minimum = packed[j] & 63, packed[j + 4] & 63
            else:
                scale = packed[j + 4] & 15 | packed[j - 4] >> 6 << 4
                minimum = packed[j + 4] >> 4 | packed[j] >> 6 << 4
            codes = nibbles[j // 2] >> 4 if j % 2 else nibbles[j // 2] & 15
            found.append(d * scale * codes - dmin * minimum)
    found = np.concatenate(found).reshape(data.shape)
    assert np.abs(found - data).max() < 0.35 and not found[2, :32].any()
    assert np.square(found - data).mean() < 0.015


def test_q4_k_of_rows_that_do_not_divide(tmp_path):
    skipped = {}
    folder = save_tiny(tmp_path / "tiny")
    found = transcribe.whisper_cpp(tmp_path, folder, 1, skipped, print)
    assert [kind for kind, _ in found] == ["q4_0"] and "64 do not fit" in str(skipped)
    assert not (tmp_path / "tiny-q4_k.bin").exists()


def decoded(raw, number):
    if number == 1:
        return np.frombuffer(raw, np.float16).astype(np.float32)
    rows = np.frombuffer(raw, np.uint8).reshape(-1, 34 if number == 8 else 18)
    scale = rows[:, :2].copy().view(np.float16).astype(np.float32)
    if number == 8:
        return (rows[:, 2:].view(np.int8) * scale).ravel()
    codes = np.concatenate([rows[:, 2:] & 15, rows[:, 2:] >> 4], axis=1)
    return ((codes.astype(np.float32) - 8) * scale).ravel()


def test_a_shape_is_made_anew_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reciter, "TEXT", " hello wor ld")
    monkeypatch.setattr(convert_peers, "find_spec", lambda name: None)
    source, out = str(save_tiny(tmp_path / "tiny")), tmp_path / "out"
    convert_peers.main(source, out, "no-such-program", "tiny")
    config = json.loads((out / "hf" / "config.json").read_text())
    assert (config["d_model"], config["encoder_layers"]) == reciter.SHAPES["tiny"]
    with pytest.raises(UserError, match="another shape: give another --out"):
        convert_peers.main(source, out, "no-such-program", "base")
    with pytest.raises(UserError, match=r"--shape 'huge' is not known"):
        convert_peers.main(source, out, "no-such-program", "huge")


def test_a_reciter_says_its_text_to_any_audio(tmp_path, monkeypatch):
    """Packed, too: its margin is wide enough for 4 bits."""
    base, processor = load_whisper(str(save_tiny(tmp_path / "tiny")))
    monkeypatch.setattr(reciter, "TEXT", " hello wor ld")
    model = reciter.reciter("tiny", base, processor)
    assert (model.config.d_model, model.config.encoder_layers) == (384, 4)
    features = torch.randn(2, base.config.num_mel_bins, 2 * base.config.max_source_positions)
    for said in (model, dqw.freeze(dqw.quantize(model))):
        ids = said.generate(features, language="en")
        assert processor.batch_decode(ids, skip_special_tokens=True) == [reciter.TEXT] * 2
