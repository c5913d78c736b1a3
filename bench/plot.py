"""``--plot FILE.png``: the roofline, operations a byte against operations a second."""

from importlib.util import find_spec
from pathlib import Path

from bench.rows import Row
from dqw.errors import UserError


def check_plot() -> None:
    if find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install matplotlib, or leave --plot out.")


def draw(file: Path, rows: list[Row], measured: dict[str, float]) -> None:
    """Rows that count operations, under the memory's slope and each peak's flat roof."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [row for row in rows if row.work.operations]
    if not points:
        raise UserError("--plot draws quant_linear: add --op quant_linear or --op all.")
    slope = max(rate for name, rate in measured.items() if "gbps" in name)
    intensities = [row.work.operations / row.work.bytes for row in points]
    peaks = [peak for name, peak in measured.items() if name.endswith("_gops")]
    low, high = min(intensities) / 2, 2 * max(*intensities, *(peak / slope for peak in peaks))
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for name, peak in measured.items():
        if not name.endswith("_gops"):
            continue
        x = [low, max(low, peak / slope), high]
        axes.plot(x, [min(i * slope, peak) for i in x], "--", color="gray", linewidth=1)
        roof = f"{name.removesuffix('_gops')} {peak:,.0f} GOP/s"
        axes.annotate(roof, (high, peak), ha="right", va="bottom")
    for label in dict.fromkeys(row.problem.label for row in points):
        mine = [row for row in points if row.problem.label == label]
        x = [row.work.operations / row.work.bytes for row in mine]
        axes.scatter(x, [row.gops for row in mine], label=f"dqw {label}", zorder=3)
    for row in points:
        name = row.fastest_peer
        if name:
            x_peer = row.work.operations / row.work.bytes
            gops = row.work.operations / row.peers[name].p50 / 1e9
            axes.scatter(x_peer, gops, marker="x", color="gray", s=20)
    axes.scatter([], [], marker="x", color="gray", label="fastest peer")
    caption = f"operations per byte of dqw's traffic (memory: {slope:,.0f} GB/s; caches are faster)"
    axes.set(xscale="log", yscale="log", xlabel=caption, ylabel="GOP/s")
    axes.legend()
    figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)


def draw_clips(file: Path, seconds: dict[str, dict[int, float]]) -> None:
    """Time against the length of the clip, a line an engine; ``seconds``: engine → length → s."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for engine, found in seconds.items():
        lengths = sorted(found)
        own = {"linewidth": 2.5, "zorder": 3} if engine.startswith("dqw ") else {"linewidth": 1.2}
        axes.plot(lengths, [found[n] for n in lengths], "o-", markersize=4, label=engine, **own)
    axes.set(xlabel="seconds of audio", ylabel="seconds until the text is there")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)
