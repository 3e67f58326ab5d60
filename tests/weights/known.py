"""Schedules and mixtures that several tests run over."""

import torch

from weights.diffusion.mixture import Mixture
from weights.diffusion.schedules import EDM, DiscreteVP, RectifiedFlow, Schedule, TrigFlow

SCHEDULES: dict[str, Schedule] = {
    "sd": DiscreteVP.from_betas("scaled_linear"),
    "ddpm": DiscreteVP.from_betas("linear", 1e-4, 0.02),
    "cosine": DiscreteVP.from_betas("cosine"),
    "zero-terminal-snr": DiscreteVP.from_betas("cosine", zero_terminal_snr=True),
    "edm": EDM(),
    "flow": RectifiedFlow(),
    "flow-shifted": RectifiedFlow(shift=3.0),
    "trig": TrigFlow(),
    "trig-half": TrigFlow(sigma_data=0.5),
}


def line() -> Mixture:
    """The 1-D mixture of RECIPES' CPU-sized checks: weights .3/.7, means -.5/1, std .1/.2."""
    return Mixture(torch.tensor([0.3, 0.7]), torch.tensor([[-0.5], [1.0]]), torch.tensor([0.1, 0.2]), torch.arange(2))
