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


def before(x: Tensor, t: Tensor, velocity: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """The state and the time a little earlier."""
    s = t * (1 - step)
    return (x + (s - t).reshape(-1, 1, 1, 1).to(x.dtype) * velocity), s


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("schedule", [VP, RectifiedFlow()])
def test_on_an_mlp_they_agree(schedule: Any) -> None:
    torch.manual_seed(0)
    view = Converted(MLPDenoiser(MLP(2, 1, width=16, depth=2).double(), schedule), TrigFlow())
    cond = {"label": torch.zeros(3, dtype=torch.int64)}
    x, velocity = torch.randn(2, 3, 2, 1, 1, dtype=torch.float64)
    value, exact = jvp_along(lambda x, t: view(x, t, cond), x, T, velocity)
    assert not exact.requires_grad
    assert torch.equal(value, view(x, T, cond))
    twice = {"label": cond["label"].repeat(2)}
    found, difference = difference_along(lambda x, t: view(x, t, twice), x, T, *before(x, T, velocity, 1e-4))
    torch.testing.assert_close(found, value)
    assert relative(difference, exact) < 1e-3


class TestUNet:
    """Its fused attention has no forward-mode derivative, and the trainer keeps it in channels-last and bfloat16."""

    def setup_method(self) -> None:
        torch.manual_seed(0)
        unet = tiny_unet().to(memory_format=torch.channels_last)
        self.view = Converted(UNetDenoiser(unet, VP, "v"), TrigFlow())
        self.states = torch.randn(3, 5, 16)
        self.x, self.velocity = torch.randn(2, 3, 4, 8, 8)

    def ask(self, x: Tensor, t: Tensor) -> Tensor:
        x0: Tensor = self.view(x, t, {"encoder_hidden_states": self.states.repeat(len(x) // 3, 1, 1)})
        return x0

    def difference(self, step: float) -> Tensor:
        return difference_along(self.ask, self.x, T, *before(self.x, T, self.velocity, step))[1]

    def test_in_float32(self) -> None:
        exact = jvp_along(self.ask, self.x, T, self.velocity)[1]
        assert relative(self.difference(1e-4), exact) < 0.05

    def test_in_bfloat16_both_are_near_where_the_difference_reaches_far_enough(self) -> None:
        exact, plain = jvp_along(self.ask, self.x, T, self.velocity)[1], self.difference(0.1)
        with torch.autocast("cpu", torch.bfloat16), fast_kernels(torch.device("cpu")):
            assert relative(jvp_along(self.ask, self.x, T, self.velocity)[1], exact) < 0.1
            assert relative(self.difference(0.1), plain) < 0.1


def test_a_difference_is_that_of_two_points() -> None:
    def function(x: Tensor, t: Tensor) -> Tensor:
        return 3 * x + 5 * t.reshape(-1, 1).float()

    x, t = torch.tensor([[1.0], [0.5]]), torch.tensor([1.0, 0.4], dtype=torch.float64)
    value, slope = difference_along(function, x, t, x - 0.1 * 2.0, t - 0.1)
    torch.testing.assert_close(value, function(x, t))
    torch.testing.assert_close(slope, torch.full((2, 1), 3 * 2 + 5.0))


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
    assert difference_along(function, x, t, x - 1e-3, t - 1e-3)[1].item() == pytest.approx(math.cos(0.5), abs=1e-3)


def test_what_does_not_move_has_no_derivative() -> None:
    x, t = torch.ones(2, 1), torch.ones(2, dtype=torch.float64)
    assert torch.equal(jvp_along(lambda x, t: torch.full((2, 1), 3.0), x, t, x)[1], torch.zeros(2, 1))
