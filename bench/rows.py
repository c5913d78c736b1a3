"""A problem, its row of results, and the files they go to.

Ratios are peer seconds / dqw seconds: above 1 dqw is faster.
"""

import csv
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.timing import Timing
from dqw.errors import UserError
from dqw.whisper.files import write_atomic


@dataclass(frozen=True)
class Problem:
    """One call of one operator, as plain data: another process can build the same.

    M, K, N: rows of x, in, out (fake_quant: weight (N, K), M is not used; embedding: M ids of a
    table (N, K); train_step: M clips, width K, vocabulary N). ``variant``: which part of the
    operator, where it has parts. ``group_size`` 0: a scale per row.
    """

    op: str
    M: int
    K: int
    N: int
    bits: int
    grid: str
    group_size: int = 0
    activations: str = "float"
    dtype: str = "float32"
    device: str = "cpu"
    variant: str = ""

    @property
    def label(self) -> str:
        parts = [self.variant.replace("forward+backward", "both ways")]
        if self.op in ("quant_linear", "train_step"):
            parts.append("int8" if self.activations == "int8" else "float")
        if self.group_size:
            parts.append(f"g{self.group_size}")
        return " ".join(filter(None, parts))


@dataclass(frozen=True)
class Work:
    """What a call must do at least: bytes read and written, and operations (0: none to speak of).

    ``kind``: the factors' type, which decides the peak.
    """

    bytes: float
    operations: float = 0.0
    kind: str = "float32"


@dataclass
class Row:
    """One dqw candidate, timed beside its peers.

    ``ceiling``: GB/s if ``bound`` is memory, GOP/s if it is arithmetic, 0 where none is measured.
    """

    problem: Problem
    threads: int
    cold: bool
    timing: Timing
    work: Work
    bound: str
    ceiling: float
    extra_bytes: int
    peers: dict[str, Timing] = field(default_factory=dict)

    @property
    def gbps(self) -> float:
        return self.work.bytes / self.timing.p50 / 1e9

    @property
    def gops(self) -> float:
        return self.work.operations / self.timing.p50 / 1e9

    @property
    def share(self) -> float:
        reached = self.gbps if self.bound == "memory" else self.gops
        return reached / self.ceiling if self.ceiling else 0.0

    def ratio(self, peer: str) -> float:
        return self.peers[peer].p50 / self.timing.p50

    @property
    def fastest_peer(self) -> str | None:
        return min(self.peers, key=lambda name: self.peers[name].p50, default=None)

    @property
    def loses(self) -> bool:
        return any(self.ratio(name) < 1 for name in self.peers)

    def as_json(self) -> dict:
        return asdict(self.problem) | {
            "threads": self.threads,
            "cold": self.cold,
            "seconds": self.timing.p50,
            "seconds_p20": self.timing.p20,
            "seconds_p80": self.timing.p80,
            "gbps": self.gbps,
            "gops": self.gops,
            "bound": self.bound,
            "ceiling": self.ceiling,
            "share": self.share,
            "extra_bytes": self.extra_bytes,
            "peers": {
                name: {"seconds": timing.p50, "ratio": self.ratio(name)}
                for name, timing in self.peers.items()
            },
        }


def roof(work: Work, peak_gops: float, gbps: float) -> tuple[str, float]:
    """What limits ``work``: ("memory", GB/s) or ("arithmetic", GOP/s)."""
    if peak_gops and work.operations / (peak_gops * 1e9) > work.bytes / (gbps * 1e9):
        return "arithmetic", peak_gops
    return "memory", gbps


def write_json(file: Path, machine: dict, rows: list[Row], skipped: dict[str, str]) -> None:
    report = {"machine": machine, "skipped": skipped, "rows": [row.as_json() for row in rows]}
    write(file, json.dumps(report, indent=1) + "\n")


def write_csv(file: Path, rows: list[Row]) -> None:
    """The columns of the JSON rows; of each peer two, NAME seconds and NAME ratio."""
    flat = []
    for row in rows:
        cells = row.as_json()
        peers = cells.pop("peers")
        flat.append(cells | {f"{n} {k}": v for n, p in peers.items() for k, v in p.items()})
    write_cells(file, flat)


def write_cells(file: Path, flat: list[dict]) -> None:
    """Any rows as CSV; the columns are all their keys, in order of appearance."""
    columns = list(dict.fromkeys(name for cells in flat for name in cells))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write(file, text.getvalue())


def write(file: Path, text: str) -> None:
    try:
        write_atomic(file, text)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}): free some space.") from None
