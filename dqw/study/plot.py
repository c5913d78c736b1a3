"""Small SVG charts, written by hand so that a page needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 760
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8e5ea2", "#e08e0b", "#5f6b76", "#00a0a0", "#7a4a21",
           "#c2185b", "#455a00", "#3949ab", "#9e9d24")  # fmt: skip
_STYLE = (
    "<style>text{font:12px system-ui,sans-serif;fill:#222}.t{font-weight:600;font-size:13px}"
    ".m{fill:#666}.g{stroke:#e3e3e3}.w{stroke-width:1.5;opacity:.6}</style>"
)


@dataclass(frozen=True)
class Point:
    """A value with its interval; ``x`` where it stands."""

    y: float
    low: float
    high: float
    x: float = 0.0


@dataclass(frozen=True)
class Chart:
    """SVG elements from y = 0 down to ``height``."""

    body: str
    height: int


class Axis:
    """A scale from values to pixels, linear or logarithmic."""

    def __init__(self, values: Sequence[float], start: float, stop: float, log: bool) -> None:
        kept = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        self.log, self.start, self.stop = log, start, stop
        low, high = (min(kept), max(kept)) if kept else (0.1, 1.0)
        if log:
            self.low, self.high = math.log10(low) - 0.05, math.log10(high) + 0.05
        else:
            self.low, self.high = min(low, 0.0), high * 1.05 if high > 0 else 1.0
        if self.high - self.low < 1e-12:
            self.high = self.low + 1.0

    def __call__(self, value: float) -> float:
        if self.log:
            value = math.log10(max(value, 10**self.low))
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 1)

    def ticks(self) -> list[float]:
        """Round values inside the axis."""
        if self.log:
            found = [m * 10.0**e for e in range(math.floor(self.low), math.ceil(self.high) + 1)
                     for m in (1, 2, 5)]  # fmt: skip
            found = [v for v in found if self.low <= math.log10(v) <= self.high]
            whole = [v for v in found if f"{v:e}".startswith("1.0")]
            return whole if len(found) > 8 and len(whole) > 1 else found
        step = 10 ** math.floor(math.log10((self.high - self.low) / 3))
        while (self.high - self.low) / step > 6:
            step *= 2 if f"{step:e}"[0] != "2" else 2.5
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step) + 1)]


def figure(charts: Sequence[Chart]) -> str:
    """Charts under one another as one SVG."""
    parts, top = [], 0
    for chart in charts:
        parts.append(f'<g transform="translate(0 {top})">{chart.body}</g>')
        top += chart.height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" '
        f'width="{WIDTH}" height="{top}" role="img">{_STYLE}'
        f'<rect width="{WIDTH}" height="{top}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def lines(
    title: str, x_label: str, series: Mapping[str, Sequence[Point]], log: bool = False
) -> Chart:
    """One line a series over the x of its points, with whiskers; the legend on the right."""
    left, right, top, bottom = 64, WIDTH - 190, 36, 300
    points = [p for row in series.values() for p in row]
    places = sorted({p.x for p in points})
    y = Axis([v for p in points for v in (p.y, p.low, p.high)], bottom, top, log)
    span = (places[-1] - places[0]) or 1.0
    at = {x: round(left + 16 + (x - places[0]) / span * (right - left - 32), 1) for x in places}
    body = [_text(8, 18, title, "t")]
    for tick in y.ticks():
        body.append(f'<line class="g" x1="{left}" x2="{right}" y1="{y(tick)}" y2="{y(tick)}"/>')
        body.append(_text(left - 6, y(tick) + 4, f"{tick:.4g}", "m", "end"))
    body += [_text(at[x], bottom + 18, f"{x:g}", "m", "middle") for x in places]
    body.append(_text((left + right) / 2, bottom + 38, x_label, "m", "middle"))
    for index, (name, row) in enumerate(series.items()):
        colour, shift = COLOURS[index % len(COLOURS)], (index - len(series) / 2) * 1.5
        dash = ' stroke-dasharray="5 3"' if index >= len(COLOURS) else ""
        spots = [(at[p.x] + shift, p) for p in sorted(row, key=lambda p: p.x)]
        path = " ".join(f"{x:.1f},{y(p.y)}" for x, p in spots)
        body.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"{dash}/>'
        )
        for x, p in spots:
            body.append(
                f'<line class="w" stroke="{colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{y(p.low)}" '
                f'y2="{y(p.high)}"/><circle cx="{x:.1f}" cy="{y(p.y)}" r="3" fill="{colour}"/>'
            )
        place = top + 8 + 18 * index
        body.append(
            f'<rect x="{right + 16}" y="{place - 9}" width="10" height="10" fill="{colour}"/>'
        )
        body.append(_text(right + 32, place, name))
    return Chart("".join(body), max(bottom + 52, top + 30 + 18 * len(series)))


def dots(title: str, rows: Sequence[tuple[str, Point]], log: bool = False) -> Chart:
    """One dot a row with its interval, names on the left, figures on the right."""
    left, right, top = 270, WIDTH - 70, 36
    bottom = top + 20 * len(rows)
    x = Axis([v for _, p in rows for v in (p.y, p.low, p.high)], left, right, log)
    body = [_text(8, 18, title, "t")]
    for tick in x.ticks():
        body.append(f'<line class="g" x1="{x(tick)}" x2="{x(tick)}" y1="{top - 6}" y2="{bottom}"/>')
        body.append(_text(x(tick), bottom + 16, f"{tick:.4g}", "m", "middle"))
    for index, (name, p) in enumerate(rows):
        y = top + 20 * index + 8
        body.append(_text(left - 10, y + 4, name, "", "end"))
        body.append(
            f'<line class="w" stroke="{COLOURS[0]}" x1="{x(p.low)}" x2="{x(p.high)}" y1="{y}" '
            f'y2="{y}"/><circle cx="{x(p.y)}" cy="{y}" r="4" fill="{COLOURS[0]}"/>'
        )
        body.append(_text(right + 8, y + 4, f"{p.y:.3g}", "m"))
    return Chart("".join(body), bottom + 34)


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def shade(value: float, low: float, high: float) -> str:
    """A CSS colour from white (``low``) to red (``high``), by the logarithm."""
    low, high = max(low, 1e-9), max(high, 2e-9)
    share = (math.log(max(value, low)) - math.log(low)) / max(math.log(high / low), 1e-9)
    return f"hsl(8 75% {97 - 42 * min(max(share, 0), 1):.0f}%)"
