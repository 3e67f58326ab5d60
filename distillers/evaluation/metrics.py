"""Distances between sets of images, as pure functions of their features.

Features are ``(N, D)`` tensors, one row per image; everything is computed in float64. Figures with a relevant error are
returned as an `Estimate`, which also keeps its leave-one-group-out values. Two models measured on the same prompts and
seeds share most of their noise, so the `ratio` of two estimates is far more precise than either.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = 32
_NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% confidence interval, from the delete-a-group jackknife."""

    value: float
    leave_one_out: tuple[float, ...]
    """The figure computed without each group in turn; empty for a figure without error."""

    @property
    def error(self) -> float:
        """Standard error, ``sqrt((G - 1) / G sum_g (theta_g - mean theta)^2)`` (Efron & Stein 1981, eq. 1.2)."""
        groups = len(self.leave_one_out)
        if groups < 2:
            return 0.0
        values = torch.tensor(self.leave_one_out, dtype=torch.float64)
        return math.sqrt((groups - 1) / groups * float((values - values.mean()).square().sum()))

    @property
    def low(self) -> float:
        return self.value - _NORMAL_95 * self.error

    @property
    def high(self) -> float:
        return self.value + _NORMAL_95 * self.error

    def summary(self) -> dict[str, float | None]:
        """The figure and its interval for JSON, which cannot represent infinity: such values become None."""
        found = {"value": self.value, "low": self.low, "high": self.high}
        return {name: value if math.isfinite(value) else None for name, value in found.items()}


def ratio(numerator: Estimate, denominator: Estimate) -> Estimate:
    """The ratio of two estimates, with the error that remains since both were measured on the same groups.

    Raises:
        ValueError: they have different numbers of groups.
    """
    if len(numerator.leave_one_out) != len(denominator.leave_one_out):
        raise ValueError(
            f"a ratio needs the same groups in numerator and denominator, "
            f"got {len(numerator.leave_one_out)} and {len(denominator.leave_one_out)}"
        )
    pairs = zip(numerator.leave_one_out, denominator.leave_one_out, strict=True)
    return Estimate(_divide(numerator.value, denominator.value), tuple(_divide(a, b) for a, b in pairs))


def mean(values: Tensor, groups: int = GROUPS) -> Estimate:
    """The mean of ``values: (N,)``. Jackknife groups are contiguous runs, so dependent values must be adjacent."""
    values = values.double()
    count = min(groups, len(values))
    members = torch.arange(len(values)) * count // len(values)
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, members, values)
    sizes = torch.bincount(members, minlength=count)
    left = (values.sum() - sums) / (len(values) - sizes).clamp_min(1)
    return Estimate(float(values.mean()), tuple(left.tolist()))


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """``|mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2))`` between Gaussians fitted to two sets.

    Dowson & Landau 1982, eq. 4; as an image metric, Heusel et al. 2017 (arXiv 1706.08500, eq. 6). With centred features
    A and B scaled to ``S_x = A^T A`` and ``S_y = B^T B``, the trace of the square root is the sum of the singular
    values of ``A B^T``. This is exact even for rank-deficient covariances, unlike the matrix square root of their
    product. Biased upwards for small N: compare it with the distance of two real sets of the same size.

    Args:
        x: ``(N, D)``, N >= 2.
        y: ``(M, D)``, M >= 2.
    """
    x, y = _checked(x, y, least=2)
    a = (x - x.mean(0)) / math.sqrt(len(x) - 1)
    b = (y - y.mean(0)) / math.sqrt(len(y) - 1)
    cross = torch.linalg.svdvals(a @ b.T).sum()
    means = (x.mean(0) - y.mean(0)).square().sum()
    return float((means + a.square().sum() + b.square().sum() - 2 * cross).clamp_min(0))


def kernel_distance(
    x: Tensor, y: Tensor, groups: int = GROUPS, *, seeds: int = 1, same_captions: bool = False
) -> Estimate:
    """Squared maximum mean discrepancy under ``k(a, b) = (a.b / D + 1)^3``, unbiased: it can be below 0.

    Binkowski et al. 2018 (arXiv 1801.01401, section 4; the U-statistic is Gretton et al. 2012, eq. 3), on all images
    instead of averaged over random subsets. The estimator assumes independent images, but images of the same caption
    are more alike than others: pairs of these are left out, as is the pair of an image with itself.

    Args:
        x: ``(N, D)``, with a caption's images adjacent.
        y: ``(M, D)``.
        groups: of the jackknife: contiguous runs of captions, at most half as many as there are captions.
        seeds: images per caption in ``x``, S; N is at least 4 S.
        same_captions: whether ``y`` has the same captions, in the same order, with as many seeds; otherwise its images
            are independent.
    """
    x, y = _checked(x, y, least=4 * seeds)
    runs_x, runs_y = (rows.unflatten(0, (-1, of)) for rows, of in ((x, seeds), (y, seeds if same_captions else 1)))
    count = min(groups, len(runs_x) // 2, len(runs_y) // 2)
    of_x, of_y = (torch.arange(len(runs)) * count // len(runs) for runs in (runs_x, runs_y))
    members_x, members_y = (of.repeat_interleave(runs.shape[1]) for of, runs in ((of_x, runs_x), (of_y, runs_y)))
    xx = _block_sums(x, x, members_x, members_x, count)
    yy = _block_sums(y, y, members_y, members_y, count)
    xy = _block_sums(x, y, members_x, members_y, count)
    own_x, own_y = _run_sums(runs_x, runs_x, of_x, count), _run_sums(runs_y, runs_y, of_y, count)
    own_xy = _run_sums(runs_x, runs_y, of_x, count) if same_captions else torch.zeros(count, dtype=torch.float64)
    sizes_x, sizes_y = (torch.bincount(members, minlength=count).double() for members in (members_x, members_y))

    def over(keep: Tensor) -> float:
        n, m = float(keep @ sizes_x), float(keep @ sizes_y)
        within_x = float(keep @ xx @ keep - keep @ own_x) / (n * (n - runs_x.shape[1]))
        within_y = float(keep @ yy @ keep - keep @ own_y) / (m * (m - runs_y.shape[1]))
        across = float(keep @ xy @ keep - keep @ own_xy) / (n * (m - runs_y.shape[1] * same_captions))
        return within_x + within_y - 2 * across

    return _jackknife(over, count)


def _run_sums(x: Tensor, y: Tensor, members: Tensor, groups: int) -> Tensor:
    """Kernel sums between each run of ``x: (P, S, D)`` and its run of ``y: (P, T, D)``, by group: ``(groups,)``."""
    own = _kernel(x @ y.transpose(1, 2), x.shape[-1]).sum(dim=(1, 2))
    return torch.zeros(groups, dtype=torch.float64).index_add_(0, members, own)


def precision_recall(real: Tensor, drawn: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Share of the generated images on the real manifold, and of real images on the generated one; both in [0, 1].

    Kynkaanniemi et al. 2019 (arXiv 1904.06991, eqs. 1-2): a point is on a set's manifold if it is no further
    from some point of the set than that point's ``neighbours``-th nearest other point.

    Args:
        real: ``(N, D)``, N > neighbours.
        drawn: ``(M, D)``, M > neighbours.
    """
    real, drawn = _checked(real, drawn, least=neighbours + 1)
    across = torch.cdist(real, drawn)

    def radii(rows: Tensor) -> Tensor:
        # The point itself is at distance 0, so its k-th nearest other point is the (k + 1)-th smallest.
        return torch.cdist(rows, rows).kthvalue(neighbours + 1, dim=1).values

    precision = (across <= radii(real)[:, None]).any(dim=0)
    recall = (across <= radii(drawn)[None, :]).any(dim=1)
    return float(precision.double().mean()), float(recall.double().mean())


def pairwise_diversity(sets: Tensor) -> Estimate:
    """Mean Euclidean distance between two images of the same prompt, over prompts.

    Args:
        sets: ``(P, S, D)``, S >= 2 images for each of P prompts.
    """
    if sets.ndim != 3 or sets.shape[1] < 2:
        raise ValueError(f"features must be (prompts, at least 2 seeds, dimensions), got {tuple(sets.shape)}")
    seeds = sets.shape[1]
    distances = torch.cdist(sets.double(), sets.double()).sum(dim=(1, 2)) / (seeds * (seeds - 1))
    return mean(distances, groups=len(distances))


def vendi_score(features: Tensor) -> float:
    """The effective number of distinct images, in [1, N].

    Friedman & Dieng 2022 (arXiv 2210.02410, definition 3.1): exponential of the entropy of the eigenvalues of K / N,
    where K contains the cosine similarities of ``features: (N, D)``.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    eigenvalues = torch.linalg.eigvalsh(unit @ unit.T / len(unit)).clamp_min(0)
    return float(torch.special.entr(eigenvalues).sum().exp())


def vendi_over_prompts(sets: Tensor) -> Estimate:
    """The mean Vendi score over prompts, of ``sets: (P, S, D)``; in [1, S]."""
    scores = torch.tensor([vendi_score(features) for features in sets], dtype=torch.float64)
    return mean(scores, groups=len(scores))


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, ``(N,)``; at most 100, for a perfect copy.

    Args:
        output: ``(N, C, H, W)`` in [0, 1].
        target: the same.
    """
    mse = (output.double() - target.double()).square().flatten(1).mean(1)
    return -10 * mse.clamp_min(1e-10).log10()


def _kernel(dot: Tensor, dimensions: int) -> Tensor:
    return (dot / dimensions + 1) ** 3


def _block_sums(x: Tensor, y: Tensor, members_x: Tensor, members_y: Tensor, count: int) -> Tensor:
    """The kernel between all rows, summed over each pair of groups: ``(G, G)``."""
    rows = torch.zeros(count, len(y), dtype=torch.float64).index_add_(0, members_x, _kernel(x @ y.T, x.shape[1]))
    return torch.zeros(count, count, dtype=torch.float64).index_add_(1, members_y, rows)


def _jackknife(over: Callable[[Tensor], float], count: int) -> Estimate:
    keep = torch.ones(count, dtype=torch.float64)
    left = []
    for group in range(count):
        without = keep.clone()
        without[group] = 0
        left.append(over(without))
    return Estimate(over(keep), tuple(left))


def _divide(a: float, b: float) -> float:
    return a / b if b else math.copysign(math.inf, a) if a else math.nan


def _checked(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    for rows in (x, y):
        if rows.ndim != 2 or len(rows) < least:
            raise ValueError(f"features must be (at least {least} images, dimensions), got {tuple(rows.shape)}")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared: use one extractor")
    return x.double(), y.double()
