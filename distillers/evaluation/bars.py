"""Bars: the targets for the bundled teacher, and for a student worth publishing, under the protocol."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from distillers.evaluation.measure import Quality, Real, Spread
from distillers.evaluation.metrics import Estimate, ratio
from distillers.evaluation.subjects import counted


@dataclass(frozen=True)
class Bar:
    """A target, and the measured value."""

    model: str
    what: str
    measured: Estimate
    bound: float
    at_most: bool
    """Whether the measured value may be at most ``bound``, or must be at least that."""

    @property
    def passed(self) -> bool:
        value = self.measured.value
        if not math.isfinite(self.measured.error):  # it rests on a single group of images
            return False
        return value <= self.bound if self.at_most else value >= self.bound

    @property
    def margin(self) -> float:
        """The distance from the bound, in the target's unit: positive if met, negative if missed."""
        difference = self.bound - self.measured.value
        return difference if self.at_most else -difference

    def as_json(self) -> dict[str, object]:
        return {
            "model": self.model,
            "what": self.what,
            "measured": self.measured.summary(),
            "bound": self.bound,
            "relation": "at most" if self.at_most else "at least",
            "passed": self.passed,
            "margin": self.margin if math.isfinite(self.margin) else None,
        }


def bars(real: Real, qualities: Sequence[Quality], spreads: Sequence[Spread], extractor: str) -> list[Bar]:
    """All targets that these measurements decide.

    Args:
        real: scores of real images.
        qualities: the teacher's, with its full number of steps, first.
        spreads: likewise.
        extractor: name of the feature extractor that the targets are defined in.
    """
    teacher = qualities[0]
    base = teacher.subject.model.name
    found = [
        Bar(base, "R-precision / held-out real images'", ratio(teacher.r_precision, real.r_precision), 0.7, False),
        Bar(base, "autoencoder PSNR, dB", real.psnr, 28.0, False),
    ]
    for quality in qualities[1:]:
        subject = quality.subject
        if subject.model.manifest is None or subject.leg != "plain" or subject.steps not in (1, 4):
            continue
        own, its = (q.distances[extractor].kernel_distance for q in (quality, teacher))
        at = counted(subject.steps, "step")
        bound = 0.75 if subject.steps == 4 else 1.0
        found += [
            Bar(subject.model.name, f"kernel distance / teacher's, {at}", ratio(own, its), bound, True),
            Bar(
                subject.model.name,
                f"R-precision / teacher's, {at}",
                ratio(quality.r_precision, teacher.r_precision),
                0.95,
                False,
            ),
        ]
    return found + [bar for spread in spreads for bar in _diversity_bars(spread, spreads)]


def _diversity_bars(spread: Spread, spreads: Sequence[Spread]) -> list[Bar]:
    """The targets of a student with the base's first step: its diversity, and its cost."""
    subject = spread.subject
    if subject.leg != "base first step":
        return []
    plain = next(
        s
        for s in spreads
        if s.subject.model is subject.model and s.subject.steps == subject.steps and s.subject.leg == "plain"
    )
    extra, at = Estimate(float(spread.evaluations - plain.evaluations), ()), counted(subject.steps, "step")
    return [
        Bar(
            subject.model.name,
            f"diversity with the base's first step / base's, {at}",
            ratio(spread.distance, spreads[0].distance),
            1.04,
            False,
        ),
        Bar(subject.model.name, f"extra network evaluations for it, {at}", extra, 1.0, True),
    ]
