"""Losses whose gradient flows through both scores, against the divergences they stand for, by quadrature in one dimension.

The student is a Gaussian that shifts its mean m: ``x = m + s z``, ``x_t = alpha x + sigma e``; its score is exact.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distillers.losses.distribution_matching import distribution_matching_gradient
from distillers.losses.divergences import DIVERGENCES, Divergence, divergence_weight, weight_elasticity
from distillers.losses.score_identity import score_identity_loss, score_implicit_loss
from weights.diffusion.mixture import Mixture, log_ratio

ALPHA, SIGMA = torch.tensor(0.8).double(), torch.tensor(0.6).double()
STD, MEAN = 0.5, 0.4
TEACHER = Mixture(torch.tensor([0.3, 0.7]), torch.tensor([[-0.5], [1.0]]), torch.tensor([0.3, 0.4]))
POINTS = torch.linspace(-5, 5, 8001, dtype=torch.float64).unsqueeze(1)


def student(mean: float) -> Mixture:
    return Mixture(torch.ones(1), torch.tensor([[mean]]).double(), torch.tensor([STD]))


def gap_of_scores(mean: float, x: Tensor = POINTS) -> Tensor:
    return (student(mean).score(x, ALPHA, SIGMA) - TEACHER.score(x, ALPHA, SIGMA)).flatten()


def density(mean: float) -> Tensor:
    return student(mean).log_density(POINTS, ALPHA, SIGMA).exp() * float(POINTS[1, 0] - POINTS[0, 0])


def slope(of: Callable[[float], float], step: float = 1e-3) -> float:
    return (of(MEAN + step) - of(MEAN - step)) / (2 * step)


def gradient_of(loss: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]) -> float:
    """d/dm of the expectation of ``loss(x, F_S, F_T, x_t, chance)``, in units of scores squared.

    ``chance`` weighs each point so that the loss's plain mean is the expectation.
    """
    grid = torch.linspace(-6, 6, 241, dtype=torch.float64)
    normal = torch.exp(-grid.square() / 2)
    normal = normal / normal.sum()
    z, e = (axis.reshape(-1, 1) for axis in torch.meshgrid(grid, grid, indexing="ij"))
    chance = (normal.unsqueeze(1) * normal.unsqueeze(0)).flatten() * len(z)
    mean = torch.tensor(MEAN, dtype=torch.float64, requires_grad=True)
    x = mean + STD * z
    x_t = ALPHA * x + SIGMA * e
    fake, teacher = student(MEAN).x0(x_t, ALPHA, SIGMA), TEACHER.x0(x_t, ALPHA, SIGMA)
    (gradient,) = torch.autograd.grad(loss(x, fake, teacher, x_t, chance), mean)
    return float(gradient * (ALPHA / SIGMA**2) ** 2)


def ratio_at(x_t: Tensor) -> Tensor:
    return log_ratio(TEACHER, student(MEAN), x_t, ALPHA, SIGMA).exp()


def fisher(mean: float) -> float:
    return float((density(mean) * gap_of_scores(mean).square()).sum()) / 2


def fisher_of_fixed_points(mean: float) -> float:
    """The points are the student's at `MEAN`, the score moves."""
    return float((density(MEAN) * gap_of_scores(mean).square()).sum()) / 2


@pytest.mark.parametrize(("alpha", "divergence"), [(0.5, fisher), (1.0, fisher_of_fixed_points)])
def test_sid_is_the_fisher_divergences_gradient(alpha: float, divergence: Callable[[float], float]) -> None:
    ours = gradient_of(lambda x, s, t, _, w: score_identity_loss(x, s, t, alpha, w, normalize=False))
    assert ours == pytest.approx(slope(divergence), rel=1e-3)


@pytest.mark.parametrize("divergence", [*sorted(DIVERGENCES), (0.5, -0.5)], ids=str)
def test_with_weights_it_is_the_weighted_fisher_divergences_gradient(divergence: Divergence) -> None:
    """The total derivative: of the points, of the student's score, and of the ratio inside the weight."""

    def expanded(mean: float) -> float:
        ratio = log_ratio(TEACHER, student(mean), POINTS, ALPHA, SIGMA).exp()
        weighted = divergence_weight(divergence, ratio) * gap_of_scores(mean).square()
        return float((density(mean) * weighted).sum()) / 2

    def loss(x: Tensor, fake: Tensor, teacher: Tensor, x_t: Tensor, chance: Tensor) -> Tensor:
        ratio = ratio_at(x_t)
        alpha = (1 + weight_elasticity(divergence, ratio)) / 2
        weight = divergence_weight(divergence, ratio) * chance
        return score_identity_loss(x, fake, teacher, alpha, weight, normalize=False)

    assert gradient_of(loss) == pytest.approx(slope(expanded), rel=2e-3)


def test_without_the_ratios_own_gradient_it_is_not() -> None:
    def loss(x: Tensor, fake: Tensor, teacher: Tensor, x_t: Tensor, chance: Tensor) -> Tensor:
        weight = ratio_at(x_t).detach() ** 2 * chance
        return score_identity_loss(x, fake, teacher, 1.5, weight, normalize=False)

    def expanded(mean: float) -> float:
        ratio = log_ratio(TEACHER, student(mean), POINTS, ALPHA, SIGMA).exp()
        return float((density(mean) * ratio**2 * gap_of_scores(mean).square()).sum()) / 2

    assert abs(gradient_of(loss) / slope(expanded) - 1) > 0.05


@pytest.mark.parametrize("huber", [0.1, 10.0])
def test_sim_is_its_distances_gradient(huber: float) -> None:
    def distance(mean: float) -> float:
        gap = gap_of_scores(mean) * float(SIGMA**2 / ALPHA)
        return float((density(MEAN) * (gap.square() + huber**2).sqrt()).sum()) * float((ALPHA / SIGMA**2) ** 2)

    def loss(x: Tensor, fake: Tensor, teacher: Tensor, _: Tensor, chance: Tensor) -> Tensor:
        root = chance.reshape(-1, 1)  # the loss is linear in (F_S - x), and each point is a picture of its own
        return score_implicit_loss(fake - root * (fake - x), fake, teacher, huber, normalize=False)

    assert gradient_of(loss) == pytest.approx(slope(distance), rel=2e-3)


def test_a_picture_is_normalized_by_its_distance_to_the_teachers() -> None:
    x = torch.tensor([[1.0, 3.0], [1.0, 3.0]], requires_grad=True)
    teacher, fake = torch.zeros(2, 2), torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    # alpha 1: gap (F_S - x) is -1 (1 - 1) and -1 (1 - 3), over mean|x - 0| = 2; then -2 (2 - 1) and -2 (2 - 3).
    loss = score_identity_loss(x, fake, teacher, alpha=1.0)
    assert float(loss.detach()) == pytest.approx((0 + 2 - 2 + 2) / 2 / 4)
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.allclose(gradient, torch.tensor([[1.0, 1.0], [2.0, 2.0]]) / 2 / 4), "the norm has no gradient"
    weighed = score_identity_loss(x, fake, teacher, 1.0, torch.tensor([0.0, 3.0]))
    assert float(weighed.detach()) == pytest.approx(3 * (-2 + 2) / 2 / 4)


def test_with_the_scores_held_fixed_it_is_distribution_matching() -> None:
    generator = torch.Generator().manual_seed(0)
    x, fake, teacher = (torch.randn(5, 3, generator=generator) for _ in range(3))
    x.requires_grad_(True)
    (ours,) = torch.autograd.grad(score_identity_loss(x, fake, teacher, alpha=1.2), x)
    theirs = distribution_matching_gradient(x, fake, teacher)
    assert torch.allclose(ours * x.numel(), theirs, atol=1e-6)
