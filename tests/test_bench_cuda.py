"""``python -m bench --device cuda`` as far as it goes without a GPU: its shapes, its clock."""

import contextlib
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import cuda, options, plans, quant_linear, runner, timing
from bench.__main__ import exit_with_a_sentence
from dqw.errors import UserError

ROOT = Path(__file__).parent.parent


def test_a_gpu_is_measured_on_every_whisper() -> None:
    """M from one token to eight clips; attention, both halves of the MLP, the vocabulary."""
    shapes = runner.shapes_of(quant_linear, options.Options(device="cuda"))
    for d in (384, 512, 768, 1024, 1280):
        for m in (1, 2, 4, 8, 16, 64, 1500, 12000):
            assert {(m, d, d), (m, d, 4 * d), (m, 4 * d, d)} <= set(shapes)
        assert (1, d, 51866) in shapes
    assert {(1, 4096, 4096), (1, 5120, 1280)} <= set(shapes)
    assert runner.shapes_of(quant_linear, options.Options()) == quant_linear.SHAPES


def call_of_its_own(call: Callable[[], None]) -> Callable[[], None]:
    return lambda: call()


def test_calls_in_a_graph_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for CUDA whose calls take 2 ms each: seconds are of the repeats asked for."""
    clock, graphs, streams = [0.0], [], []

    def call() -> None:
        clock[0] += 2.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = clock[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: "Event") -> float:
            return other.at - self.at

    class Graph:
        def replay(self) -> None:
            clock[0] += 2.0 * graphs[0]

    class Stream:
        def wait_stream(self, other: str) -> None:
            assert other == "before"

    @contextlib.contextmanager
    def capture(graph: Graph, stream: object) -> Iterator[None]:
        before = clock[0]
        yield
        graphs.append((clock[0] - before) / 2.0)

    for name, stub in {
        "Event": Event, "CUDAGraph": Graph, "graph": capture, "Stream": Stream,
        "stream": lambda s: contextlib.nullcontext(), "synchronize": lambda: None,
        "current_stream": lambda: "before", "set_stream": streams.append,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stub, raising=False)
    run = cuda.candidate(call)
    assert graphs == [cuda.IN_A_GRAPH]
    for repeats in (1, 20, 50):
        assert run(repeats) == pytest.approx(repeats * 2e-3)
    owner = call_of_its_own(call)
    seen = weakref.ref(owner)
    run = cuda.candidate(owner)
    del owner
    gc.collect()
    assert seen() is not None  # what a graph reads and writes must not go back to the driver
    del run
    gc.collect()
    assert seen() is None
    graphs.clear()
    for copies, calls in ((33, 33), (6, 24)):  # whole rounds of them
        graphs.clear()
        call.copies = copies  # type: ignore[attr-defined]
        assert cuda.candidate(call)(1) == pytest.approx(2e-3) and graphs == [calls]

    def stubborn() -> None:
        if graphs:
            raise RuntimeError("synchronizes")
        call()

    @contextlib.contextmanager
    def refuse(graph: Graph, stream: object) -> Iterator[None]:
        raise RuntimeError("synchronizes")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    graphs.clear()
    assert cuda.candidate(stubborn, "stubborn")(5) == pytest.approx(10e-3)
    assert streams == ["before"]  # not the one that the capture began on
    assert cuda.candidate(call, "waiting", graphed=False)(5) == pytest.approx(10e-3)
    assert cuda.not_graphed == {"stubborn": "synchronizes", "waiting": "it waits for the GPU"}
    cuda.not_graphed.clear()


def test_plans_give_every_warp_a_step() -> None:
    """``python -m bench.plans``: clusters of 1 to 8 blocks, no warp without columns."""
    for cols in (64, 384, 512, 1280, 5120):
        for most in (8, 10):
            found = list(plans.plans(cols, most))
            assert found and len(set(found)) == len(found)
            for shift, warps in found:
                steps = -(-cols // 128)
                own = -(-steps // 2**shift)
                assert 1 <= warps <= min(own, most) and own <= 8 * warps, (cols, shift, warps)
    assert max(shift for shift, _ in plans.plans(5120, *plans.MOST[32])) == 2


def test_every_plan_is_forced_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, whose kernel knows no plans: float16, plan_of's and each plan, hot and cold."""
    forced: list[tuple[int, int]] = []
    stub = SimpleNamespace(force_plan=lambda *plan: forced.append(plan))
    monkeypatch.setattr(torch.ops, "dqw_cuda", stub, raising=False)
    monkeypatch.setattr(timing, "last_level_cache", lambda: 2**16)
    rows = plans.measure(1, 256, 64, 16, "cpu")
    every = list(plans.plans(256, 10))
    names = ["float16", "plan_of", *(f"{1 << shift} x {warps}" for shift, warps in every)]
    assert [row["plan"] for row in rows] == names
    assert forced == [(0, 0), *every, (0, 0)] * 2
    assert all(row["hot"] > 0 and row["cold"] > 0 for row in rows)
    assert rows[0]["error"] is None and all(row["error"] < 2e-3 for row in rows[1:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures on a GPU")
def test_plans_without_a_gpu_are_one_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.plans"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "needs an NVIDIA GPU" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gpu_that_stops_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nMore")

    with pytest.raises(SystemExit) as stop:
        exit_with_a_sentence(command)
    said = capsys.readouterr().err
    assert stop.value.code == 1 and "illegal memory access" in said and "--peers none" in said


def test_plans_of_what_the_kernel_has_not() -> None:
    for rows, cols, group_size in ((33, 256, 0), (1, 100, 0), (1, 256, 24)):
        with pytest.raises(UserError, match="are not the kernel's: give up to 32 rows"):
            plans.measure(rows, cols, 64, group_size, "cpu")
