"""Engines that turn clips into text, each in a process of its own: ``python -m bench.engines``.

A process so that one engine's threads and memory are no other's. It says {"load": seconds} once it
can hear, "dynamic" with it where the encoder's cost follows the clip, or {"error": why not}; reads
lines of JSON on stdin, {"clips": [NPY, …], "batch": clips decoded at once}; and answers {"seconds",
"texts", "megabytes"}: of all the clips, features to text, greedy, no timestamps; megabytes the
process's peak so far. {"reset": true} starts the peak anew.
"""

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from dqw.errors import UserError

RIVAL_OF = {"dqw-plain": "transformers"}  # the same packed model in transformers' loop and modules


class Engine(Protocol):
    def hear_all(
        self, audios: Sequence[np.ndarray], language: str | None, batch_size: int
    ) -> list[str]: ...


class Dqw:
    """What ``dqw transcribe`` does, with int8 or float activations; on a GPU a float model, too."""

    def __init__(self, folder: str, threads: int, activations: str, device: str = "cpu") -> None:
        import torch

        from dqw.convert import set_activations
        from dqw.recipe import ACTIVATIONS
        from dqw.whisper.engines import NativeEngine, PlainEngine, open_engine

        torch.set_num_threads(threads)
        self.engine = open_engine(folder, device=device)
        assert isinstance(self.engine, NativeEngine | PlainEngine)
        if activations in ACTIVATIONS:
            set_activations(self.engine.model, activations)
        self.dynamic = self.engine.context is not None

    def hear_all(
        self, audios: Sequence[np.ndarray], language: str | None, batch_size: int
    ) -> list[str]:
        from dqw.whisper.transcribe import iter_transcripts

        found = dict(iter_transcripts(self.engine, audios, language, batch_size=batch_size))
        return [found[i].text for i in range(len(audios))]


class Generate:
    """``from_pretrained(…).generate(…)`` of a folder, as transformers' users call it; on a GPU in
    float16."""

    dynamic = False

    def __init__(self, folder: str, threads: int, activations: str, device: str = "cpu") -> None:
        import torch

        from dqw.convert import set_activations
        from dqw.devices import move_to
        from dqw.recipe import ACTIVATIONS
        from dqw.whisper.checkpoint import load_whisper

        torch.set_num_threads(threads)
        self.model, self.processor = load_whisper(folder)
        if activations in ACTIVATIONS:
            set_activations(self.model, activations)
        move_to(self.model, device)

    def hear_all(
        self, audios: Sequence[np.ndarray], language: str | None, batch_size: int
    ) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(audios), batch_size):
            some = list(audios[start : start + batch_size])
            inputs = self.processor(some, sampling_rate=16_000, return_tensors="pt")
            features = inputs.input_features.to(self.model.device, self.model.dtype)
            ids = self.model.generate(features, language=language, do_sample=False)
            texts += self.processor.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]


def open_any(name: str, path: str, threads: int, kind: str, device: str) -> Engine:
    from dqw.whisper.rivals import open_rival

    if name in ("dqw", "dqw-float"):
        return Dqw(path, threads, kind, device)
    if name == "dqw-generate" or (name == "transformers" and device == "cuda"):
        return Generate(path, threads, kind, device)
    return open_rival(RIVAL_OF.get(name, name), path, threads, kind=kind)


def serve(name: str, path: str, threads: int, kind: str, language: str, device: str) -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # what a package prints is no answer

    def answer(**values: object) -> None:
        print(json.dumps(values), file=answers, flush=True)

    started = time.perf_counter()
    try:
        engine = open_any(name, path, threads, kind, device)
    except UserError as error:
        return answer(error=str(error))
    answer(load=time.perf_counter() - started, dynamic=getattr(engine, "dynamic", False))
    for line in sys.stdin:
        question = json.loads(line)
        if "reset" in question:
            answer(reset=reset_peak())
            continue
        audios = [np.load(clip) for clip in question["clips"]]
        start = time.perf_counter()
        texts = engine.hear_all(audios, language, question["batch"])
        seconds = time.perf_counter() - start
        answer(seconds=seconds, texts=texts, megabytes=peak_megabytes())


def peak_megabytes() -> float:
    """Of this process alone: getrusage would count what its parent had when it forked."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes elsewhere


def reset_peak() -> bool:
    """Whether the system (Linux) forgot the peak, so that it is of what comes now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
