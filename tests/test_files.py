"""Files are written whole or not at all; devices and pipes are written to."""

import os
from pathlib import Path

import pytest

from dqw.whisper.files import write_atomic


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    for text in ("one", "two"):
        write_atomic(path, text)
        assert path.read_text() == text and list(path.parent.iterdir()) == [path]


def test_a_pipe_gets_the_bytes_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(pipe, "some text\n")
    assert os.read(reader, 100) == b"some text\n"
    os.close(reader)
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="no /dev here")
def test_nothing_is_renamed_into_dev(monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/stdout may lead to a file: that, too, is no reason to put another in its place."""

    def renamed(*paths: object) -> None:
        raise AssertionError(paths)

    monkeypatch.setattr("dqw.whisper.files.os.replace", renamed)
    write_atomic("/dev/stdout", "some text\n")
    write_atomic("/dev/null", [b"some bytes"])


def test_a_name_may_be_as_long_as_names_are(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 251 + ".txt")
    write_atomic(path, "text")
    assert path.read_text() == "text" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_in_the_way_is_said(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        write_atomic(tmp_path, "text")
    assert not list(tmp_path.iterdir()) and not list(tmp_path.parent.glob("*.part"))
