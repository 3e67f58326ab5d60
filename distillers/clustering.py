"""Balanced k-means on the sphere: clusters of equal size, with an exact assignment in every round.

Points and centroids are unit vectors. The objective is the sum of ``x_i . c_label(i)``, with cluster sizes that differ
by at most one. As in Lloyd's algorithm, each of the two steps is optimal in its own variables, so that the sum never
falls:

    assign    labels of given sizes with the largest sum: a transportation problem, solved exactly (`balanced_labels`)
    average   each centroid becomes the mean of its members, scaled to unit length

The assignment is a minimum-cost flow on a graph of K nodes, where moving a point from cluster a to b costs
``min_{i in a} (s_ia - s_ib)``. It starts from the best labels under given prices, whatever their sizes; these are
optimal for their own sizes. It then moves one point at a time along the cheapest path from a cluster that is too large
to one that is too small (successive shortest paths), which preserves optimality. Distances in the final graph are
prices of the assignment: each label is ``argmax_k s_ik + price_k``, which lets a router reproduce it.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from weights.router import unit_means

MAX_ROUNDS = 100
PRICE_ROUNDS = 50
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """The result of `balanced_kmeans`."""

    labels: Tensor
    """``(N,)`` int64 in 0..K-1."""
    centroids: Tensor
    """``(K, D)`` float64 unit vectors."""
    prices: Tensor
    """``(K,)`` float64, mean 0: each label is ``argmax_k x . c_k + price_k``."""


def part_sizes(count: int, parts: int) -> Tensor:
    """Splits ``count`` into ``parts`` sizes that differ by at most one, larger ones first: ``(parts,)`` int64."""
    return torch.tensor([count // parts + (part < count % parts) for part in range(parts)])


def balanced_labels(scores: Tensor, prices: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The labels with sizes `part_sizes` that maximise the sum of scores.

    Args:
        scores: ``(N, K)`` float64, N at least K.
        prices: initial prices ``(K,)``; good ones (of a similar problem) save work, but any are valid.

    Returns:
        Labels ``(N,)`` int64, and prices ``(K,)`` with ``labels = argmax_k scores_ik + price_k`` (up to ties).
    """
    count, parts = scores.shape
    sizes = part_sizes(count, parts)
    labels = (scores + _near_prices(scores, sizes, prices)).argmax(1)
    surplus = torch.bincount(labels, minlength=parts) - sizes
    costs = torch.full((parts, parts), torch.inf, dtype=scores.dtype)
    movers = torch.zeros(parts, parts, dtype=torch.int64)
    changed = set(range(parts))
    while True:
        for part in changed:
            _moves(part, scores, labels, costs, movers)
        if not bool(surplus.any()):
            break
        path = _cheapest_path(costs, surplus > 0, surplus < 0)
        points = [int(movers[a, b]) for a, b in pairwise(path)]
        labels[points] = torch.tensor(path[1:])
        surplus[path[0]] -= 1
        surplus[path[-1]] += 1
        changed = set(path)
    return labels, _prices(costs)


def _near_prices(scores: Tensor, sizes: Tensor, prices: Tensor | None) -> Tensor:
    """Prices whose best labels have almost the given sizes: decreasing steps against each part's excess."""
    found = torch.zeros(len(sizes), dtype=scores.dtype) if prices is None else prices
    step = float(scores.std(correction=0))
    for _ in range(PRICE_ROUNDS):
        excess = torch.bincount((scores + found).argmax(1), minlength=len(sizes)) / sizes.clamp_min(1) - 1
        found = found - step * excess
        step *= 0.9
    return found


def _prices(costs: Tensor) -> Tensor:
    """Prices that reproduce an optimal assignment, ``(K,)``, mean 0.

    The distances from any single node are such prices, but extreme ones: points on their shortest paths are ties. The
    mean over all nodes lies in the interior. (Distances by the Floyd-Warshall algorithm.)
    """
    distances = costs.clone().fill_diagonal_(0)
    for middle in range(len(costs)):
        distances = torch.minimum(distances, distances[:, middle, None] + distances[middle])
    prices = distances.mean(0)
    return prices - prices.mean()


def _moves(part: int, scores: Tensor, labels: Tensor, costs: Tensor, movers: Tensor) -> None:
    """Updates the cost of moving the part's cheapest point to each other part, and which point that is."""
    members = (labels == part).nonzero()[:, 0]
    costs[part] = torch.inf
    if len(members):
        own = scores[members]
        costs[part], cheapest = (own[:, part, None] - own).min(0)
        movers[part] = members[cheapest]
    costs[part, part] = torch.inf


def _distances(costs: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
    """Bellman-Ford: each node's distance from the nearest source ``(K,)``, and its predecessor (-1 at sources)."""
    parts = len(costs)
    distances = torch.full((parts,), torch.inf, dtype=costs.dtype).masked_fill(sources, 0.0)
    before = torch.full((parts,), -1)
    for _ in range(parts):
        ways, via = (distances[:, None] + costs).min(0)
        better = ways < distances - _ROUNDING
        if not bool(better.any()):
            break
        distances, before = torch.where(better, ways, distances), torch.where(better, via, before)
    return distances, before


def _cheapest_path(costs: Tensor, sources: Tensor, targets: Tensor) -> list[int]:
    """The nodes on the path from a source to the target that is cheapest to reach."""
    distances, before = _distances(costs, sources)
    path = [int(distances.masked_fill(~targets, torch.inf).argmin())]
    while before[path[0]] >= 0:
        path.insert(0, int(before[path[0]]))
    return path


def balanced_kmeans(points: Tensor, parts: int, generator: torch.Generator) -> Clusters:
    """Clusters points into parts whose sizes differ by at most one.

    Args:
        points: unit vectors ``(N, D)``; at least as many as parts.
        parts: K.
        generator: draws the initial centroids.

    Raises:
        ValueError: there are fewer points than parts.
    """
    if len(points) < parts:
        raise ValueError(f"{len(points)} points cannot be split into {parts} parts: use at most {len(points)}")
    points = points.double()
    centroids = _first_centroids(points, parts, generator)
    labels, prices = balanced_labels(points @ centroids.T)
    for _ in range(MAX_ROUNDS):
        centroids = unit_means(points, labels, parts)
        before = labels
        labels, prices = balanced_labels(points @ centroids.T, prices)
        if torch.equal(labels, before):
            break
    else:
        centroids = unit_means(points, labels, parts)
    return Clusters(labels=labels, centroids=centroids, prices=prices)


def _first_centroids(points: Tensor, parts: int, generator: torch.Generator) -> Tensor:
    """k-means++: each centroid is a point drawn in proportion to its squared distance from the nearest one so far."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    while len(chosen) < parts:
        gaps = (1 - (points @ points[chosen].T).amax(1)).clamp_min(0)
        gaps[chosen] = 0
        if not bool(gaps.sum() > 0):  # only duplicates of the chosen points are left
            gaps = torch.ones_like(gaps)
            gaps[chosen] = 0
        chosen.append(int(torch.multinomial(gaps, 1, generator=generator)))
    return points[chosen]


def consecutive(sizes: list[int], parts: int) -> list[int]:
    """Divides groups into runs of consecutive groups, as even as possible: minimal sum of squared sizes.

    Args:
        sizes: of the groups, in a meaningful order.
        parts: K, at most the number of groups.

    Returns:
        Each group's part, rising from 0 to parts - 1.

    Raises:
        ValueError: there are fewer groups than parts.
    """
    count = len(sizes)
    if count < parts:
        raise ValueError(f"{count} groups cannot be split into {parts} parts: use at most {count}")
    total = [sum(sizes[:end]) for end in range(count + 1)]
    # best[end]: (sum of squares, start of the last run) for the first `end` groups in the current number of runs.
    best = [(total[end] ** 2, 0) for end in range(count + 1)]
    starts = []
    for runs in range(2, parts + 1):
        best = [
            min((best[start][0] + (total[end] - total[start]) ** 2, start) for start in range(runs - 1, end))
            if end >= runs
            else (0, 0)
            for end in range(count + 1)
        ]
        starts.append([start for _, start in best])
    found, end = [0] * count, count
    for part, run in zip(range(parts - 1, 0, -1), reversed(starts), strict=True):
        found[run[end] : end] = [part] * (end - run[end])
        end = run[end]
    return found
