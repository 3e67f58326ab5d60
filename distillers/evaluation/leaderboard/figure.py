"""Quality against cost: every method's kernel distance by network evaluations, with the teacher's as a line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from distillers.evaluation.leaderboard.document import ranking
from distillers.evaluation.leaderboard.records import UNTRAINED, Result, Row, Settings, Teacher
from distillers.evaluation.subjects import counted

MARKERS, DASHES = "osD^vPX*<>p", ("-", "--", ":")
SPREAD, WIDEST = 0.07, 0.6
"""Offset in octaves between points of different methods at equal cost, so that error bars stay apart; and its maximum
over all methods."""


def plot(path: Path, settings: Settings, teacher: Teacher, results: Sequence[Result]) -> Path:
    """Writes the PNG; returns its path.

    Args:
        path: of the PNG.
        settings: of the board.
        teacher: shown as a black line through all its step counts.
        results: those with rows are shown, in the document's order.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    shown = [result for result in ranking(results) if result.rows]
    figure = Figure(figsize=(10.5, 6.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    colours = colormaps["tab10"]
    teacher_style = {"marker": "o", "color": "black", "linewidth": 2, "zorder": 2}
    _line(axes, teacher.rows, f"{teacher.name} (teacher)", shift=0.0, **teacher_style)
    _line(axes, teacher.untrained, UNTRAINED, shift=0.0, marker="o", color="grey", linewidth=2, zorder=2)
    apart = min(SPREAD, WIDEST / max(1, len(shown)))
    for number, result in enumerate(shown):
        style = {
            "marker": MARKERS[number % len(MARKERS)],
            "color": colours(number % colours.N),
            "linestyle": DASHES[number // colours.N % len(DASHES)],
            "zorder": 3,
        }
        _line(axes, result.rows, result.name, shift=apart * (number - len(shown) // 2 + 0.5), **style)
    floor = teacher.floor_kernel_distance.value
    axes.axhline(floor, linestyle="--", color="grey", linewidth=1, label="other real images", zorder=1)
    _scales(axes, teacher, shown)
    threads = counted(settings.threads, "thread")
    quick = " (a quick sample)" if settings.quick else ""
    axes.set_title(f"quality against cost, {settings.minutes:g} minutes of training on {threads} each{quick}")
    # Beside the axes, in the table's order, since labels among the points would overlap.
    lines, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda place: labels[place] == "other real images")
    axes.legend(
        [lines[place] for place in order],
        [labels[place] for place in order],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        frameon=False,
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    # The file is committed again with every row that is measured: with a palette it takes a third of the space.
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def _line(axes: Any, rows: Sequence[Row], label: str, *, shift: float, **style: Any) -> None:
    points = sorted(rows, key=lambda row: row.evaluations)
    distances = [row.kernel_distance for row in points]
    axes.errorbar(
        [row.evaluations * 2**shift for row in points],
        [distance.value for distance in distances],
        yerr=[distance.value - distance.low for distance in distances],
        label=label.replace("$", r"\$"),
        **{"linewidth": 1.2, "markersize": 6, "capsize": 2, "elinewidth": 0.8, **style},
    )


def _scales(axes: Any, teacher: Teacher, results: Sequence[Result]) -> None:
    lines = [teacher.rows, teacher.untrained, *(result.rows for result in results)]
    counts = sorted({row.evaluations for rows in lines for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("network evaluations per image (the guided teacher takes two a step)")
    axes.set_ylabel("kernel distance to real images (lower is better)")
    axes.grid(alpha=0.25)
