"""A student's whole training step: forward, backward and optimizer, of a Whisper of some width.

``torch-float32`` is the same model unquantized; the candidates have every Linear and the embedding
quantized with learned clips, one of them with int8 activations too. With --dtype all of them run
under autocast.
"""

import copy
from collections.abc import Callable

import torch

from bench import timing
from bench.options import Options, Shape
from bench.rows import Problem, Row, Work

# (clips, width, vocabulary)
SHAPES: tuple[Shape, ...] = ((2, 512, 51865),)
QUICK_SHAPES: tuple[Shape, ...] = ((1, 128, 2000),)
TOKENS = 32
LAYERS = {384: 4, 512: 6, 768: 12, 1024: 24, 1280: 32}  # of a Whisper's stacks, by its width


def run(o: Options, report: Callable[[str], None]) -> list[Row]:
    rows = []
    for shape in o.shapes or (QUICK_SHAPES if o.quick else SHAPES):
        for bits in o.bits:
            report(f"train_step {' × '.join(map(str, shape))}")
            rows += run_shape(shape, bits, o)
    return rows


def run_shape(shape: Shape, bits: int, o: Options) -> list[Row]:
    student = whisper(shape, o)
    problems = [
        Problem("train_step", *shape, bits, o.grid, 0, activations, o.dtype, o.device)
        for activations in ("float", "int8")
    ]
    calls = {p.activations + " quantized": step(quantized(student, p), p) for p in problems}
    peers = ["torch-float32"] if o.wants("torch-float32") else []
    if peers:
        calls["torch-float32"] = step(student, problems[0])
    # No graph: AdamW counts its steps on the CPU.
    candidates = {
        name: timing.local(call, o.device, f"train_step {name}", graphed=False)
        for name, call in calls.items()
    }
    rounds = 3 if o.quick else 5
    if o.device == "cuda":  # the host is waited for, and its times scatter
        rounds *= 4
    timings = timing.time_interleaved(candidates, o.quick, rounds=rounds)
    rows = []
    for p in problems:
        name = p.activations + " quantized"
        extra = timing.extra_bytes(calls[name], o.device)
        rivals = {peer: timings[peer] for peer in peers}
        row = Row(p, o.threads, o.cold, timings[name], Work(0.0), "memory", 0.0, extra, rivals)
        rows.append(row)
    return rows


def whisper(shape: Shape, o: Options) -> torch.nn.Module:
    """Random weights; --quick has 2 layers and a tenth of the audio, else Whisper's and 30 s."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    _, width, vocabulary = shape
    heads = width // 64 if width % 64 == 0 else 1
    layers, positions = (2, 150) if o.quick else (LAYERS.get(width, 6), 1500)
    config = WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_source_positions=positions,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config).to(o.device).train()


def quantized(student: torch.nn.Module, p: Problem) -> torch.nn.Module:
    import dqw
    from dqw.recipe import QuantConfig, Recipe

    quant = QuantConfig(
        bits=p.bits,
        embedding_bits=p.bits,
        conv_bits=0,
        group_size=0,
        grid=p.grid,
        activations=p.activations,
    )
    model = copy.deepcopy(student)
    dqw.quantize(model, Recipe(quant=quant))
    return model


def step(model: torch.nn.Module, p: Problem) -> timing.Call:
    config = model.config
    frames = 2 * config.max_source_positions
    features = torch.randn(p.M, config.num_mel_bins, frames, device=p.device)
    labels = torch.randint(1, p.N, (p.M, TOKENS), device=p.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)  # as in the trainer
    lower = p.dtype != "float32"

    def call() -> None:
        with torch.autocast(p.device, getattr(torch, p.dtype), enabled=lower):
            loss = model(input_features=features, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call
