"""Balanced k-means: equal sizes, exact assignments, and prices that repeat them."""

from itertools import pairwise, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distillers.clustering import balanced_kmeans, balanced_labels, consecutive, part_sizes
from weights.router import route, unit_means


def points(count: int, dim: int = 8, seed: int = 0) -> Tensor:
    """Unit vectors around three directions of uneven popularity, as prompts lie."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(3, dim, generator=generator)[
        torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), count, replacement=True, generator=generator)
    ]
    noisy = centre + 0.7 * torch.randn(count, dim, generator=generator)
    return torch.nn.functional.normalize(noisy, dim=1).double()


def total(scores: Tensor, labels: Tensor) -> float:
    return float(scores.gather(1, labels[:, None]).sum())


@settings(max_examples=40)
@given(st.integers(9, 60), st.integers(1, 9), st.integers(0, 1000))
def test_sizes_differ_by_at_most_one(count: int, parts: int, seed: int) -> None:
    scores = torch.randn(count, parts, generator=torch.Generator().manual_seed(seed)).double()
    labels, prices = balanced_labels(scores)
    assert torch.equal(torch.bincount(labels, minlength=parts), part_sizes(count, parts))
    assert int(part_sizes(count, parts).sum()) == count
    assert int(part_sizes(count, parts).max() - part_sizes(count, parts).min()) <= 1
    assert torch.isfinite(prices).all()


@pytest.mark.parametrize("seed", range(8))
def test_the_assignment_is_the_best_of_all(seed: int) -> None:
    """Seven points in three parts: every one of the 210 assignments of these sizes is tried."""
    scores = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed)).double()
    labels, _ = balanced_labels(scores)
    best = max(total(scores, torch.tensor(each)) for each in set(permutations([0, 0, 0, 1, 1, 2, 2])))
    assert total(scores, labels) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("start", [None, torch.tensor([3.0, -2.0, 0.0, 0.5, 0.0])])
def test_the_prices_repeat_the_assignment(start: Tensor | None) -> None:
    scores = points(400) @ points(5, seed=9).T
    labels, prices = balanced_labels(scores, start)
    assert torch.equal((scores + prices).argmax(1), labels)
    assert float((scores.argmax(1) == labels).double().mean()) < 0.9, "without them it is another"
    assert float(prices.mean()) == pytest.approx(0, abs=1e-12)


def test_copies_of_a_point_are_shared_out() -> None:
    same = torch.tensor([[1.0, 0.0]]).double().repeat(7, 1)
    found = balanced_kmeans(same, 3, torch.Generator().manual_seed(0))
    assert sorted(torch.bincount(found.labels).tolist()) == [2, 2, 3]


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_clusters_are_a_fixed_point_and_better_than_chance(parts: int) -> None:
    data = points(500)
    found = balanced_kmeans(data, parts, torch.Generator().manual_seed(1))
    assert torch.equal(torch.bincount(found.labels), part_sizes(500, parts))
    torch.testing.assert_close(found.centroids, unit_means(data, found.labels, parts))
    again, _ = balanced_labels(data @ found.centroids.T, found.prices)
    assert torch.equal(again, found.labels)
    assert torch.equal(route(data, found.centroids, found.prices), found.labels)
    chance = torch.arange(500) % parts
    within = total(data @ found.centroids.T, found.labels)
    assert within > 1.1 * total(data @ unit_means(data, chance, parts).T, chance)


def test_a_seed_gives_the_same_clusters_and_another_may_not() -> None:
    data = points(300)
    first, same, other = (balanced_kmeans(data, 4, torch.Generator().manual_seed(seed)) for seed in (0, 0, 5))
    assert torch.equal(first.labels, same.labels) and torch.equal(first.centroids, same.centroids)
    assert not torch.equal(first.labels, other.labels)


def test_clear_groups_of_equal_size_are_found() -> None:
    truth = torch.arange(40) % 4
    data = torch.nn.functional.normalize(torch.eye(4)[truth] + 0.1 * points(40, 4).float(), dim=1)
    found = balanced_kmeans(data, 4, torch.Generator().manual_seed(0))
    assert all(len(set(found.labels[truth == group].tolist())) == 1 for group in range(4))


def test_more_parts_than_points_are_refused() -> None:
    with pytest.raises(ValueError, match="3 points cannot be split into 4 parts"):
        balanced_kmeans(points(3), 4, torch.Generator())


@settings(max_examples=60)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.integers(1, 7))
def test_runs_of_neighbours_are_as_even_as_can_be(sizes: list[int], parts: int) -> None:
    if parts > len(sizes):
        with pytest.raises(ValueError, match="groups cannot be"):
            consecutive(sizes, parts)
        return
    found = consecutive(sizes, parts)
    assert found[0] == 0 and found[-1] == parts - 1
    assert all(b - a in (0, 1) for a, b in pairwise(found))

    def squares(labels: list[int]) -> int:
        return sum(
            sum(s for s, label in zip(sizes, labels, strict=True) if label == part) ** 2 for part in range(parts)
        )

    def every(prefix: list[int]) -> list[list[int]]:
        if len(prefix) == len(sizes):
            return [prefix] if prefix[-1] == parts - 1 else []
        return [found for step in (0, 1) if prefix[-1] + step < parts for found in every([*prefix, prefix[-1] + step])]

    assert squares(found) == min(squares(labels) for labels in every([0]))
