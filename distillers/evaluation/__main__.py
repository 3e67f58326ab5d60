"""Measures students against their base with one protocol, and writes JSON, contact sheets, curves and an HTML report.

    python -m distillers.evaluation emoji-average --store STORE --out evaluation [--data FOLDER] [--quick] [--record]

NAMES are students in the store (or bundled ones). The name or folder of a base among them only selects the base, which
is measured in any case. An evaluation that was stopped continues where it was. With --record, the figures go into the
students' manifests, and so into /v1/models.
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distillers.evaluation import bars as bars_
from distillers.evaluation import report
from distillers.evaluation.cache import Cache
from distillers.evaluation.features import EXTRACTORS, EfficientNetLite0, Unavailable, extractor
from distillers.evaluation.measure import Distances, Evaluation
from distillers.evaluation.models import DEFAULT_BASE, load_models
from distillers.evaluation.protocol import CHOICES
from distillers.evaluation.real import yardstick
from distillers.evaluation.record import check_recordable, record
from distillers.evaluation.subjects import Model, coarse_subjects, specific_subjects
from distillers.evaluation.terminal import add_options, check_batch, make_console, tracking
from weights.bundled import STUDENTS
from weights.commands import TYPED, parser_of
from weights.store import Store, StoreError

FOREIGN = (
    "captions and real images are the bundled emoji's, so these figures say how well it draws emoji: name a folder of its "
    "own data with --data"
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0 if the measurements were made, whether or not the targets were met."""
    options = parser().parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console, errors = make_console(), Console(stderr=True)
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:  # before the measurements rather than after
        errors.print(
            f"error: the report needs {', '.join(missing)}: pip install 'fewstep[metrics]'", style="red", markup=False
        )
        return 2
    try:
        base, students = load_models(options.names, options.store, options.base, options.device)
        if base.name != DEFAULT_BASE and options.data is None:
            errors.print(Text(f"{base.name}: {FOREIGN}", style="yellow"))
        store = Store(options.store if options.store is not None else STUDENTS, STUDENTS)
        manifests = [student.manifest for student in students if student.manifest is not None]
        if options.record:
            check_recordable(store, [manifest.name for manifest in manifests], options.quick, options.data)
        results = evaluate(base, students, options, errors)
        show(results, options.out, console)
        if options.record:
            record(store, manifests, report.metrics_json(results))
            console.print(Text(f"recorded in the manifests of {', '.join(manifest.name for manifest in manifests)}"))
    except (Unavailable, StoreError, ValueError, OSError) as error:
        errors.print(Text(f"error: {error}", style="red"))
        return 2
    return 0


def show(results: report.Results, folder: Path, console: Console) -> None:
    """Writes the report, and prints its tables."""
    path = report.write(results, folder)
    for table in tables(results):
        console.print(table)
    console.print(Text(f"report: {path}"))


def parser() -> argparse.ArgumentParser:
    """The command-line parser."""
    made = parser_of("distillers.evaluation", __doc__)
    made.add_argument(
        "names",
        nargs="*",
        metavar="NAMES",
        help="students to measure (by default all of the store and the bundled ones)",
    )
    add_options(made)
    made.add_argument(
        "--out",
        type=Path,
        required=TYPED not in os.environ,
        help="folder for the report, from which a restart also resumes; with `fewstep`, runs/evaluation if left out",
    )
    made.add_argument(
        "--quick", action="store_true", help="measure only a small sample, too noisy to judge any target by"
    )
    made.add_argument(
        "--record",
        action="store_true",
        help="write the figures into the students' manifests, which /v1/models shows; not with --quick or --data",
    )
    made.add_argument(
        "--extractors",
        nargs="+",
        choices=list(EXTRACTORS),
        default=[EfficientNetLite0.name],
        help="features to measure distances in (%(default)s); targets always use efficientnet-lite0's",
    )
    return made


def evaluate(base: Model, students: list[Model], options: argparse.Namespace, console: Console) -> report.Results:
    """Makes all measurements, the teacher's first."""
    check_batch(options.batch)
    protocol, pictures = yardstick(options.data, base.pipeline.size, options.quick)
    names = dict.fromkeys([EfficientNetLite0.name, *options.extractors])
    extractors = [extractor(name, options.device) for name in names]
    with tracking(console) as track:
        shared, own = Cache(options.cache), Cache(options.out / "cache")
        evaluation = Evaluation(protocol, base, extractors, shared, own, track, options.batch, pictures)
        real = evaluation.real()
        qualities = [evaluation.quality(subject) for subject in specific_subjects(base, students)]
        spreads = [evaluation.spread(subject) for subject in coarse_subjects(base, students)]
    found = bars_.bars(real, qualities, spreads, EfficientNetLite0.name)
    return report.Results(
        protocol=protocol,
        quick=options.quick,
        data="emoji" if options.data is None else str(options.data),
        extractor=EfficientNetLite0.name,
        real=real,
        qualities=qualities,
        spreads=spreads,
        bars=found,
        machine=report.machine(options.device),
        finished=report.now(),
    )


def tables(results: report.Results) -> list[Table]:
    """The tables for the terminal: the main figures, and the targets."""
    note = f" (QUICK: {len(results.protocol.drawings)} images, too noisy for targets)" if results.quick else ""
    figures = Table("images", title="Held-out prompts" + note)
    found = "R-precision" + ("" if results.protocol.choices == CHOICES else f" (1 of {results.protocol.choices})")
    for name in ("kernel distance", "Fréchet", "precision", "recall", found, "evaluations", "ms", "ms, single"):
        figures.add_column(name, justify="right")
    yardsticks = (("real (floor)", results.real.floor), ("real, held out", results.real.held_out))
    for title, distances in yardsticks:
        row = distances[results.extractor]
        score = f"{results.real.r_precision.value:.3f}" if distances is results.real.held_out else ""
        figures.add_row(title, *_distances(row), score, "", "", "", style="dim")
    for quality in results.qualities:
        figures.add_row(
            Text(quality.subject.title),
            *_distances(quality.distances[results.extractor]),
            f"{quality.r_precision.value:.3f}",
            str(quality.evaluations),
            f"{quality.milliseconds:.1f}",
            f"{quality.latency:.1f}",
        )
    diversity = Table("images", title="Diversity, coarse prompts")
    for name in ("distance", "Vendi", "evaluations"):
        diversity.add_column(name, justify="right")
    for spread in results.spreads:
        distance = f"{spread.distance.value:.2f} ± {spread.distance.high - spread.distance.value:.2f}"
        diversity.add_row(Text(spread.subject.title), distance, f"{spread.vendi.value:.3f}", str(spread.evaluations))
    held = Table("model", "target", "measured", "95%", "bound", "", "margin", title="Targets" + note)
    for bar in results.bars:
        held.add_row(
            Text(bar.model),
            bar.what,
            f"{bar.measured.value:.3f}",
            f"{bar.measured.low:.3f} to {bar.measured.high:.3f}",
            f"{'<=' if bar.at_most else '>='} {bar.bound:g}",
            Text("PASS", style="green") if bar.passed else Text("MISS", style="bold red"),
            f"{bar.margin:+.3f}",
        )
    return [figures, diversity, held]


def _distances(row: Distances) -> tuple[str, str, str, str]:
    kernel = f"{row.kernel_distance.value:.3f} ± {row.kernel_distance.high - row.kernel_distance.value:.3f}"
    return kernel, f"{row.frechet_distance:.1f}", f"{row.precision:.3f}", f"{row.recall:.3f}"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
