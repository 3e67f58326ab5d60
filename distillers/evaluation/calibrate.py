"""Calibrates a student's diversity: which first steps by its base make its images most diverse, and at what cost.

    python -m distillers.evaluation.calibrate emoji-average --store STORE [--quick] [--write]

The candidates generate the coarse prompts at each of the student's step counts. In most, the base replaces the
student's first step: with all combinations of base steps (1, 2, 4) and base guidance (0, 1, the base's default); with
two base steps of which the first leaves out the prompt for 1/32, 1/16 or 1/8 of the time; and with one or two that start
at t = 0.9 instead of the student's own first time. In the others, one base step comes before all of the student's steps,
which are scaled to begin at t = 0.75 or 0.6. Only these are possible at one step.

The command chooses the candidate with the largest gain in diversity over the student alone, averaged over the step
counts that all candidates have, that costs at most one more network evaluation per image (the others are not measured)
and keeps prompt alignment and the distance to real images within a tolerance of the student's own at every step count
that it has. With --write, the choice goes into the student's manifest, for requests with `diversity: true`.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distillers.evaluation.cache import Cache
from distillers.evaluation.features import EfficientNetLite0, Unavailable, extractor
from distillers.evaluation.measure import Evaluation, Quality, Spread
from distillers.evaluation.metrics import Estimate, ratio
from distillers.evaluation.models import load_models
from distillers.evaluation.real import yardstick
from distillers.evaluation.record import without_leg
from distillers.evaluation.subjects import Model, Subject, evaluations
from distillers.evaluation.terminal import add_options, check_batch, make_console, tracking
from weights.bundled import STUDENTS
from weights.commands import parser_of
from weights.contracts import Diversity
from weights.store import Forbidden, Store, StoreError
from weights.trajectory import CannotDraw

BASE_STEPS = (1, 2, 4)
UNPROMPTED = (1 / 32, 1 / 16, 1 / 8)
START = 0.9
"""Where the base starts if not at the student's own first time. At earlier ones it answers more to the noise."""
UNTIL = (0.75, 0.6)
"""Where the student takes over from a base step that comes before all of its own."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a calibration may cost."""

    evaluations: int
    """Network evaluations per image beyond those of the student alone."""
    alignment: float
    """Share of the student's own R-precision that may be lost."""
    distance: float
    """Relative increase allowed over the student's own kernel distance."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate at one step count, with the student alone for comparison."""

    steps: int
    diversity: Diversity
    spread: Spread
    plain: Spread
    quality: Quality | None = None
    """Measured only if the choice depends on it."""
    plain_quality: Quality | None = None

    @property
    def gain(self) -> Estimate:
        """Diversity relative to the student's own."""
        return ratio(self.spread.distance, self.plain.distance)

    @property
    def extra(self) -> int:
        """Network evaluations per image beyond the student's own."""
        return self.spread.evaluations - self.plain.evaluations

    @property
    def alignment(self) -> float | None:
        """R-precision relative to the student's own."""
        if self.quality is None or self.plain_quality is None:
            return None
        return ratio(self.quality.r_precision, self.plain_quality.r_precision).value

    @property
    def distance(self) -> float | None:
        """Relative increase of the kernel distance to real images over the student's own; negative if it is lower."""
        if self.quality is None or self.plain_quality is None:
            return None
        own, plain = (q.distances[EfficientNetLite0.name].kernel_distance for q in (self.quality, self.plain_quality))
        # The estimate is unbiased, and near 0 for a perfect student, with either sign.
        return (own.value - plain.value) / max(abs(plain.value), 1e-12)

    def keeps_quality(self, limits: Limits) -> bool:
        """Whether the measured quality is within the limits."""
        alignment, distance = self.alignment, self.distance
        assert alignment is not None and distance is not None, "not measured"
        return alignment >= 1 - limits.alignment and distance <= limits.distance


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """All trials, and the choice; None if no candidate within the limits gains anything."""

    trials: Sequence[Trial]
    chosen: Diversity | None


def calibrate(evaluation: Evaluation, student: Model, limits: Limits) -> Calibration:
    """Tries all candidates; see the module docstring.

    Raises:
        ValueError: none of the candidates is within the limit of evaluations.
    """
    base = evaluation.base
    tried = {
        candidate: counts
        for candidate in candidates_for(base)
        if (counts := step_counts(student, base, candidate, limits.evaluations))
    }
    if not tried:
        raise ValueError(
            f"no candidate costs student {student.name!r} at most {limits.evaluations} more network evaluation(s) per "
            "image: raise --extra-evaluations"
        )
    trials = spreads(evaluation, student, tried)

    @cache
    def own_quality(steps: int) -> Quality:
        return evaluation.quality(Subject(student, base, steps))

    gains = mean_gains(trials)
    chosen = None
    for candidate in sorted(gains, key=lambda each: gains[each], reverse=True):
        if gains[candidate] <= 1:
            break
        for place, trial in enumerate(trials[candidate]):
            quality, own = evaluation.quality(trial.spread.subject), own_quality(trial.steps)
            trials[candidate][place] = measured = replace(trial, quality=quality, plain_quality=own)
            if not measured.keeps_quality(limits):
                break  # the other step counts cannot change the decision, and take minutes
        else:
            chosen = candidate
            break
    return Calibration(trials=[trial for own in trials.values() for trial in own], chosen=chosen)


def spreads(
    evaluation: Evaluation, student: Model, tried: Mapping[Diversity, Sequence[int]]
) -> dict[Diversity, list[Trial]]:
    """The diversity of each candidate at its step counts, beside the student alone; quality is not measured."""
    base = evaluation.base

    @cache
    def alone(steps: int) -> Spread:
        return evaluation.spread(Subject(student, base, steps))

    def trial(steps: int, candidate: Diversity) -> Trial:
        subject = Subject(student, base, steps, "base first step", candidate)
        return Trial(steps=steps, diversity=candidate, spread=evaluation.spread(subject), plain=alone(steps))

    return {candidate: [trial(steps, candidate) for steps in counts] for candidate, counts in tried.items()}


def mean_gains(trials: Mapping[Diversity, Sequence[Trial]]) -> dict[Diversity, float]:
    """Each candidate's gain, averaged over the step counts that all have, so that they can be compared."""
    common = set.intersection(*({trial.steps for trial in own} for own in trials.values()))
    return {
        candidate: fmean(trial.gain.value for trial in own if trial.steps in common)
        for candidate, own in trials.items()
    }


def candidates_for(base: Model) -> list[Diversity]:
    """All candidates, whether or not a student can use them."""
    guidances = dict.fromkeys((0.0, 1.0, base.pipeline.default_guidance))
    found = [Diversity(base_steps=steps, base_guidance=guidance) for guidance in guidances for steps in BASE_STEPS]
    found += [Diversity(base_steps=2, unprompted=time) for time in UNPROMPTED]
    found += [Diversity(base_steps=steps, start=START) for steps in (1, 2)]
    return found + [Diversity(start=start, skip=0, until=until) for start in (None, START) for until in UNTIL]


def step_counts(student: Model, base: Model, candidate: Diversity, extra: int) -> list[int]:
    """The student's step counts for which a candidate is to be measured.

    These are all at which the base can hand over. A candidate that replaces student steps needs several, so one step is
    left out; but if it cannot hand over at another, or costs more than ``extra`` network evaluations, there are none.
    """
    assert student.manifest is not None, "a student"
    counts = [steps for steps in student.steps if steps > candidate.skip]
    for steps in counts:
        try:
            led, alone = (evaluations(student, base, steps, diversity) for diversity in (candidate, None))
        except CannotDraw:
            return []
        if led - alone > extra:
            return []
    return counts


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0 if a calibration was found, 1 if none is worthwhile, 2 on an error."""
    options = parser().parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console, errors = make_console(), Console(stderr=True)
    limits = Limits(
        evaluations=options.extra_evaluations, alignment=options.tolerance, distance=options.distance_tolerance
    )
    try:
        check_batch(options.batch)
        store = Store(options.store if options.store is not None else STUDENTS, STUDENTS)
        if options.write:
            check_writable(store, options)
        base, students = load_models([options.name], options.store, options.base, options.device)
        if not students:
            raise ValueError(f"{options.name!r} is a base: name a student")
        result = measure(base, students[0], limits, options, errors)
        console.print(table(result, students[0]))
        if result.chosen is None:
            console.print("no calibration within these limits makes the images more diverse: nothing is chosen")
            return 1
        console.print(f"chosen: {described(result.chosen)}")
        if options.write:
            manifest = students[0].manifest
            assert manifest is not None, "a student"
            changed: dict[str, object] = {"diversity": result.chosen}
            if result.chosen != manifest.diversity:
                changed["metrics"] = without_leg(manifest.metrics)
            store.amend(manifest.model_copy(update=changed))
            console.print(Text(f"written to the manifest of {options.name!r}"))
    except (Unavailable, StoreError, ValueError, OSError) as error:
        errors.print(Text(f"error: {error}", style="red"))
        return 2
    return 0


def check_writable(store: Store, options: argparse.Namespace) -> None:
    """Checks, before hours of measuring, that the result can be written.

    Raises:
        ValueError: the protocol is too small for its result to be stored.
        StoreError: there is no such student, or it cannot be modified; see `Store.check_amendable`.
    """
    if options.quick:
        raise ValueError("--quick measures only a small sample: leave it out to use --write")
    try:
        store.check_amendable(options.name)
    except Forbidden as error:
        raise Forbidden(f"{error}; without --write the choice is printed, and requests can name it") from error


def measure(base: Model, student: Model, limits: Limits, options: argparse.Namespace, console: Console) -> Calibration:
    """Runs `calibrate` with the chosen protocol, showing progress."""
    protocol, pictures = yardstick(options.data, base.pipeline.size, options.quick)
    cache = Cache(options.cache)
    with tracking(console) as track:
        features = [extractor(EfficientNetLite0.name, options.device)]
        evaluation = Evaluation(protocol, base, features, cache, cache, track, options.batch, pictures)
        return calibrate(evaluation, student, limits)


def parser() -> argparse.ArgumentParser:
    """The command-line parser."""
    made = parser_of("distillers.evaluation.calibrate", __doc__)
    made.add_argument("name", metavar="NAME", help="a student of the store, or a bundled one")
    made.add_argument("--write", action="store_true", help="write the choice into the student's manifest")
    made.add_argument("--quick", action="store_true", help="measure only a small sample; its result cannot be written")
    made.add_argument(
        "--extra-evaluations",
        type=int,
        default=1,
        metavar="N",
        help="most extra network evaluations per image (%(default)s)",
    )
    made.add_argument(
        "--tolerance",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of R-precision that may be lost (%(default)s)",
    )
    made.add_argument(
        "--distance-tolerance",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share by which the kernel distance to real images may grow (%(default)s)",
    )
    add_options(made)
    return made


def described(diversity: Diversity) -> str:
    """A readable description of a calibration."""
    return ", ".join(f"{name} {value:g}" for name, value in diversity.model_dump().items() if value is not None)


def table(result: Calibration, student: Model) -> Table:
    """The table for the terminal."""
    made = Table(
        "steps",
        "base steps",
        "guidance",
        "start",
        "until",
        "unprompted",
        title=f"{student.name}: the base's first steps",
    )
    for name in (
        "diversity",
        "/ alone, 95%",
        "evaluations",
        "ms",
        "R-precision / alone",
        "kernel distance",
        "",
    ):
        made.add_column(name, justify="right")
    shown: set[int] = set()
    for trial in sorted(result.trials, key=lambda trial: trial.steps):
        if trial.steps not in shown:
            shown.add(trial.steps)
            plain = trial.plain
            cost = (str(plain.evaluations), f"{plain.milliseconds:.1f}")
            made.add_row(str(trial.steps), *"-----", f"{plain.distance.value:.2f}", "1", *cost, "1", "", "alone")
        gain = trial.gain
        made.add_row(
            str(trial.steps),
            str(trial.diversity.base_steps),
            f"{trial.diversity.base_guidance:g}",
            _own_unless(trial.diversity.start),
            _own_unless(trial.diversity.until),
            f"{trial.diversity.unprompted:g}",
            f"{trial.spread.distance.value:.2f}",
            f"{gain.value:.3f} ± {gain.high - gain.value:.3f}",
            f"{trial.spread.evaluations} ({trial.extra:+d})",
            f"{trial.spread.milliseconds:.1f}",
            "" if trial.alignment is None else f"{trial.alignment:.3f}",
            "" if trial.distance is None else f"{trial.distance:+.1%}",
            "chosen" if trial.diversity == result.chosen else "",
        )
    return made


def _own_unless(time: float | None) -> str:
    return "own" if time is None else f"{time:g}"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
