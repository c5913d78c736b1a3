"""What dqw transcribe is given: files, folders, pipes; where their texts go."""

import io
import os
import threading
from pathlib import Path

import pytest
from test_cli import audio, dqw_, model  # noqa: F401
from typer.testing import CliRunner
from whisper_helpers import write_tone

from dqw.cli import app
from dqw.errors import UserError
from dqw.whisper.inputs import Piped, find_inputs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tone(tmp_path / "in" / "b.wav")
    write_tone(tmp_path / "in" / "day one" / "a.flac", 0.7)
    write_tone(tmp_path / "in" / "day two" / "a.wav", 0.6)
    (tmp_path / "in" / ".hidden.wav").write_bytes(b"no")
    (tmp_path / "in" / "notes.txt").write_text("no audio")
    return tmp_path / "in"


def test_a_folder_is_all_audio_below_it(folder):
    found = find_inputs([folder])
    assert [str(one.stem) for one in found] == ["b", "day one/a", "day two/a"]
    assert [one.audio for one in found][1] == folder / "day one" / "a.flac"
    assert found[1].target(Path("out"), "srt") == Path("out/day one/a.srt")
    dotted = find_inputs([folder / "b.wav", Path("v1.2.wav")])
    assert [one.target(Path("x"), "txt").name for one in dotted] == ["b.txt", "v1.2.txt"]
    (folder / "none").mkdir()
    with pytest.raises(UserError, match="none holds no audio; name files, or their folder"):
        find_inputs([folder / "none"])


def test_texts_of_a_folder_lie_as_its_audio(folder, model, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    command = ("transcribe", folder, "--model", model, "--language", "en", "--output-dir")
    result = dqw_(*command, out)
    assert result.exit_code == 0 and "wrote 3 files" in result.stderr, result.output
    written = sorted(p.relative_to(out).as_posix() for p in out.rglob("*.txt"))
    assert written == ["b.txt", "day one/a.txt", "day two/a.txt"]
    (out / "day two" / "a.txt").unlink()
    result = dqw_(*command, out, "--skip-existing")
    assert "2 of 3 are written already" in result.stderr and "wrote 1 files" in result.stderr
    two = dqw_("transcribe", folder, folder / "b.wav", *command[2:], out)
    assert two.exit_code == 1 and "would write the same output file" in two.stderr
    (folder / "day one" / "a.txt").write_text("what was said")
    beside = dqw_(*command, folder)
    assert beside.exit_code == 1 and "day one/a.txt is there already" in beside.stderr
    assert not (folder / "b.txt").exists()
    printed = dqw_(*command[:-1])
    heads = [line for line in printed.stdout.splitlines() if line.startswith(str(folder))]
    assert heads == [f"{folder}/{name}:" for name in ("b.wav", "day one/a.flac", "day two/a.wav")]


def test_audio_from_a_pipe(model, tmp_path):  # noqa: F811
    data = write_tone(tmp_path / "a.wav").read_bytes()
    command = ["transcribe", "-", "--model", str(model), "--language", "en"]
    said = CliRunner().invoke(app, command, input=data)
    wanted = dqw_("transcribe", tmp_path / "a.wav", *command[2:])
    assert said.exit_code == 0 and said.stdout == wanted.stdout.replace(":", ""), said.output
    written = CliRunner().invoke(app, [*command, "--output-dir", str(tmp_path / "o")], input=data)
    assert written.exit_code == 0 and (tmp_path / "o" / "stdin.txt").exists()
    for text, words in ((b"", "stdin is empty"), (b"no audio at all", "stdin is of a type that")):
        bad = CliRunner().invoke(app, command, input=text)
        assert bad.exit_code == 1 and words in bad.stderr, bad.output


def test_a_named_pipe_is_read_once(tmp_path):
    path = tmp_path / "p.wav"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(b"sound",))
    writer.start()
    (found,) = find_inputs([path])
    writer.join()
    assert found.audio == Piped(b"sound", str(path)) and str(found.stem) == "p"


def test_a_terminal_is_no_pipe(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    with pytest.raises(UserError, match="dqw transcribe - --model"):
        find_inputs([Path("-")])
