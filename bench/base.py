"""``--base REV``: the kernels of another git revision, built in a temporary worktree, as a peer.

They run in a process of their own that takes its turns over a pipe: two libraries that define the
same operators do not fit into one process. This checkout's ``bench`` times them, so that both
revisions are measured by the same clock and on the same problems.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.rows import Problem
from bench.timing import Candidate
from dqw.errors import UserError

ROOT = Path(__file__).parent.parent


class Base:
    """A server of the revision's kernels; use it as a context manager, which cleans up."""

    def __init__(self, revision: str, threads: int) -> None:
        self.revision, self.threads = revision, threads
        self.name = f"dqw@{revision}"
        self.process: subprocess.Popen | None = None
        check_revision(revision)

    def __enter__(self) -> "Base":
        self.folder = Path(tempfile.mkdtemp(prefix="dqw-base-"))
        self.tree = self.folder / "tree"
        try:
            self.build()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process:
            assert self.process.stdin
            self.process.stdin.close()  # the server's loop ends with its input
            self.process.wait()
        git("worktree", "remove", "--force", str(self.tree))
        shutil.rmtree(self.folder, ignore_errors=True)

    def build(self) -> None:
        git("worktree", "add", "--detach", str(self.tree), self.revision)
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=self.tree,
            env={**os.environ, "DQW_BUILD": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode or not (self.tree / "dqw" / "_C.so").exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f"--base {self.revision} does not build ({last}): choose a revision that does."
            )
        if not (self.tree / "dqw_kernels").exists():  # an installed one would be this checkout's
            (self.tree / "dqw_kernels").symlink_to(self.tree / "kernels")
        shutil.rmtree(self.tree / "bench", ignore_errors=True)
        shutil.copytree(ROOT / "bench", self.tree / "bench")

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.base_server", str(self.threads)],
            cwd=self.tree,
            env={**os.environ, "PYTHONPATH": str(self.tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for served in self.ask({}).values():
            if not Path(served).resolve().is_relative_to(self.tree.resolve()):
                raise UserError(f"--base {self.revision} would time {served}: unset PYTHONPATH.")

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.process and self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise UserError(
                f"--base {self.revision} ended while timing: its kernels cannot run this problem."
            )
        return json.loads(answer)

    def candidate(self, problem: Problem, cold: bool) -> Candidate:
        key = self.ask({"build": asdict(problem), "cold": cold})["key"]
        return lambda repeats: self.ask({"run": key, "repeats": repeats})["seconds"]


def git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def check_revision(revision: str) -> None:
    done = git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if revision.startswith("-") or done.returncode:
        raise UserError(
            f"--base {revision!r} is no revision of this git checkout: name a commit, tag or "
            "branch that `git log` knows."
        )
