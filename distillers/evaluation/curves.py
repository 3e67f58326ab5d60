"""Curves of the measurements, as PNG (matplotlib without a display)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distillers.evaluation.measure import Quality, Real, Spread
from distillers.evaluation.metrics import Estimate


def plot(path: Path, real: Real, qualities: Sequence[Quality], spreads: Sequence[Spread], extractor: str) -> Path:
    """Plots kernel and Fréchet distance and R-precision by steps, and diversity by subject; returns the file's path.

    Args:
        path: the PNG to write.
        real: scores of real images, shown as dashed lines.
        qualities: the teacher's, with its full number of steps, first.
        spreads: likewise.
        extractor: name of the extractor whose distances are shown.
    """
    from matplotlib.figure import Figure  # part of the extra `metrics`; `__main__` checks for it at the start

    # A Figure rather than pyplot, which has global state and looks for a display.
    figure = Figure(figsize=(11, 8), dpi=110, layout="constrained")
    (kernel, frechet), (alignment, diversity) = figure.subplots(2, 2)
    floor = real.floor[extractor]
    _by_steps(kernel, qualities, lambda q: q.distances[extractor].kernel_distance, floor.kernel_distance.value)
    _by_steps(frechet, qualities, lambda q: _exact(q.distances[extractor].frechet_distance), floor.frechet_distance)
    _by_steps(alignment, qualities, lambda q: q.r_precision, real.r_precision.value)
    kernel.set_title("kernel distance to real images")
    frechet.set_title("Fréchet distance to real images")
    alignment.set_title("R-precision")
    _points(diversity, spreads)
    kernel.legend(fontsize=8)
    figure.savefig(path)
    return path


def _by_steps(axes: Any, qualities: Sequence[Quality], value: Callable[[Quality], Estimate], real: float) -> None:
    lines: dict[str, list[Quality]] = {}
    for quality in qualities:
        if quality.subject.leg == "plain":
            lines.setdefault(quality.subject.model.name, []).append(quality)
    for model, members in lines.items():
        points = sorted(members, key=lambda q: q.subject.steps)
        estimates = [value(q) for q in points]
        axes.errorbar(
            [q.subject.steps for q in points],
            [e.value for e in estimates],
            yerr=[e.value - e.low for e in estimates] if estimates[0].leave_one_out else None,
            marker="o",
            capsize=3,
            label=_plain(model),
        )
    axes.axhline(real, linestyle="--", color="grey", linewidth=1, label="real images")
    ticks = sorted({q.subject.steps for q in qualities})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("steps")
    axes.grid(alpha=0.25)


def _points(axes: Any, spreads: Sequence[Spread]) -> None:
    """Points rather than bars: differences are small relative to the values, and bars would have to start at 0."""
    values = [s.distance.value for s in spreads]
    errors = [s.distance.value - s.distance.low for s in spreads]
    positions = range(len(spreads))
    axes.errorbar(values, positions, xerr=errors, fmt="o", capsize=3)
    axes.set_yticks(positions, [_plain(s.subject.title) for s in spreads], fontsize=8)
    axes.invert_yaxis()
    axes.set_title("diversity: mean pairwise feature distance")
    axes.grid(alpha=0.25, axis="x")


def _exact(value: float) -> Estimate:
    return Estimate(value, ())


def _plain(text: str) -> str:
    """Escapes matplotlib's markup."""
    return text.replace("$", r"\$")
