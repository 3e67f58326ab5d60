"""Prompt alignment: can an image's caption be identified from the image?

A closed-form ridge regression maps image features to the text encoder's pooled space. It is fitted once, on real
training images and their captions, and never on generated or held-out images. An image counts as correct if, among its
own caption and 99 others, its own is nearest to the regression's prediction (R-precision: Xu et al. 2018, arXiv
1711.10485, section 4.1). The score of held-out real images under the same regression serves as the reference.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

PENALTIES = tuple(10.0**power for power in range(-1, 6))


@dataclass(frozen=True)
class Regression:
    """``text = (features - feature_mean) / feature_scale @ weight + text_mean``."""

    feature_mean: Tensor
    feature_scale: Tensor
    weight: Tensor
    text_mean: Tensor
    penalty: float

    def __call__(self, features: Tensor) -> Tensor:
        """Predicts points in the text space, minus its mean: ``(N, D)`` to ``(N, E)``, float64."""
        return (features.double() - self.feature_mean) / self.feature_scale @ self.weight


def fit(features: Tensor, texts: Tensor, penalties: tuple[float, ...] = PENALTIES) -> Regression:
    """Ridge regression with the penalty that minimises the leave-one-out error.

    The leave-one-out residual of row i is ``r_i / (1 - h_ii)`` with H the hat matrix (Golub, Heath & Wahba 1979), so
    one eigendecomposition serves every penalty.

    Args:
        features: ``(N, D)``, image features of real images.
        texts: ``(N, E)``, embeddings of their captions.
        penalties: added to the diagonal of ``X^T X``, where X are standardised features.
    """
    if len(features) != len(texts) or len(features) < 3:
        raise ValueError(
            f"give one text for each of at least 3 images, got {len(features)} images and {len(texts)} texts"
        )
    features, texts = features.double(), texts.double()
    feature_mean, feature_scale = features.mean(0), features.std(0).clamp_min(1e-6)
    x = (features - feature_mean) / feature_scale
    y = texts - texts.mean(0)
    eigenvalues, vectors = torch.linalg.eigh(x.T @ x)
    rotated, moments = x @ vectors, vectors.T @ (x.T @ y)
    best, least = penalties[0], float("inf")
    for penalty in penalties:
        inverse = 1 / (eigenvalues.clamp_min(0) + penalty)
        leverage = (rotated.square() @ inverse + 1 / len(x)).clamp_max(1 - 1e-9)  # 1 / N is the leverage of the mean
        residual = (y - rotated @ (inverse[:, None] * moments)) / (1 - leverage)[:, None]
        error = float(residual.square().mean())
        if error < least:
            best, least = penalty, error
    weight = vectors @ (moments / (eigenvalues.clamp_min(0) + best)[:, None])
    return Regression(feature_mean, feature_scale, weight, texts.mean(0), best)


def r_precision(predicted: Tensor, texts: Tensor, own: Tensor, choices: int) -> Tensor:
    """Probability that an image's own caption is the nearest (by cosine) of ``choices``, ``(N,)`` in [0, 1].

    This is the exact expectation over random draws of the other ``choices - 1`` captions: if w of the M - 1 others are
    nearer than the image's own, it is ``C(M - 1 - w, k) / C(M - 1, k)`` with k = choices - 1.

    Args:
        predicted: ``(N, E)``, images in the text space, minus its mean.
        texts: ``(M, E)``, all captions to choose from, minus the same mean; M >= choices.
        own: ``(N,)``, the row of each image's own caption.
    """
    others = len(texts) - 1
    if others < choices - 1:
        raise ValueError(f"cannot choose among {choices} captions: there are only {len(texts)}")
    cosine = normalize(predicted.double(), dim=1) @ normalize(texts.double(), dim=1).T
    worse = (cosine > cosine.gather(1, own[:, None])).sum(1).double()
    drawn = choices - 1
    chance = torch.lgamma(others - worse + 1) - torch.lgamma((others - worse - drawn + 1).clamp_min(1))
    full = torch.lgamma(torch.tensor(others + 1.0).double()) - torch.lgamma(torch.tensor(others - drawn + 1.0).double())
    return torch.where(others - worse >= drawn, (chance - full).exp(), torch.zeros_like(worse))
