"""Losses against closed forms and finite differences."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distillers.losses.adversarial import approximate_r1, discriminator_loss, generator_loss
from distillers.losses.distribution_matching import distribution_matching_gradient, gradient_as_loss
from distillers.losses.regression import regression_loss
from distillers.losses.score import Weighting, denoising_loss, score_weight
from weights.diffusion.mixture import Mixture
from weights.diffusion.parameterizations import from_x0
from weights.diffusion.schedules import DiscreteVP, RectifiedFlow, Schedule, add_noise

VP = DiscreteVP.from_betas("scaled_linear")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_matching_gradient_is_the_formula() -> None:
    x, fake, teacher = (normal(3, 4, 2, 2, seed=seed) for seed in range(3))
    found = distribution_matching_gradient(x, fake, teacher)
    for row in range(3):
        expected = (fake[row] - teacher[row]) / (x[row] - teacher[row]).abs().mean()
        torch.testing.assert_close(found[row], expected)
    assert not found.requires_grad


def test_matching_gradient_takes_a_weight_per_picture_and_no_normalization() -> None:
    x, fake, teacher = (normal(3, 4, seed=seed) for seed in range(3))
    weight = torch.tensor([0.0, 1.0, 2.5])
    found = distribution_matching_gradient(x, fake, teacher, weight, normalize=False)
    torch.testing.assert_close(found, weight[:, None] * (fake - teacher))


def test_matching_gradient_drops_what_is_not_finite() -> None:
    x, teacher = normal(2, 3), normal(2, 3, seed=1)
    fake = teacher + 1
    fake[0, 0], fake[1, 2] = math.nan, math.inf
    found = distribution_matching_gradient(x, fake, teacher)
    assert torch.isfinite(found).all()
    assert found[0, 0] == 0 and found[1, 2] == 0 and found[0, 1] > 0


def test_matching_gradient_is_finite_where_the_teacher_gives_x_itself() -> None:
    x = normal(2, 3)
    assert torch.isfinite(distribution_matching_gradient(x, x + 1, x)).all()


def test_gradient_as_loss_has_that_gradient() -> None:
    x, gradient = normal(2, 3, 4).requires_grad_(), normal(2, 3, 4, seed=1)
    loss = gradient_as_loss(x, gradient)
    (found,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(found, gradient / x.numel())
    torch.testing.assert_close(loss, 0.5 * gradient.square().mean())


def test_matching_gradient_descends_the_kl_of_two_gaussians() -> None:
    """The student is N(m, s^2), the teacher N(0, 1): its mean must go towards 0, as the exact reverse KL's does."""
    teacher = Mixture(torch.ones(1), torch.zeros(1, 1), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    t = torch.full((4096,), 0.4)
    alpha, sigma = VP.alpha(t), VP.sigma(t)
    for mean in (-0.8, 0.5):
        student = Mixture(torch.ones(1), torch.tensor([[mean]]), torch.ones(1), torch.zeros(1, dtype=torch.int64))
        x = mean + normal(4096, 1, 1, 1)
        x_t = add_noise(VP, x, normal(4096, 1, 1, 1, seed=1), t)
        fake, real = student.x0(x_t, alpha, sigma), teacher.x0(x_t, alpha, sigma)
        gradient = distribution_matching_gradient(x, fake, real, normalize=False)
        # d KL / d mean at noise t is alpha^2 mean / (alpha^2 + sigma^2) times sigma^2 / alpha^2 in units of x0.
        torch.testing.assert_close(gradient.mean().item(), mean * float(sigma[0] ** 2), rtol=0.05, atol=0.01)


@pytest.mark.parametrize("schedule", [VP, RectifiedFlow()], ids=["vp", "flow"])
@pytest.mark.parametrize("weighting", ["eps", "v", "flow", "x0"])
@settings(max_examples=10)
@given(step=st.integers(20, 980))
def test_score_weight_is_the_prediction_squared_error(schedule: Schedule, weighting: Weighting, step: int) -> None:
    t = torch.full((1,), step / 1000, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x0, estimate, eps = (normal(1, 5, seed=seed).double() for seed in range(3))
    x_t = add_noise(schedule, x0, eps, t)
    true, guess = (from_x0(value, x_t, alpha, sigma, weighting) for value in (x0, estimate))
    expected = (guess - true).square().mean().float()
    found = denoising_loss(estimate, x0, score_weight(alpha, sigma, weighting))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_edm_weight_is_the_papers() -> None:
    sigma = torch.tensor([0.1, 1.0, 20.0])
    found = score_weight(torch.ones(3), sigma, "edm", sigma_data=0.5)
    torch.testing.assert_close(found, (sigma**2 + 0.25) / (sigma * 0.5) ** 2)


def test_every_weight_is_finite_at_both_ends() -> None:
    for weighting in get_args(Weighting):
        assert torch.isfinite(score_weight(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), weighting)).all()
    with pytest.raises(ValueError, match="'v'"):
        score_weight(torch.ones(1), torch.ones(1), "noise")  # type: ignore[arg-type]


def test_denoising_loss_gives_the_target_no_gradient() -> None:
    estimate, x0 = normal(2, 3).requires_grad_(), normal(2, 3, seed=1).requires_grad_()
    denoising_loss(estimate, x0, torch.ones(2)).backward()
    assert estimate.grad is not None and x0.grad is None


def test_adversarial_losses_pull_the_right_way() -> None:
    real, fake = torch.zeros(4, 2, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
    loss = discriminator_loss(real, fake)
    torch.testing.assert_close(loss.item(), 2 * math.log(2), rtol=1e-6, atol=0)
    loss.backward()
    assert real.grad is not None and fake.grad is not None
    assert (real.grad < 0).all() and (fake.grad > 0).all()
    student = torch.zeros(4, 2, requires_grad=True)
    generator_loss(student).backward()
    assert student.grad is not None and (student.grad < 0).all()


def test_adversarial_losses_stay_finite_for_huge_logits() -> None:
    huge = torch.tensor([1e4, -1e4])
    assert torch.isfinite(generator_loss(huge)) and torch.isfinite(discriminator_loss(huge, huge))


def test_approximate_r1_estimates_the_squared_gradient() -> None:
    """For a linear D its expectation is exactly s^2 |w|^2."""
    w, x, eps = normal(8), normal(20_000, 8, seed=1), normal(20_000, 8, seed=2)
    found = approximate_r1(x @ w, (x + 0.1 * eps) @ w)
    torch.testing.assert_close(found, 0.01 * w.square().sum(), rtol=0.05, atol=0)


def test_regression_loss_is_the_square_or_the_pseudo_huber() -> None:
    x, target = normal(2, 3), normal(2, 3, seed=1)
    error = (x - target).square()
    torch.testing.assert_close(regression_loss(x, target), error.mean())
    torch.testing.assert_close(regression_loss(x, target, 0.03), ((error + 0.0009).sqrt() - 0.03).mean())


def test_losses_of_half_precision_are_computed_in_float32() -> None:
    x, other = normal(2, 3).bfloat16(), normal(2, 3, seed=1).bfloat16()
    found = [
        gradient_as_loss(x, distribution_matching_gradient(x, other, other + 1)),
        denoising_loss(x, other, torch.ones(2)),
        generator_loss(x),
        discriminator_loss(x, other),
        approximate_r1(x, other),
        regression_loss(x, other),
    ]
    assert [loss.dtype for loss in found] == [torch.float32] * len(found)
