"""Derivatives along a trajectory: two ways that agree, on real networks too."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distillers.precision import fast_kernels
from distillers.tangents import difference_along, jvp_along
from tests.helpers import tiny_unet
from weights.diffusion.conversion import Converted
from weights.diffusion.schedules import DiscreteVP, RectifiedFlow, TrigFlow
from weights.families.gaussian_mixture import MLP, MLPDenoiser
from weights.unet import UNetDenoiser

VP = DiscreteVP.from_betas("cosine", zero_terminal_snr=True)
T = torch.tensor([0.21, 0.5003, 0.93], dtype=torch.float64)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("schedule", [VP, RectifiedFlow()])
def test_on_an_mlp_they_agree(schedule: Any) -> None:
    torch.manual_seed(0)
    view = Converted(MLPDenoiser(MLP(2, 1, width=16, depth=2).double(), schedule), TrigFlow())
    cond = {"label": torch.zeros(3, dtype=torch.int64)}
    x, velocity = torch.randn(2, 3, 2, 1, 1, dtype=torch.float64)
    exact = jvp_along(lambda x, t: view(x, t, cond), x, T, velocity)
    assert not exact.requires_grad
    assert relative(difference_along(lambda x, t: view(x, t, cond), x, T, velocity), exact) < 1e-3


class TestUNet:
    """Its fused attention has no forward-mode derivative, and the trainer keeps it in channels-last and bfloat16."""

    def setup_method(self) -> None:
        torch.manual_seed(0)
        unet = tiny_unet().to(memory_format=torch.channels_last)
        self.view = Converted(UNetDenoiser(unet, VP, "v"), TrigFlow())
        self.cond = {"encoder_hidden_states": torch.randn(3, 5, 16)}
        self.x, self.velocity = torch.randn(2, 3, 4, 8, 8)

    def ask(self, x: Tensor, t: Tensor) -> Tensor:
        x0: Tensor = self.view(x, t, self.cond)
        return x0

    def test_in_float32(self) -> None:
        exact = jvp_along(self.ask, self.x, T, self.velocity)
        assert relative(difference_along(self.ask, self.x, T, self.velocity, 1e-4), exact) < 0.02

    def test_in_bfloat16_the_exact_one_is_near_and_the_difference_is_taken_in_float32(self) -> None:
        exact = jvp_along(self.ask, self.x, T, self.velocity)
        plain = difference_along(self.ask, self.x, T, self.velocity, 1e-4)
        with torch.autocast("cpu", torch.bfloat16), fast_kernels(torch.device("cpu")):
            assert relative(jvp_along(self.ask, self.x, T, self.velocity), exact) < 0.1
            assert relative(difference_along(self.ask, self.x, T, self.velocity, 1e-4), plain) < 1e-3


def test_a_difference_ends_at_the_last_time() -> None:
    asked: list[float] = []

    def function(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return 3 * x + 5 * t.reshape(-1, 1).float()

    t = torch.tensor([1.0], dtype=torch.float64)
    slope = difference_along(function, torch.ones(1, 1), t, torch.full((1, 1), 2.0), step=0.1, last=1.0)
    assert slope.item() == pytest.approx(3 * 2 + 5, rel=1e-5)
    assert asked == [1.0, 0.9]


def test_without_a_forward_mode_derivative_it_says_what_to_set() -> None:
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sin()

    def function(x: Tensor, t: Tensor) -> Tensor:
        opaque: Tensor = Opaque.apply(x)
        return opaque

    x, t = torch.full((1, 1), 0.5), torch.tensor([0.5], dtype=torch.float64)
    with pytest.raises(RuntimeError, match="finite_difference"):
        jvp_along(function, x, t, torch.ones_like(x))
    assert difference_along(function, x, t, torch.ones_like(x)).item() == pytest.approx(math.cos(0.5), abs=1e-4)


def test_what_does_not_move_has_no_derivative() -> None:
    x, t = torch.ones(2, 1), torch.ones(2, dtype=torch.float64)
    assert torch.equal(jvp_along(lambda x, t: torch.full((2, 1), 3.0), x, t, x), torch.zeros(2, 1))
