"""The regression against its closed form, and R-precision against drawing captions at random."""

import math

import pytest
import torch
from torch import Tensor

from distillers.evaluation import alignment


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_linear_relation_is_found() -> None:
    features, weight = normal(200, 6) * torch.tensor([1, 5, 0.1, 1, 2, 1]) + 3, normal(6, 4, seed=1)
    texts = features @ weight + 2
    regression = alignment.fit(features, texts, penalties=(1e-8,))
    fresh = normal(10, 6, seed=2)
    assert torch.allclose(regression(fresh) + regression.text_mean, fresh @ weight + 2, atol=1e-6)


def test_the_penalty_is_the_one_with_least_error_when_each_row_is_left_out() -> None:
    features, penalties = normal(24, 8), (0.1, 1.0, 10.0, 100.0)
    texts = features @ normal(8, 3, seed=1) * 0.3 + normal(24, 3, seed=2)
    mean, scale = features.mean(0), features.std(0)
    x = (features - mean) / scale

    def left_out(penalty: float) -> float:
        errors = []
        for row in range(len(x)):
            keep = torch.arange(len(x)) != row
            design = torch.cat([x[keep], torch.ones(len(x) - 1, 1).double()], dim=1)
            ridge = torch.diag(torch.tensor([penalty] * 8 + [0.0]).double())  # the mean is not penalised
            solution = torch.linalg.solve(design.T @ design + ridge, design.T @ texts[keep])
            errors.append((texts[row] - torch.cat([x[row], torch.ones(1).double()]) @ solution).square().mean())
        return float(torch.stack(errors).mean())

    assert alignment.fit(features, texts, penalties).penalty == min(penalties, key=left_out)


def test_r_precision_is_the_mean_over_random_choices() -> None:
    predicted, texts, own = normal(5, 3), normal(12, 3, seed=1), torch.arange(5)
    exact = alignment.r_precision(predicted, texts, own, choices=4)
    cosine = torch.nn.functional.normalize(predicted, dim=1) @ torch.nn.functional.normalize(texts, dim=1).T
    for row in range(5):
        worse = int((cosine[row] > cosine[row, own[row]]).sum())
        assert float(exact[row]) == pytest.approx(math.comb(11 - worse, 3) / math.comb(11, 3))


def test_r_precision_at_its_ends() -> None:
    texts = torch.eye(8).double()
    assert alignment.r_precision(texts, texts, torch.arange(8), choices=8).tolist() == pytest.approx([1.0] * 8)
    assert alignment.r_precision(-texts, texts, torch.arange(8), choices=8).tolist() == [0.0] * 8
    guesses = alignment.r_precision(normal(4000, 8), texts, torch.randint(8, (4000,)), choices=4)
    assert float(guesses.mean()) == pytest.approx(1 / 4, abs=0.03)  # knowing nothing is one in four


def test_too_few_captions_or_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="among 9 captions: there are only 8"):
        alignment.r_precision(torch.eye(8), torch.eye(8), torch.arange(8), choices=9)
    with pytest.raises(ValueError, match="got 4 images and 5 texts"):
        alignment.fit(normal(4, 2), normal(5, 2))
