"""Folders and files that are one process's at a time."""

import multiprocessing
import shutil
import threading
import time

import pytest
from speech_helpers import one_thread  # noqa: F401
from test_trainer import SHORT, run

from dqw.distill.checkpoint import held
from dqw.errors import UserError
from dqw.locks import is_locked, locked


def hold(path, taken, release):
    with locked(path, 10) as ours:
        assert ours
        taken.set()
        release.wait(60)


def test_a_lock_is_one_process_s_and_ends_with_it(tmp_path):
    path, processes = tmp_path / "folder" / "a.lock", multiprocessing.get_context("fork")
    taken, release = processes.Event(), processes.Event()
    other = processes.Process(target=hold, args=(path, taken, release))
    other.start()
    assert taken.wait(60) and is_locked(path)
    with locked(path, 0.2) as ours:
        assert not ours
    assert path.exists() and is_locked(path), "it is the other's to delete"
    other.kill()
    other.join()
    assert path.exists() and not is_locked(path)
    with locked(path, 0.2) as ours:
        assert ours and is_locked(path)
    assert not path.exists() and not is_locked(path)


def test_a_lock_that_was_deleted_meanwhile_is_taken_on_the_new_file(tmp_path, monkeypatch):
    """B waits for A's file; A ends and deletes it; C must not have a file of its own beside B."""
    path, seen = tmp_path / "a.lock", []

    def wait():
        with locked(path, 30) as ours:
            seen.append((ours, path.exists()))
            time.sleep(0.3)

    with locked(path, 0) as ours:
        assert ours
        waiting = [threading.Thread(target=wait) for _ in range(3)]
        for thread in waiting:
            thread.start()
        time.sleep(0.5)
    for thread in waiting:
        thread.join()
    assert seen == [(True, True)] * 3 and not path.exists()


def test_a_folder_is_one_process_s_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("dqw.distill.checkpoint.LOCK_SECONDS", 0.3)
    out = tmp_path / "run"
    with held(out), pytest.raises(UserError, match="another process is training in"):
        run(out)
    assert run(out).steps == SHORT.steps  # the lock went with the block
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    with held(out):
        shutil.rmtree(out)  # as `dqw compress` does with an older run
        with held(out):
            pass
    monkeypatch.setattr("dqw.distill.checkpoint.LOCK_SECONDS", 60)
    taken, release = threading.Event(), threading.Event()

    def hold():
        with held(out):
            taken.set()
            release.wait(30)

    other = threading.Thread(target=hold)
    other.start()
    assert taken.wait(30)
    threading.Timer(0.5, release.set).start()
    with held(out):  # a worker of a killed run may hold it for some seconds more
        assert release.is_set()
    other.join()
