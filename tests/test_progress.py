"""What a run shows at its stations."""

from dqw.distill import progress
from dqw.distill.progress import Display


class Lines(Display):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_a_station_is_counted_every_ten_seconds_and_at_its_end(monkeypatch):
    clock = iter(range(100, 200, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    shown = Lines()
    for done in range(3, 9):  # a resumed station: three were there
        shown.count("windows", done, 8)
    shown.count("labels", 1, 1)
    assert shown.lines == [
        "windows 3/8",
        "windows 6/8, 8 s left",
        "windows 8/8",
        "labels 1/1",
    ]
