"""Bars of the leaderboard: the targets for the methods together, relative to the teacher of the same board."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distillers.evaluation.leaderboard.records import Result, Row, Teacher
from distillers.evaluation.metrics import Estimate, ratio
from distillers.evaluation.subjects import STEPS, counted

BEST = {4: 0.6, 1: 0.9}
"""By number of steps, the largest share of the full teacher's kernel distance that the best method may have."""
LEAST = 0.9
"""Smallest share of the full teacher's R-precision and diversity that every method must keep."""

Share = Callable[[Row, Teacher], Estimate | None]


@dataclass(frozen=True)
class Bar:
    """A target, the measured value, and whose it is."""

    what: str
    bound: str
    measured: Estimate
    who: str
    holds: bool


def of_full(row: Row, teacher: Teacher) -> Estimate:
    """Kernel distance relative to the teacher's at its full step count."""
    return ratio(row.kernel_distance, teacher.full.kernel_distance)


def of_same(row: Row, teacher: Teacher) -> Estimate | None:
    """Kernel distance relative to the teacher's at the same number of steps; None if it was not measured there."""
    own = teacher.at(row.steps)
    return None if own is None else ratio(row.kernel_distance, own.kernel_distance)


def alignment(row: Row, teacher: Teacher) -> Estimate:
    """R-precision relative to the full teacher's."""
    return ratio(row.r_precision, teacher.full.r_precision)


def diversity(row: Row, teacher: Teacher) -> Estimate | None:
    """Pairwise distance relative to the full teacher's; None if it was not measured."""
    own, full = row.diversity, teacher.full.diversity
    return None if own is None or full is None else ratio(own, full)


def keeps(share: Estimate) -> bool:
    return share.value >= LEAST


def beats(share: Estimate) -> bool:
    return share.value < 1


def bars(teacher: Teacher, results: Sequence[Result]) -> list[Bar]:
    """All targets that the results decide. A method that could not be trained misses those on every method."""
    failed = [result.name for result in results if result.failure]
    full = counted(teacher.full.steps, "step")

    def every(what: str, bound: str, worst: tuple[Estimate, str], holds: bool) -> Bar:
        who = "; ".join([worst[1], *(f"not trained: {name}" for name in failed)])
        return Bar(what, bound, worst[0], who, holds and not failed)

    found = []
    for steps in STEPS:
        worst = _extreme(results, teacher, of_same, max, steps)
        if worst is not None:
            what = f"every method's kernel distance at {counted(steps, 'step')}, relative to the teacher's"
            found.append(every(what, "below 1", worst, beats(worst[0])))
    for steps, bound in BEST.items():
        best = _extreme(results, teacher, of_full, min, steps)
        if best is not None:
            what = f"the best kernel distance at {counted(steps, 'step')}, relative to the teacher's at {full}"
            found.append(Bar(what, f"at most {bound:g}", *best, best[0].value <= bound))
    shares: dict[str, Share] = {"R-precision": alignment, "diversity": diversity}
    for name, share in shares.items():
        least = _extreme(results, teacher, share, min)
        if least is not None:
            what = f"every method's {name} at any number of steps, relative to the teacher's at {full}"
            found.append(every(what, f"at least {LEAST:g}", least, keeps(least[0])))
    return found


def _extreme(
    results: Sequence[Result],
    teacher: Teacher,
    share: Share,
    choose: Callable[..., tuple[Estimate, str]],
    steps: int | None = None,
) -> tuple[Estimate, str] | None:
    """The smallest or largest share over all rows (with that number of steps), and whose it is."""
    found = [
        (measured, f"{result.name}, {counted(row.steps, 'step')}")
        for result in results
        for row in result.rows
        if steps in (None, row.steps) and (measured := share(row, teacher)) is not None
    ]
    return choose(found, key=lambda pair: pair[0].value) if found else None
