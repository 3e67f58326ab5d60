"""What a teacher's network may predict, over which schedule: a method that works in one works in all."""

import pytest

from tests.distillers.mixtures import VP
from weights.diffusion.parameterizations import Prediction
from weights.diffusion.schedules import EDM, DiscreteVP, RectifiedFlow, Schedule, TrigFlow

CONVENTIONS: list[tuple[Schedule, Prediction]] = [
    (VP, "v"),
    (VP, "x0"),
    (DiscreteVP.from_betas("scaled_linear"), "eps"),  # at zero terminal SNR, eps says nothing of x0
    (EDM(), "edm"),
    (RectifiedFlow(), "flow"),
    (TrigFlow(), "v"),
]

in_every_convention = pytest.mark.parametrize(
    ("schedule", "prediction"), CONVENTIONS, ids=lambda value: value if isinstance(value, str) else type(value).__name__
)
