"""Routing of prompts to one of several students: the centroid nearest in the text encoder's space decides.

Multi-Student Distillation (Song et al. 2024, https://arxiv.org/abs/2410.23274) trains each student on a part of the
conditions. Only the prompt is known when serving, so the part must follow from it:

    route(x) = argmax_k  x . c_k + o_k            x, c_k of length 1

Without the offsets o, this picks the nearest centroid. Parts of equal size are not nearest-centroid cells, though:
their borders are shifted by the prices of the balanced assignment (a power diagram; Aurenhammer et al. 1998,
https://doi.org/10.1007/PL00009187). With these prices as offsets, a training prompt is routed to the student that was
trained on it.
"""

import torch
from torch import Tensor


def route(embeddings: Tensor, centroids: Tensor, offsets: Tensor | None = None) -> Tensor:
    """The part that each prompt belongs to.

    Args:
        embeddings: ``(N, D)``, of length 1 (`TextToImage.embed_prompts`).
        centroids: ``(K, D)``, of length 1.
        offsets: ``(K,)``, added to the cosines; optional.

    Returns:
        ``(N,)`` int64 in 0..K-1; ties go to the lowest index.
    """
    # float64, so that the order of summation, which depends on the batch size, does not move prompts across borders.
    cosines = embeddings.double() @ centroids.double().T
    return (cosines if offsets is None else cosines + offsets.double()).argmax(1)


def unit_means(points: Tensor, labels: Tensor, parts: int) -> Tensor:
    """The mean of each part's points, normalised to length 1: ``(parts, D)`` in the points' dtype.

    Args:
        points: ``(N, D)``.
        labels: ``(N,)`` in 0..parts-1, each at least once.
    """
    sums = torch.zeros(parts, points.shape[1], dtype=points.dtype).index_add_(0, labels, points)
    return torch.nn.functional.normalize(sums, dim=1)
