"""Distances against closed form, brute force, and what they must do to pictures' features."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import Tensor

from distillers.evaluation import metrics
from distillers.evaluation.bars import Bar
from distillers.evaluation.metrics import Estimate


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(rows: Tensor, mean: Tensor, root: Tensor) -> Tensor:
    """Rows moved to exactly this sample mean and the sample covariance ``root root^T``."""
    centred = rows - rows.mean(0)
    whitened = centred @ torch.linalg.inv(torch.linalg.cholesky(centred.T @ centred / (len(rows) - 1))).T
    return whitened @ root.T + mean


def test_the_frechet_distance_of_commuting_gaussians_is_its_closed_form() -> None:
    first, second = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 2.0, 1.0]).double()
    shift = torch.tensor([1.0, -2.0, 0.0]).double()
    x = with_moments(normal(64, 3), torch.zeros(3).double(), first.diag())
    y = with_moments(normal(80, 3, seed=1), shift, second.diag())
    expected = float(shift.square().sum() + (first - second).square().sum())  # |mu|^2 + sum (s_x - s_y)^2
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_the_frechet_distance_is_the_matrix_square_root_form() -> None:
    x, y = normal(40, 5) @ normal(5, 5, seed=2), normal(50, 5, seed=1) @ normal(5, 5, seed=3) + 1
    cov_x, cov_y = torch.cov(x.T).numpy(), torch.cov(y.T).numpy()
    root = sqrtm(cov_x @ cov_y).real
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + (cov_x + cov_y - 2 * root).trace()
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)


def test_a_set_is_at_no_frechet_distance_from_itself_also_with_fewer_pictures_than_dimensions() -> None:
    x = normal(10, 64)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(x, x + 2) == pytest.approx(4 * 64, rel=1e-9)


def brute_kernel_distance(x: Tensor, y: Tensor) -> float:
    def k(a: Tensor, b: Tensor) -> float:
        return float(a @ b / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


@settings(max_examples=15)
@given(n=st.integers(4, 12), m=st.integers(4, 12), dimensions=st.integers(1, 5), seed=st.integers(0, 999))
def test_the_kernel_distance_is_its_sum_over_pairs(n: int, m: int, dimensions: int, seed: int) -> None:
    x, y = normal(n, dimensions, seed=seed), normal(m, dimensions, seed=seed + 1) + 0.5
    assert metrics.kernel_distance(x, y).value == pytest.approx(brute_kernel_distance(x, y), rel=1e-9, abs=1e-9)


def test_leaving_a_group_out_is_the_distance_of_the_others() -> None:
    x, y = normal(12, 3), normal(8, 3, seed=1)
    estimate = metrics.kernel_distance(x, y, groups=4)
    expected = [brute_kernel_distance(torch.cat([x[:3], x[6:]]), torch.cat([y[:2], y[4:]]))]
    assert estimate.leave_one_out[1:2] == pytest.approx(expected, rel=1e-9)


def test_pictures_of_one_caption_are_not_taken_for_independent() -> None:
    """A model that draws as the real pictures are; captions differ more than a caption's pictures do."""

    def drawn(seed: int, captions: Tensor) -> Tensor:
        return (captions[:, None] + 0.5 * normal(24, 2, 3, seed=seed)).flatten(0, 1)

    found: list[list[float]] = []
    for seed in range(0, 1500, 5):
        captions, others = normal(24, 3, seed=seed), normal(24, 3, seed=seed + 1)
        x, teacher, real = drawn(seed + 2, captions), drawn(seed + 3, captions), drawn(seed + 4, others)[::2]
        estimates = [
            metrics.kernel_distance(x, real, seeds=2),
            metrics.kernel_distance(x, teacher, seeds=2, same_captions=True),
            metrics.kernel_distance(x, real),
            metrics.kernel_distance(x, teacher),
        ]
        found.append([estimate.value for estimate in estimates])
    means, errors = torch.tensor(found).mean(0), torch.tensor(found).std(0) / math.sqrt(len(found))
    assert (means[:2].abs() < 3 * errors[:2]).all()
    assert means[2] > 5 * errors[2] and means[3] < -5 * errors[3]  # what it is for


def test_leaving_a_captions_pairs_out_is_a_sum_over_the_others() -> None:
    x, y = normal(8, 3, seed=1), normal(8, 3, seed=2)
    kernel = [[float(((a @ b) / 3 + 1) ** 3) for b in (*x, *y)] for a in (*x, *y)]
    pairs = [(i, j) for i in range(8) for j in range(8) if i // 2 != j // 2]

    def over(rows: int, columns: int) -> float:
        return sum(kernel[rows + i][columns + j] for i, j in pairs) / len(pairs)

    expected = over(0, 0) + over(8, 8) - 2 * over(0, 8)
    assert metrics.kernel_distance(x, y, seeds=2, same_captions=True).value == pytest.approx(expected, rel=1e-9)


def test_the_kernel_distance_is_unbiased_and_its_interval_covers_the_closed_form() -> None:
    # In one dimension E[(xy + 1)^3] = 1 + 3 m1 m1' + 3 m2 m2' + m3 m3' in the raw moments.
    def moments(mean: float, std: float) -> tuple[float, float, float]:
        return mean, mean**2 + std**2, mean**3 + 3 * mean * std**2

    def expected_kernel(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
        return 1 + 3 * a[0] * b[0] + 3 * a[1] * b[1] + a[2] * b[2]

    p, q = moments(0.0, 1.0), moments(0.4, 0.8)
    truth = expected_kernel(p, p) + expected_kernel(q, q) - 2 * expected_kernel(p, q)
    estimates = [
        metrics.kernel_distance(normal(100, 1, seed=2 * s), 0.4 + 0.8 * normal(100, 1, seed=2 * s + 1))
        for s in range(200)
    ]
    values = torch.tensor([e.value for e in estimates], dtype=torch.float64)
    assert float(values.mean()) == pytest.approx(truth, abs=4 * float(values.std()) / math.sqrt(200))
    assert sum(e.low <= truth <= e.high for e in estimates) / 200 > 0.85
    # The jackknife's own error is the spread that repeating the whole experiment shows.
    assert torch.tensor([e.error for e in estimates]).mean().item() == pytest.approx(float(values.std()), rel=0.25)


def test_a_figure_that_hangs_on_one_group_has_no_interval_and_passes_no_bar() -> None:
    single = metrics.mean(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    found = metrics.ratio(single, single)
    assert found.summary() == {"value": 1.0, "low": None, "high": None}
    bar = Bar("m", "ratio", found, 0.95, at_most=False)
    assert not bar.passed
    json.loads(json.dumps(bar.as_json(), allow_nan=False))


def test_a_ratio_on_the_same_groups_is_surer_than_its_parts() -> None:
    shared = normal(64, 1)[:, 0] + 10
    above, below = metrics.mean(2 * shared), metrics.mean(shared)
    paired = metrics.ratio(above, below)
    assert paired.value == pytest.approx(2)
    assert paired.error < 1e-6 < above.error
    with pytest.raises(ValueError, match="same groups"):
        metrics.ratio(above, Estimate(1.0, (1.0, 1.0)))


def test_the_mean_has_the_textbook_error() -> None:
    values = normal(32, 1)[:, 0]
    assert metrics.mean(values).error == pytest.approx(float(values.std()) / math.sqrt(32), rel=1e-9)
    assert metrics.mean(torch.ones(1)).error == 0


def test_precision_and_recall_tell_bad_pictures_from_missing_ones() -> None:
    left, right = normal(40, 2), normal(40, 2, seed=1) + 100
    real = torch.cat([left, right])
    precision, recall = metrics.precision_recall(real, normal(60, 2, seed=2))  # only one of two modes, but well
    assert precision > 0.8
    assert 0.35 < recall <= 0.5
    precision, recall = metrics.precision_recall(real, torch.cat([real, normal(80, 2, seed=3) - 500]))
    assert precision == pytest.approx(0.5, abs=0.02)  # half is nowhere near
    assert recall == 1


def test_precision_and_recall_swap_with_their_arguments() -> None:
    x, y = normal(30, 4), 1.5 * normal(40, 4, seed=1)
    assert metrics.precision_recall(x, y) == metrics.precision_recall(y, x)[::-1]


def test_pairwise_diversity_is_the_mean_distance_of_a_prompts_pictures() -> None:
    sets = torch.tensor([[[0.0, 0.0], [3.0, 4.0]], [[1.0, 0.0], [1.0, 0.0]]])
    assert metrics.pairwise_diversity(sets).value == pytest.approx(2.5)  # (5 + 0) / 2
    with pytest.raises(ValueError, match="at least 2 seeds"):
        metrics.pairwise_diversity(torch.zeros(3, 1, 2))


def test_the_vendi_score_counts_different_pictures() -> None:
    assert metrics.vendi_score(torch.ones(5, 3)) == pytest.approx(1)
    assert metrics.vendi_score(torch.eye(6)) == pytest.approx(6)
    assert metrics.vendi_score(torch.eye(3).repeat_interleave(4, dim=0) * 7) == pytest.approx(3)  # length is nothing
    # Two unit vectors at cosine c: eigenvalues (1 +- c) / 2.
    c = 0.6
    entropy = -sum(p * math.log(p) for p in ((1 + c) / 2, (1 - c) / 2))
    vectors = torch.tensor([[1.0, 0.0], [c, math.sqrt(1 - c * c)]])
    assert metrics.vendi_score(vectors) == pytest.approx(math.exp(entropy), rel=1e-6)
    assert metrics.vendi_over_prompts(torch.stack([torch.eye(4), torch.ones(4, 4)])).value == pytest.approx(2.5)


def test_psnr_is_minus_ten_times_the_logarithm_of_the_error() -> None:
    target = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert metrics.psnr(target + 0.1, target).tolist() == pytest.approx([20.0] * 3, rel=1e-4)
    assert metrics.psnr(target, target).tolist() == [100.0] * 3


@pytest.mark.parametrize("distance", [metrics.frechet_distance, metrics.kernel_distance, metrics.precision_recall])
def test_features_that_cannot_be_compared_are_refused(distance: object) -> None:
    assert callable(distance)
    with pytest.raises(ValueError, match=r"5 and 6 dimensions"):
        distance(torch.zeros(8, 5), torch.zeros(8, 6))
    with pytest.raises(ValueError, match="at least"):
        distance(torch.zeros(1, 5), torch.zeros(8, 5))
