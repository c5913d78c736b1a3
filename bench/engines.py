"""Engines that turn a clip into text, each in a process of its own: ``python -m bench.engines``.

A process so that one engine's threads and memory are no other's. It reads lines of JSON on stdin,
{"audio": NPY}, and answers {"seconds", "tokens", "text", "megabytes"}: seconds of the whole clip,
features to text, greedy, in English, no timestamps, no fallback; megabytes the process's peak.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[np.ndarray], str]


def dqw_engine(folder: str, threads: int, activations: str) -> Run:
    import torch

    from dqw.convert import set_activations
    from dqw.whisper.checkpoint import load_whisper
    from dqw.whisper.transcribe import transcribe

    torch.set_num_threads(threads)
    model, processor = load_whisper(folder)
    set_activations(model, activations)
    return lambda audio: transcribe(model, processor, [audio], "en")[0].text


def dqw_plain(folder: str, threads: int, activations: str) -> Run:
    """The same packed model in transformers' own loop and modules."""
    import torch
    from transformers import WhisperForConditionalGeneration
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from dqw.convert import set_activations
    from dqw.whisper.checkpoint import load_whisper
    from dqw.whisper.transcribe import transcribe

    torch.set_num_threads(threads)
    model, processor = load_whisper(folder)
    set_activations(model, activations)
    model.__class__ = WhisperForConditionalGeneration
    model.model.encoder.__class__ = WhisperEncoder  # type: ignore[assignment]
    return lambda audio: transcribe(model, processor, [audio], "en")[0].text


def transformers_engine(folder: str, threads: int, dtype: str) -> Run:
    import torch

    from dqw.whisper.checkpoint import load_whisper

    torch.set_num_threads(threads)
    model, processor = load_whisper(folder, getattr(torch, dtype))

    def run(audio: np.ndarray) -> str:
        batch = processor.feature_extractor(audio, sampling_rate=16_000, return_tensors="pt")
        features = batch["input_features"].to(model.dtype)
        ids = model.generate(features, language="en", force_unique_generate_call=True)
        return processor.batch_decode(ids, skip_special_tokens=True)[0].strip()

    return run


def faster_whisper(folder: str, threads: int, kind: str) -> Run:
    from faster_whisper import WhisperModel

    model = WhisperModel(folder, device="cpu", compute_type=kind, cpu_threads=threads)
    options: dict[str, Any] = {"language": "en", "beam_size": 1, "without_timestamps": True}
    options |= {"temperature": 0.0, "condition_on_previous_text": False}

    def run(audio: np.ndarray) -> str:
        segments, _ = model.transcribe(audio, **options)
        return "".join(segment.text for segment in segments).strip()

    return run


def whisper_cpp(file: str, threads: int, kind: str) -> Run:
    from pywhispercpp.model import Model

    model = Model(file, n_threads=threads, redirect_whispercpp_logs_to=None)
    options: dict[str, Any] = {"language": "en", "no_timestamps": True, "single_segment": True}
    options |= {"temperature_inc": 0.0, "print_progress": False, "no_context": True}
    options["greedy"] = {"best_of": 1}
    return lambda audio: "".join(s.text for s in model.transcribe(audio, **options)).strip()


def openvino(folder: str, threads: int, kind: str) -> Run:
    import openvino_genai

    pipe = openvino_genai.WhisperPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads)
    return lambda audio: str(pipe.generate(audio.tolist(), language="<|en|>")).strip()


ENGINES: dict[str, Callable[[str, int, str], Run]] = {
    "dqw": dqw_engine,
    "dqw-plain": dqw_plain,
    "transformers": transformers_engine,
    "faster-whisper": faster_whisper,
    "whisper.cpp": whisper_cpp,
    "openvino-genai": openvino,
}


def serve(name: str, path: str, threads: int, kind: str, tokenizer_folder: str) -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # what a package prints is no answer
    started = time.perf_counter()
    run = ENGINES[name](path, threads, kind)
    print(json.dumps({"load": time.perf_counter() - started}), file=answers, flush=True)
    tokenizer = None
    for line in sys.stdin:
        audio = np.load(json.loads(line)["audio"])
        start = time.perf_counter()
        text = run(audio)
        seconds = time.perf_counter() - start
        if tokenizer is None:  # after the first clip: its memory is not the engine's
            peak = peak_megabytes()
            tokenizer = tokenizer_of(Path(tokenizer_folder))
        tokens = len(tokenizer(text, add_special_tokens=False).input_ids) + 1  # the end is one
        answer = {"seconds": seconds, "tokens": tokens, "text": text, "megabytes": peak}
        print(json.dumps(answer), file=answers, flush=True)


def peak_megabytes() -> float:
    """Of this process alone: getrusage would count what its parent had when it forked."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes elsewhere


def tokenizer_of(folder: Path) -> Any:
    from dqw.whisper.tokenizer import load_tokenizer

    return load_tokenizer(folder)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5])
