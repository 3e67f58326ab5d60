"""Every divergence's weight against its definition, and the gradient it gives against the closed form."""

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distillers.losses.divergences import (
    DIVERGENCES,
    DivergenceName,
    density_ratio,
    divergence_weight,
    weight_elasticity,
)
from weights.diffusion.mixture import Mixture, log_ratio

F: dict[DivergenceName, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda r: -r.log(),
    "softened_reverse_kl": lambda r: (r + 1) * ((r + 1) / r).log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "squared_hellinger": lambda r: 4 * (1 - r.sqrt()),
    "forward_kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman_chi2": lambda r: 1 / (2 * r),
    "pearson_chi2": lambda r: (r - 1).square() / 2,
}
"""f by name, scaled so that ``r^2 f''(r)`` has the factor that the weights have."""

ALPHA, SIGMA = torch.tensor(0.8).double(), torch.tensor(0.6).double()


def student(mean: Tensor | float) -> Mixture:
    return Mixture(torch.ones(1), torch.as_tensor(mean).reshape(1, 1).double(), torch.tensor([0.5]))


def teacher() -> Mixture:
    return Mixture(torch.tensor([0.3, 0.7]), torch.tensor([[-0.5], [1.0]]), torch.tensor([0.1, 0.2]))


def test_the_table_is_complete() -> None:
    assert set(F) == set(DIVERGENCES) == set(get_args(DivergenceName))
    with pytest.raises(ValueError, match="jensen_shannon"):
        divergence_weight("total_variation", torch.ones(1))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
@given(ratio=st.floats(0.05, 20))
def test_a_weight_is_r_squared_times_the_second_derivative(name: DivergenceName, ratio: float) -> None:
    r = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(F[name](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    assert torch.allclose(divergence_weight(name, r.detach()), (r**2 * second).detach(), rtol=1e-8)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_the_weighted_score_difference_is_the_divergences_gradient(name: DivergenceName) -> None:
    """By quadrature, in one dimension, for a student that is a Gaussian and shifts its mean."""
    x = torch.linspace(-5, 5, 20_001, dtype=torch.float64).unsqueeze(1)
    dx = float(x[1, 0] - x[0, 0])

    def divergence(mean: float) -> float:
        q = student(mean).log_density(x, ALPHA, SIGMA).exp()
        ratio = log_ratio(teacher(), student(mean), x, ALPHA, SIGMA).exp()
        return float((q * F[name](ratio)).sum()) * dx

    mean, step = 0.4, 1e-4
    expected = (divergence(mean + step) - divergence(mean - step)) / (2 * step)
    q = student(mean)
    ratio = log_ratio(teacher(), q, x, ALPHA, SIGMA).exp()
    difference = (q.score(x, ALPHA, SIGMA) - teacher().score(x, ALPHA, SIGMA)).flatten()
    weighted = q.log_density(x, ALPHA, SIGMA).exp() * divergence_weight(name, ratio) * difference
    assert float(weighted.sum()) * dx * float(ALPHA) == pytest.approx(expected, rel=1e-4)


def test_ratios_come_from_logits_and_are_held() -> None:
    logits = torch.tensor([[0.0, 2.0], [50.0, 50.0], [-50.0, -50.0]], requires_grad=True)
    ratio = density_ratio(logits)
    (gradient,) = torch.autograd.grad(ratio.sum(), logits)
    assert torch.allclose(gradient[0], torch.full((2,), math.e / 2)), "a ratio's derivative by its logit is itself"
    assert torch.allclose(ratio, torch.tensor([math.e, math.exp(10.0), math.exp(-10.0)]), rtol=1e-5)


@pytest.mark.parametrize("divergence", [*sorted(DIVERGENCES), (0.3, -2.0)], ids=str)
def test_the_elasticity_is_the_weights_own(divergence: DivergenceName | tuple[float, float]) -> None:
    r = torch.tensor([0.2, 1.0, 7.0], dtype=torch.float64, requires_grad=True)
    weight = divergence_weight(divergence, r)
    (slope,) = torch.autograd.grad(weight.sum(), r)
    assert torch.allclose((r * slope / weight).detach(), weight_elasticity(divergence, r.detach()))
