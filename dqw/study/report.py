"""The CSV, the plot and the page of a study, from its cells."""

from __future__ import annotations

import csv
import io
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

from dqw.recipe import Recipe
from dqw.study import plot
from dqw.study.charts import charts, languages
from dqw.study.table import METRICS, Setting, Study
from dqw.whisper.files import write_atomic
from dqw.whisper.stats import Cells, Rate, difference, rate, verdict

_PAIRS = 6  # settings of a group up to which every pair is listed; above, each against the best

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;
background:#fff}h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:
collapse;font-size:13px;margin:.6rem 0}th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px
solid #e5e5e5;white-space:nowrap}th:first-child,td:first-child{text-align:left}.tie{color:#666}
.better{color:#1a7f37}.worse{color:#b3261e}.small{color:#555;font-size:13px}svg{max-width:100%;
height:auto}.scroll{overflow-x:auto}.words td,.words th{text-align:left;white-space:normal}
"""


def write_report(
    out: Path,
    study: Study,
    settings: Sequence[Setting],
    cells: Cells,
    about: Mapping[str, Any],
    command: str,
) -> Path:
    """Write OUT/NAME.csv, .svg and .html; returns the page's path.

    about: what OUT/study.json holds; command: what was typed.
    """
    rates = {
        s.name: {m: r for m in METRICS if (r := rate(cells[s.name], m)) is not None}
        for s in settings
    }
    figure = plot.figure(charts(study, settings, cells, rates))
    write_atomic(out / f"{study.name}.csv", csv_text(study, settings, cells))
    write_atomic(out / f"{study.name}.svg", figure)
    page = out / f"{study.name}.html"
    write_atomic(page, _page(study, settings, cells, rates, (about, command), figure))
    return page


# ---------------------------------------------------------------- CSV


def csv_text(study: Study, settings: Sequence[Setting], cells: Cells) -> str:
    """A row for each cell, with intervals over its clips; ``languages``: for each language, too."""
    factors = list(dict.fromkeys(name for s in settings for name in s.factors))
    head = ["study", "setting", *factors, "seed", "language", "mib"]
    for metric in METRICS:
        unit = {"KL": "tokens", "WER": "words", "CER": "characters"}[metric]
        names = (
            ("", "_low", "_high") if metric == "KL" else ("_percent", "_low", "_high", "_errors")
        )
        head += [*(f"{metric.lower()}{name}" for name in names), unit]
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow([*head, "seconds"])
    for setting in settings:
        for cell in cells[setting.name]:
            codes = sorted({row[0] for row in cell["clips"]}) if study.chart == "languages" else []
            for language in [None, *codes]:
                row = [study.name, setting.name, *(setting.factors.get(f, "") for f in factors)]
                row += [cell["seed"], language or "all", f"{cell['mib']:.4f}"]
                for metric in METRICS:
                    found = rate([cell], metric, language)
                    if metric == "KL":
                        row += _figures(None if language else found, 1, 6)
                    else:
                        row += _figures(found, 100, 3, counted=True)
                table.writerow([*row, cell["seconds"]])
    return file.getvalue()


def _figures(found: Rate | None, times: float, digits: int, counted: bool = False) -> list[str]:
    if found is None:
        return [""] * (5 if counted else 4)
    values = [
        f"{times * v:.{digits}f}" if math.isfinite(v) else ""  # one clip has no interval
        for v in (found.value, *found.interval)
    ]
    return [*values, *([str(round(found.total))] if counted else []), str(found.units)]


# ---------------------------------------------------------------- page


def _page(
    study: Study,
    settings: Sequence[Setting],
    cells: Cells,
    rates: Mapping[str, Mapping[str, Rate]],
    made: tuple[Mapping[str, Any], str],
    figure: str,
) -> str:
    about, command = made
    recipe = about["recipe"]["quant"]
    shared = f"groups of {recipe['group_size']}" if recipe["group_size"] else "one scale a row"
    trained = any(s.phases for s in settings)
    seeds = max(len(cells[s.name]) for s in settings)
    facts = [
        f"Model {about['model']}; student {about['student']}, "
        f"{about['layers'][0]} + {about['layers'][1]} layers.",
        *_measured(about, rates),
    ]
    asis = all(s.model != "quantized" and not s.phases for s in settings)
    if study.calibrates and about["speech"]["clips"] and not asis:
        learned = f"Calibrated {'and trained ' if trained else ''}on"
        facts.append(f"{learned} {about['speech']['clips']} clips.")
    if not asis:
        facts.append(f"Recipe where nothing else is said: {recipe['bits']} bits {recipe['grid']}, "
                     f"{shared}, embedding {recipe['embedding_bits'] or 'float'} bits, "
                     f"convolutions {recipe['conv_bits'] or 'float'} bits.")  # fmt: skip
    if trained:
        facts.append(f"{about['steps']} steps a cell, {seeds} seed{'s' if seeds > 1 else ''}.")
    if about["quick"]:
        facts.append("A quick run: a look at the page, no evidence.")
    body = [
        f"<h1>{escape(study.question)}</h1>",
        f"<p>{escape(study.how)}</p>",
        f'<p class="small">{escape(" ".join(facts))}<br>'
        f"<code>{escape(command)}</code>, "
        f"{escape(_made(cells))}.</p>",
        *_answer(study, settings, rates),
        "<h2>Plot</h2>",
        f'<div class="scroll">{figure}</div>',
    ]
    if study.chart == "layers":
        body += _heat(settings, rates)
    elif study.chart == "languages":
        body += _by_language(settings, cells)
    if study.chart != "layers":
        body += ["<h2>Figures</h2>", _settings_table(settings, cells, rates)]
        body += _comparisons(study, settings, rates)
    if study.name == "paper":
        body += _sizes()
    body += [
        "<h2>How to read this</h2>",
        '<p class="small">KL: mean Kullback-Leibler divergence of the next-token distributions '
        f"from those of the {'float model' if study.chart == 'layers' else 'float teacher'}, on "
        "the reference texts; it moves long before words do. WER and CER: errors over reference "
        "words or characters of all clips, greedy. Brackets: 95 % intervals over clips"
        f"{' and seeds' if seeds > 1 else ''} (bootstrap; Student's t of up to 100 clips, and of "
        "seeds). Differences are paired by clip"
        f"{' and seed' if seeds > 1 else ''}; one whose interval "
        "holds zero is called a tie. In the answer that is the interval of the differences of all "
        "pairs together (Bonferroni), pair by pair each one's own: there one in twenty true "
        "ties will not be called so. "
        f"These cells: {study.name}.csv.</p>",
    ]
    return (
        "<!doctype html>\n<html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>dqw study {study.name}</title><style>{_STYLE}</style>\n"
        + "\n".join(body)
        + "\n</html>\n"
    )


def _measured(about: Mapping[str, Any], rates: Mapping[str, Mapping[str, Rate]]) -> list[str]:
    """How many clips and units each metric counts; clips that it cannot are left out."""
    units = {"KL": "tokens", "WER": "words", "CER": "characters"}
    parts = []
    for metric in METRICS:
        found = [row[metric] for row in rates.values() if metric in row]
        if found:
            one = min(found, key=lambda r: r.units)  # of one seed
            parts.append(f"{metric} of {one.clips} clips, {one.units} {units[metric]}")
    return [f"Measured on {about['measured on']['clips']} clips ({'; '.join(parts)})."]


def _made(cells: Cells) -> str:
    """When, where and with what the cells were measured."""
    made = [cell["made"] for row in cells.values() for cell in row if "made" in cell]
    dates = sorted({m["date"] for m in made}) or [time.strftime("%Y-%m-%d")]
    machines = sorted({m["machine"] for m in made}) or [machine()]
    earlier = "" if all("made" in cell for row in cells.values() for cell in row) else \
        "cells of before do not say when; "  # fmt: skip
    return (
        f"{earlier}{dates[0]}{f' to {dates[-1]}' if len(dates) > 1 else ''}; "
        f"{' and '.join(machines)}"
    )


def machine() -> str:
    """Where and with what a page was made."""
    from importlib.metadata import version

    packages = ", ".join(f"{name} {version(name)}" for name in ("dqw", "torch", "transformers"))
    return f"{platform.machine()}, {os.cpu_count()} cores; {packages}"


def groups(
    study: Study, settings: Sequence[Setting], rates: Mapping[str, Mapping[str, Rate]], metric: str
) -> dict[str, dict[str, Rate]]:
    """Group's name → setting's label in it → rate: what is compared with each other."""
    found: dict[str, dict[str, Rate]] = {}
    for s in settings:
        if not s.baseline and metric in rates[s.name] and all(f in s.factors for f in study.within):
            group = ", ".join(_named(s, f) for f in study.within) or "all"
            own = [_named(s, f) for f in s.factors if f not in study.within]
            label = ", ".join(own) if study.within else s.name
            found.setdefault(group, {})[label] = rates[s.name][metric]
    return {name: row for name, row in found.items() if len(row) > 1}


def _named(setting: Setting, factor: str) -> str:
    units = {"bits": " bits", "ratio": " %"}
    return f"{setting.factors[factor]}{units.get(factor, '')}"


def _answer(
    study: Study, settings: Sequence[Setting], rates: Mapping[str, Mapping[str, Rate]]
) -> list[str]:
    """What the intervals allow to say: the least of each group, and what ties with it."""
    if study.chart in ("layers", "languages"):
        return []
    rows = []
    for metric in METRICS:
        for name, row in groups(study, settings, rates, metric).items():
            best, ties, worse = verdict(row)
            gaps = [f"{w} ({_gap(difference(row[w], row[best]).value, metric)})" for w in worse]
            least = f"{best} ({_value(row[best], metric)})"
            rows.append([metric, name, least, ", ".join(ties) or "–", ", ".join(gaps) or "–"])
    head = ["by", "among", "least", "ties with it", "worse, and by how much"]
    return ["<h2>Answer</h2>", f'<div class="words">{_table(head, rows)}</div>']


def _settings_table(
    settings: Sequence[Setting], cells: Cells, rates: Mapping[str, Mapping[str, Rate]]
) -> str:
    shown = [m for m in METRICS if any(m in rates[s.name] for s in settings)]
    head = ["setting", "MiB", *(f"{m}{' %' if m != 'KL' else ''}" for m in shown), "seeds"]
    rows = []
    for s in settings:
        mib = sum(cell["mib"] for cell in cells[s.name]) / len(cells[s.name])
        row = [s.name, f"{mib:.2f}"]
        for metric in shown:
            found = rates[s.name].get(metric)
            row.append(_with_interval(found, metric) if found else "")
        rows.append([*row, str(len(cells[s.name])) if s.phases else "–"])
    return _table(head, rows)


def _comparisons(
    study: Study, settings: Sequence[Setting], rates: Mapping[str, Mapping[str, Rate]]
) -> list[str]:
    """Pairs of every group, with the interval of their difference."""
    body = []
    for metric in METRICS:
        rows = []
        for name, group in groups(study, settings, rates, metric).items():
            best, _, _ = verdict(group)
            pairs = list(combinations(group, 2)) if len(group) <= _PAIRS else \
                [(n, best) for n in group if n != best]  # fmt: skip
            for first, second in pairs:
                gap = _compared(group[first], group[second], metric)
                rows.append([name, first, second, *gap])
        if rows:
            body.append(f"<details><summary>Differences in {metric}, pair by pair</summary>")
            head = ["among", "first", "second", "first − second", "95 % interval", "first is"]
            body += [_table(head, rows), "</details>"]
    return body


def _compared(first: Rate, second: Rate, metric: str) -> list[str]:
    d = difference(first, second)
    word = "tie" if d.tie else "worse" if d.value > 0 else "better"
    told = math.isfinite(d.low)
    interval = f"{_gap(d.low, metric)} to {_gap(d.high, metric)}" if told else "–"
    return [_gap(d.value, metric), interval, f'<span class="{word}">{word}</span>']


def _by_language(settings: Sequence[Setting], cells: Cells) -> list[str]:
    """Errors of each language beside the teacher's, and what the difference is worth."""
    rows = []
    teacher = next(s for s in settings if s.model == "teacher")
    for code, metric in languages(cells):
        base = rate(cells[teacher.name], metric, code)
        for s in settings:
            found = rate(cells[s.name], metric, code)
            if found is None or base is None:
                continue
            row = [f"{code} {metric}", s.name, _with_interval(found, metric),
                   f"{round(found.total)}/{found.units}"]  # fmt: skip
            if s is teacher:
                row += ["", "", "", ""]
            else:
                share = f"{100 * (found.total / base.total - 1):+.1f} %" if base.total else "–"
                row += [share, *_compared(found, base, metric)]
            rows.append(row)
    head = ["language", "setting", "%", "errors", "relative", "− teacher", "95 % interval", "it is"]
    return ["<h2>By language</h2>", _table(head, rows)]


def _heat(settings: Sequence[Setting], rates: Mapping[str, Mapping[str, Rate]]) -> list[str]:
    """A table a width: kinds of layers down, depth across, coloured by KL."""
    body = []
    kinds = list(dict.fromkeys(str(s.factors["kind"]) for s in settings))
    depths = sorted({int(s.factors["layer"]) for s in settings if s.factors["layer"] != "all"})
    for bits in sorted({int(s.factors["bits"]) for s in settings}):
        at = {(str(s.factors["kind"]), str(s.factors["layer"])): 1000 * rates[s.name]["KL"].value
              for s in settings if s.factors["bits"] == bits}  # fmt: skip
        single = [v for (_, depth), v in at.items() if depth != "all"] or [1.0]
        low, high = max(min(single), 1e-4), max(single)
        rows = []
        for kind in kinds:
            row = [escape(kind)]
            for depth in (*map(str, depths), "all"):
                value = at.get((kind, depth))
                if value is None:
                    row.append("<td>")
                    continue
                paint = (
                    "" if depth == "all" else f' style="background:{plot.shade(value, low, high)}"'
                )
                row.append(f"<td{paint}>{value:.3g}")
            rows.append("<tr><td>" + "".join(row))
        head = "".join(f"<th>{d}" for d in ["kind", *depths, "all at once"])
        body.append(f"<h2>{bits} bits: KL of each layer, in thousandths of a nat a token</h2>")
        body.append(f'<div class="scroll"><table><tr>{head}{"".join(rows)}</table></div>')
    return body


def _sizes() -> list[str]:
    from dqw.study.sizes import size_table

    head, *rows = size_table(
        {
            "the same layers at 8 bits": Recipe.shipped("paper-base"),
            "4 bits": Recipe.shipped("default"),
        }
    )
    note = (
        "The authors' accounting: embedding and decoder matrices at 8 bits, the rest float16, in "
        "whole MiB. dqw: bytes of the folder without tokenizer and config, scales included."
    )
    return ["<h2>Sizes, small as the teacher</h2>", _table(head, rows),
            f'<p class="small">{escape(note)}</p>']  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr>"]
    for row in rows:
        texts = (t if t.startswith("<span") else escape(t) for t in row)
        lines.append("<tr>" + "".join(f"<td>{t}</td>" for t in texts) + "</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _value(found: Rate, metric: str) -> str:
    return f"{found.value:.3g}" if metric == "KL" else f"{100 * found.value:.2f} %"


def _gap(value: float, metric: str) -> str:
    return f"{value:+.3g}" if metric == "KL" else f"{100 * value:+.2f}"


def _with_interval(found: Rate, metric: str) -> str:
    low, high = found.interval
    if not math.isfinite(low):
        return _value(found, metric).removesuffix(" %")
    if metric == "KL":
        return f"{found.value:.3g} ({low:.3g} to {high:.3g})"
    return f"{100 * found.value:.2f} ({100 * low:.2f} to {100 * high:.2f})"
