"""The board as Markdown. Every figure in it comes from the records; nothing is written by hand."""

from collections.abc import Callable, Iterable, Sequence

from distillers.evaluation.leaderboard.bars import (
    LEAST,
    alignment,
    bars,
    beats,
    diversity,
    keeps,
    of_full,
    of_same,
)
from distillers.evaluation.leaderboard.records import OFF, UNTRAINED, Result, Row, Settings, Teacher
from distillers.evaluation.metrics import Estimate
from distillers.evaluation.protocol import Protocol
from distillers.evaluation.subjects import counted

FIGURE = "leaderboard.png"
BIAS = 0.001
"""Of old kernel distances: 0.0012 with the pictures of `emoji-average` at one and at four steps."""


def markdown(
    settings: Settings,
    protocol: Protocol,
    teacher: Teacher,
    results: Sequence[Result],
    left_out: Sequence[tuple[str, str]],
) -> str:
    """The whole document.

    Args:
        settings: of the board.
        protocol: what was drawn.
        teacher: its rows.
        results: one a method.
        left_out: recipes that have no row, each with the reason.
    """
    ranked = ranking(results)
    measured = [result for result in ranked if result.rows]
    parts = [
        "# Leaderboard",
        "<!-- Written by `make leaderboard` from its measurements: run it again instead of editing this. -->",
        _introduction(settings, protocol, teacher, results),
        f"![kernel distance against network evaluations, by method]({FIGURE})",
        "(Methods that take the same number of evaluations are drawn side by side.)",
        "## Quality",
        _legend(teacher),
        _table(
            _HEAD,
            [
                *_rows(f"`{teacher.name}`", teacher.rows, teacher, marked=False),
                *_rows(UNTRAINED, teacher.untrained, teacher),
                *(row for result in measured for row in _rows(f"**{result.name}**", result.rows, teacher)),
            ],
        ),
        "## Bars",
        _table(
            ("bar", "bound", "measured", "by", "holds"),
            [(bar.what, bar.bound, _pm(bar.measured), bar.who, _mark(bar.holds)) for bar in bars(teacher, ranked)],
        ),
        "## Training",
        _training(settings, ranked),
    ]
    if left_out:
        parts += [
            "Not on the board:",
            "\n".join(f"- `{n}`: {why}" for n, why in left_out),
        ]
    return "\n\n".join(parts) + "\n"


def ranking(results: Sequence[Result]) -> list[Result]:
    """By kernel distance at the largest step count, the best first; what failed comes last."""

    def place(result: Result) -> tuple[float, str]:
        rows = sorted(result.rows, key=lambda row: row.steps)
        return (rows[-1].kernel_distance.value if rows else float("inf"), result.name)

    return sorted(results, key=place)


def _introduction(settings: Settings, protocol: Protocol, teacher: Teacher, results: Sequence[Result]) -> str:
    measured = [teacher.machine, *(result.machine for result in results)]
    machines = sorted({(machine.processor, machine.cores, machine.torch) for machine in measured})
    dates = sorted({machine.finished.partition(" ")[0] for machine in measured})
    on = "; ".join(f"{processor}, {cores} cores, torch {torch}" for processor, cores, torch in machines)
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    told = "of the processor, whatever else the machine did" if settings.by == "processor" else "by the clock"
    parts = [
        f"Every recipe for `{teacher.name}`, each from the teacher's own weights, at one budget: "
        f"**{settings.minutes:g} minutes of training on {counted(settings.threads, 'thread')}**, seed {settings.seed}; "
        f"batch size and everything else is the recipe's own. The minutes are {told}. A short timed run before tells what "
        "an iteration costs, and so how many fit, since learning rates fall by iterations; a training that misses the "
        f"budget by more than {OFF:.0%} is done once more. A method's preparation counts.",
        f"Measured {when} on {on} by the one protocol (`{settings.protocol[:12]}`): "
        f"{len(protocol.drawings):,} pictures of {len(protocol.held_out)} held-out captions, in EfficientNet-Lite0's "
        f"features; diversity over {len(protocol.coarse)} coarse prompts, {len(protocol.coarse_seeds)} seeds each; ± is a "
        f"95% interval. The teacher is guided at {teacher.guidance:g}, which counts as two evaluations a step.",
    ]
    lines = [(teacher.name, [*teacher.rows, *teacher.untrained]), *((e.name, e.rows) for e in results if e.rows)]
    biased = [name for name, rows in lines if not all(row.captions_apart for row in rows)]
    if biased:
        others = [f"`{name}`" for name, _ in lines if name not in biased]
        names = "all rows" + (f" but {', '.join(sorted(others))}" if others else "")
        parts.append(
            f"Kernel distances of {names} are from before the estimator left out pairs of one caption's pictures, which are "
            f"not independent: each is about {BIAS} too high."
        )
    if settings.quick:
        parts.insert(0, "**A quick sample, for a look: its noise is too large to compare anything.**")
    return "\n\n".join(parts)


_HEAD = (
    "pictures",
    "steps",
    "evaluations",
    "kernel distance",
    "/ teacher's, full",
    "/ teacher's, same steps",
    "Frechet distance",
    "R-precision",
    "/ teacher's, full",
    "diversity",
    "/ teacher's, full",
)


def _legend(teacher: Teacher) -> str:
    floor, real = teacher.floor_kernel_distance, teacher.real_r_precision
    return (
        f"'/ teacher's' is the ratio to the teacher at {teacher.full.steps} steps ('full'), or at as many steps as the row. "
        "✓ and ✗ say whether the row is on the right side of a bar: kernel distance below the teacher's at the same steps; "
        f"R-precision and diversity at least {LEAST:g} of the full teacher's. Real pictures score a kernel distance of "
        f"{_pm(floor, 3)} and an R-precision of {_pm(real, 3)}. '{UNTRAINED}' is the control: the teacher's own weights, "
        "without guidance, drawn with as every method's student is before its first iteration."
    )


def _cells(row: Row, teacher: Teacher, *, marked: bool) -> tuple[str, ...]:
    def share(value: Estimate | None, holds: Callable[[Estimate], bool] | None = None) -> str:
        if value is None:
            return ""
        return f"{value.value:.2f}" + (f" {_mark(holds(value))}" if marked and holds else "")

    same, kept, spread = of_same(row, teacher), alignment(row, teacher), diversity(row, teacher)
    return (
        str(row.steps),
        str(row.evaluations),
        _pm(row.kernel_distance, 3),
        share(of_full(row, teacher)),
        share(same, beats) if marked else "",
        f"{row.frechet_distance:.0f}",
        _pm(row.r_precision, 3),
        share(kept, keeps),
        "" if row.diversity is None else _pm(row.diversity),
        share(spread, keeps),
    )


def _rows(name: str, rows: Sequence[Row], teacher: Teacher, *, marked: bool = True) -> Iterable[tuple[str, ...]]:
    for row in sorted(rows, key=lambda row: -row.steps):
        yield (name, *_cells(row, teacher, marked=marked))


def _training(settings: Settings, results: Sequence[Result]) -> str:
    head = (
        "recipe",
        "method",
        "iterations",
        "pictures each",
        "seconds each",
        "minutes",
        "by the clock",
        "peak memory, MiB",
    )
    rows, marked = [], False
    for result in results:
        cells, training = [f"**{result.name}**", f"`{result.method}`"], result.training
        if training is None:
            rows.append([*cells, f"failed: {_plain(result.failure or '')}", *[""] * (len(head) - 3)])
            continue
        off = abs(training.seconds / 60 / settings.minutes - 1) > OFF
        marked = marked or off
        cells += [
            f"{training.iterations:,}",
            str(training.pictures),
            f"{training.seconds / training.iterations:.2f}",
            f"{training.seconds / 60:.1f}" + (" \\*" if off else ""),
            f"{training.clock_seconds / 60:.1f}",
            f"{training.peak_bytes / 2**20:,.0f}",
        ]
        rows.append(cells)
    note = f"\n\n\\* more than {OFF:.0%} off the budget: also when it was planned anew from a whole run's cost."
    return _table(head, rows) + (note if marked else "")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _pm(estimate: Estimate, digits: int = 2) -> str:
    return f"{estimate.value:.{digits}f} ± {estimate.high - estimate.value:.{digits}f}"


def _mark(holds: bool) -> str:
    return "✓" if holds else "✗"


def _plain(text: str) -> str:
    """In one table cell."""
    return " ".join(text.split()).replace("|", "\\|")[:200]
