"""``python -m bench``: its numbers, its files, its table, and what it says to a mistake."""

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import __main__ as command
from bench import ceilings, options, peers, plot, rows, runner, table, timing
from bench.base import Base
from dqw.errors import UserError

ROOT = Path(__file__).parent.parent

FIELDS = {
    "op": str,
    "M": int,
    "K": int,
    "N": int,
    "bits": int,
    "grid": str,
    "group_size": int,
    "activations": str,
    "dtype": str,
    "device": str,
    "threads": int,
    "cold": bool,
    "seconds": float,
    "gbps": float,
    "gops": float,
    "ceiling": float,
    "share": float,
    "extra_bytes": int,
    "peers": dict,
}


@pytest.fixture(autouse=True)
def _same_threads():
    """The command sets torch's threads; a repeat is 7 rounds of 0.5 ms."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _short_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "best_rate", lambda work, seconds=0.0: BEST_RATE(work, 0.001))


BEST_RATE = ceilings.best_rate


def bench(**given) -> None:
    """The command in this process, with quick defaults."""
    command.main(**({"quick": True, "threads": 1, **DEFAULTS} | given))


DEFAULTS = {
    "op": "quant_linear",
    "device": "cpu",
    "shapes": "2,64,96",
    "bits": "4",
    "grid": "apot",
    "dtype": "float32",
    "peers": "torch-float32",
    "cold": False,
    "csv_file": None,
    "json_file": None,
    "plot": None,
    "base": None,
}


def a_row(seconds: float, **peer_seconds: float) -> rows.Row:
    def still(s: float) -> timing.Timing:
        return timing.Timing(s, s, s)

    return rows.Row(
        problem=rows.Problem("quant_linear", 2, 64, 96, 4, "apot", activations="int8"),
        threads=1,
        cold=False,
        timing=still(seconds),
        work=rows.Work(2e6, 8e6, "int8"),
        bound="arithmetic",
        ceiling=16.0,
        extra_bytes=768,
        peers={name: still(s) for name, s in peer_seconds.items()},
    )


@pytest.mark.parametrize("op", ["quant_linear", "fake_quant", "embedding", "train_step"])
def test_the_json_has_every_field_and_the_csv_its_columns(op: str, tmp_path: Path) -> None:
    files = {"json_file": tmp_path / "a.json", "csv_file": tmp_path / "a.csv"}
    bench(op=op, shapes="1,64,96", peers="all", **files)
    report = json.loads(files["json_file"].read_text())
    assert report["machine"]["threads"] == 1
    assert report["machine"]["ceilings"]
    assert report["rows"]
    for row in report["rows"]:
        assert (row["op"], row["M"], row["K"], row["N"]) == (op, 1, 64, 96)
        for name, kind in FIELDS.items():
            assert type(row[name]) is kind, name
        assert row["activations"] in ("int8", "float")
        assert row["seconds"] > 0
        assert row["peers"]
        for peer in row["peers"].values():
            assert peer["ratio"] == pytest.approx(peer["seconds"] / row["seconds"])
        if op != "train_step":
            assert row["ceiling"] > 0 and row["share"] > 0
    table_rows = list(csv.DictReader(io.StringIO(files["csv_file"].read_text())))
    assert len(table_rows) == len(report["rows"])
    for flat, row in zip(table_rows, report["rows"]):
        assert set(FIELDS) - {"peers"} <= set(flat)
        for name, peer in row["peers"].items():
            assert float(flat[f"{name} ratio"]) == pytest.approx(peer["ratio"])


def test_a_run_that_is_cut_off_keeps_the_shapes_that_are_done(monkeypatch, tmp_path: Path) -> None:
    def cut_off(*_: object) -> Iterator[list[rows.Row]]:
        yield [a_row(1e-3)]
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", cut_off)
    with pytest.raises(KeyboardInterrupt):
        bench(json_file=tmp_path / "a.json", csv_file=tmp_path / "a.csv")
    assert len(json.loads((tmp_path / "a.json").read_text())["rows"]) == 1
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 2


def test_int8_and_groups_are_rows_of_their_own(tmp_path: Path) -> None:
    bench(json_file=tmp_path / "a.json", bits="3,4", group_sizes="16,64")
    report = json.loads((tmp_path / "a.json").read_text())
    kinds = {(r["bits"], r["activations"], r["group_size"]) for r in report["rows"]}
    assert kinds == {(b, a, g) for b in (3, 4) for a in ("int8", "float") for g in (0, 16, 64)}


def test_numbers_follow_from_seconds() -> None:
    row = a_row(1e-3, slower=2e-3, faster=0.5e-3)
    assert row.gbps == pytest.approx(2.0)
    assert row.gops == pytest.approx(8.0)
    assert row.share == pytest.approx(0.5)
    assert row.ratio("slower") == pytest.approx(2.0)
    assert row.ratio("faster") == pytest.approx(0.5)
    assert row.loses
    assert not a_row(1e-3, slower=2e-3).loses


def test_the_roof_is_what_takes_longer() -> None:
    assert rows.roof(rows.Work(1e9, 1e9), peak_gops=100, gbps=10) == ("memory", 10)
    assert rows.roof(rows.Work(1e9, 1e12), peak_gops=100, gbps=10) == ("arithmetic", 100)
    assert rows.roof(rows.Work(1e9, 1e12), peak_gops=0, gbps=10) == ("memory", 10)


def test_losing_rows_are_shown_in_100_columns() -> None:
    text = io.StringIO()
    found = [a_row(1e-3, **{"torch-float32": 2e-3}), a_row(3e-3, **{"torch-float32": 2e-3})]
    table.print_rows(Console(file=text, width=table.WIDTH), "quant_linear", found)
    printed = text.getvalue()
    assert "2.00×float32" in printed
    assert "0.67×float32" in printed
    assert "1 of 2 compared rows lose" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_missing_peers_are_named_and_skipped(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    bench(peers="torch-float32,torchao,onnxruntime,openvino", json_file=tmp_path / "a.json")
    printed = capsys.readouterr().out
    for name in ("torchao", "onnxruntime", "openvino"):
        assert f"skipped {name}: " in printed
    report = json.loads((tmp_path / "a.json").read_text())
    assert set(report["skipped"]) == {"torchao", "onnxruntime", "openvino"}
    assert all(set(row["peers"]) == {"torch-float32"} for row in report["rows"])


def test_a_peer_that_fails_is_named_and_the_rest_go_on(monkeypatch) -> None:
    def broken(problem, data):
        raise RuntimeError("no such kernel")

    group = (peers.Peer("broken", broken), peers.PEERS["quant_linear"][0])
    monkeypatch.setitem(peers.PEERS, "quant_linear", group)
    skipped: dict[str, str] = {}
    asked = options.Options(shapes=((1, 64, 64),), quick=True)
    parts = runner.run("quant_linear", asked, None, skipped, lambda text: None)
    found = [row for part in parts for row in part]
    assert "no such kernel" in skipped["broken"]
    assert all("torch-float32" in row.peers for row in found)


@pytest.mark.parametrize(
    ("given", "cure"),
    [
        ({"shapes": "3,4"}, "M,K,N"),
        ({"shapes": "1,x,4"}, "M,K,N"),
        ({"shapes": "0,64,64"}, "M,K,N"),
        ({"bits": "9"}, "choose 2 to 8"),
        ({"bits": "four"}, "2 to 8"),
        ({"group_sizes": "48"}, "one or more of 16"),
        ({"group_sizes": "16,"}, "one or more of 16"),
        ({"op": "softmax"}, "choose one of"),
        ({"op": "all"}, "--op"),
        ({"peers": "tensorrt"}, "choose one of"),
        ({"grid": "cubic"}, "choose one of"),
        ({"dtype": "int3"}, "choose one of"),
        ({"device": "tpu"}, "choose one of"),
        ({"threads": 0}, "1 or more"),
        ({"json_file": Path("/nowhere/at/all.json")}, "existing, writable folder"),
        ({"csv_file": Path("/nowhere/at/all.csv")}, "existing, writable folder"),
        ({"base": "no-such-revision"}, "git log"),
        ({"base": "--help"}, "git log"),
        ({"op": "quant_linear", "model": Path("x")}, "--model is for --op transcribe"),
        ({"op": "fake_quant", "lengths": "3"}, "--lengths is for --op transcribe"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_cure(given: dict, cure: str) -> None:
    with pytest.raises(UserError, match=cure) as caught:
        bench(**given)
    assert "\n" not in str(caught.value)


def test_the_command_exits_with_2_and_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--op", "quant_linear", "--bits", "9"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "choose 2 to 8" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_cuda_without_a_gpu_is_one_sentence(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="use --device cpu"):
        bench(device="cuda")


def test_plot_without_matplotlib_names_the_cure(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        bench(plot=tmp_path / "a.png")


def test_plot_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    measured = {"memory_read_gbps_1_threads": 20.0, "int8_gops": 400.0}
    plot.draw(tmp_path / "a.png", [a_row(1e-3, peer=2e-3)], measured)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_cold_calls_use_more_weights_than_the_cache_holds(monkeypatch) -> None:
    monkeypatch.setattr(timing, "last_level_cache", lambda: 1000)
    made: list[int] = []
    used: list[int] = []

    def build() -> timing.Call:
        number = len(made)
        made.append(number)
        return lambda: used.append(number)

    call = timing.rotated(build, 100, cold=True)
    assert len(made) * 100 >= 1500
    for _ in range(len(made) + 1):
        call()
    assert used == [*made, 0]
    made.clear()
    timing.rotated(build, 100, cold=False)
    assert len(made) == 1


def test_extra_bytes_is_the_peak_not_the_sum() -> None:
    x = torch.zeros(1000)

    def call() -> torch.Tensor:
        for _ in range(3):
            y = x + 1  # 4000 bytes, two of them at once
        return y

    assert 8000 <= timing.extra_bytes(call) < 9000


def test_candidates_take_turns() -> None:
    order: list[str] = []

    def candidate(name: str) -> timing.Candidate:
        return lambda repeats: order.append(name) or 1e-2 * repeats

    found = timing.time_interleaved({"a": candidate("a"), "b": candidate("b")}, True, rounds=3)
    assert order[4:] == ["a", "a", "b", "b"] * 3
    assert found["a"] == timing.Timing(1e-2, 1e-2, 1e-2)


@pytest.mark.skipif(not ceilings.compiled(), reason="the C++ library is not built")
def test_peaks_of_every_instruction_set_are_plausible() -> None:
    """A loop that the compiler emptied would show petaflops; chains computed once, twelvefold."""
    sets = torch.ops.dqw_cpu.instruction_sets().split()
    was = torch.ops.dqw_cpu.instruction_set()
    try:
        for name in sets:
            torch.ops.dqw_cpu.set_instruction_set(name)
            tiles = 16 if name == "amx" else 1
            limits = {"float32": 400, "bfloat16": 800 * tiles, "int8": 1600 * tiles}
            for kind, most in limits.items():
                peak = ceilings.peak_gops.__wrapped__(kind, 1)
                assert 0 <= peak < most, (name, kind)
                assert peak > 1 or kind == "bfloat16", (name, kind)
            read = torch.ops.dqw_cpu.ceiling_read(torch.zeros(4096), 2, 3)
            assert read == 3 * 4 * 4096
    finally:
        torch.ops.dqw_cpu.set_instruction_set(was)


def test_the_server_of_another_revision_answers(monkeypatch) -> None:
    """Its protocol, with this checkout in the place of a built worktree."""
    base = Base("HEAD", threads=1)
    base.tree = ROOT
    base.start()
    assert base.process and base.process.stdin
    try:
        run = base.candidate(rows.Problem("quant_linear", 1, 64, 64, 4, "apot"), cold=False)
        assert 0 < run(2) < 10
    finally:
        base.process.stdin.close()
        assert base.process.wait() == 0
