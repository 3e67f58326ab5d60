"""Which of several students draws a prompt: the one whose centroid is nearest in the text encoder's space.

Multi-Student Distillation (Song et al. 2024, https://arxiv.org/abs/2410.23274) gives every student a part of the
conditions; at serving time only the prompt is known, so the part has to follow from the prompt:

    route(x) = argmax_k  x . c_k + o_k            x, c_k of length 1

Without offsets o it is the nearest centroid. Parts of equal size are no nearest-centroid cells: their borders are shifted
by the prices of the balanced assignment (a power diagram; Aurenhammer et al. 1998, https://doi.org/10.1007/PL00009187),
and with these as offsets a prompt of the training data is routed to the very student that was trained on it.
"""

import torch
from torch import Tensor


def route(embeddings: Tensor, centroids: Tensor, offsets: Tensor | None = None) -> Tensor:
    """The part that each prompt belongs to.

    Args:
        embeddings: ``(N, D)``, of length 1 (`TextToImage.embed_prompts`).
        centroids: ``(K, D)``, of length 1.
        offsets: ``(K,)``, added to the cosines; none when left out.

    Returns:
        ``(N,)`` int64 in 0..K-1; the first one of equals.
    """
    # float64, so that a batch's size cannot move a prompt across a border by the order of a sum.
    cosines = embeddings.double() @ centroids.double().T
    return (cosines if offsets is None else cosines + offsets.double()).argmax(1)


def unit_means(points: Tensor, labels: Tensor, parts: int) -> Tensor:
    """The mean of each part's points, of length 1: ``(parts, D)`` in the points' dtype.

    Args:
        points: ``(N, D)``.
        labels: ``(N,)`` in 0..parts-1, each at least once.
    """
    sums = torch.zeros(parts, points.shape[1], dtype=points.dtype).index_add_(0, labels, points)
    return torch.nn.functional.normalize(sums, dim=1)
