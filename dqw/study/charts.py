"""Which charts a study is shown with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dqw.study import plot
from dqw.study.table import METRICS, Setting, Study
from dqw.whisper.scoring import metric_of
from dqw.whisper.stats import Cells, Rate, rate


def charts(
    study: Study, settings: Sequence[Setting], cells: Cells, rates: Mapping[str, Mapping[str, Rate]]
) -> list[plot.Chart]:
    """The charts of ``study``, one under the other."""
    if study.chart == "layers":
        shown = [s for s in settings if s.factors["layer"] == "all"]
        charts = []
        for bits in sorted({int(s.factors["bits"]) for s in shown}):
            rows = [
                (str(s.factors["kind"]), _point(rates[s.name]["KL"]))
                for s in shown
                if s.factors["bits"] == bits
            ]
            title = f"KL of rounding all layers of a kind to {bits} bits, nats a token"
            charts.append(plot.dots(title, sorted(rows, key=lambda row: -row[1].y), log=True))
        return charts
    if study.chart == "lines":
        shown = [s for s in settings if study.x in s.factors and not s.baseline]
        charts = [_lines(study, shown, rates, metric) for metric in METRICS
                  if any(metric in rates[s.name] for s in shown)]  # fmt: skip
        sizes: dict[str, list[plot.Point]] = {}
        for s in shown:
            mib = cells[s.name][0]["mib"]
            point = plot.Point(mib, mib, mib, float(s.factors[study.x]))
            sizes.setdefault(_series(study, s), []).append(point)
        return [*charts, plot.lines("size, MiB", _x_label(study), sizes)]
    if study.chart == "languages":
        rows = []
        for code, metric in languages(cells):
            for s in settings:
                found = rate(cells[s.name], metric, code)
                if found is not None:
                    rows.append((f"{code} {metric}: {s.name}", _point(found, 100)))
        return [plot.dots("errors by language, %", rows)]
    charts = []
    for metric in METRICS:
        points = [(s.name, _point(rates[s.name][metric], 1 if metric == "KL" else 100))
                 for s in settings if metric in rates[s.name]
                 and not (metric == "KL" and s.model == "teacher")]  # fmt: skip
        if points:
            charts.append(plot.dots(_label(metric), points))
    return charts


def _lines(
    study: Study,
    settings: Sequence[Setting],
    rates: Mapping[str, Mapping[str, Rate]],
    metric: str,
) -> plot.Chart:
    series: dict[str, list[plot.Point]] = {}
    for s in settings:
        if metric in rates[s.name]:
            times = 1 if metric == "KL" else 100
            point = _point(rates[s.name][metric], times, float(s.factors[study.x]))
            series.setdefault(_series(study, s), []).append(point)
    return plot.lines(_label(metric), _x_label(study), series, log=metric == "KL")


def _series(study: Study, setting: Setting) -> str:
    return ", ".join(f"{setting.factors[f]} bits" if f == "bits" else str(setting.factors[f])
                     for f in study.series)  # fmt: skip


def _x_label(study: Study) -> str:
    return {"ratio": "quantized layers, %"}.get(study.x, study.x)


def _label(metric: str) -> str:
    if metric == "KL":
        return "KL from the teacher, nats a token"
    return f"{metric}, %"


def _point(found: Rate, times: float = 1, x: float = 0.0) -> plot.Point:
    low, high = found.interval if found.clips > 1 else (found.value, found.value)
    return plot.Point(times * found.value, times * low, times * high, x)


def languages(cells: Cells) -> list[tuple[str, str]]:
    """(code, WER or CER) of every language with words to count."""
    clips = next(iter(cells.values()))[0]["clips"]
    return [(code, metric_of(code)) for code in sorted({row[0] for row in clips if row[2]})]
