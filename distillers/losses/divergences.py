r"""f-divergences as weights on one gradient.

For ``D_f(p || q) = E_q[f(p / q)]`` between the teacher's distribution p and the student's q, at one noise level,

    d D_f / d theta = E_q[ h(r) (score_q - score_p) . dx_t / d theta ],    r = p(x_t) / q(x_t),    h(r) = r^2 f''(r)

(Xu et al. 2025, https://arxiv.org/abs/2502.15681, theorem 1): every f-divergence is the reverse KL's gradient, whose h is
1, times a weight. r comes from a discriminator's logits, whose optimum is ``log r``. Large h where r is large (forward KL)
covers the teacher's modes; small h there (reverse KL, Neyman) seeks them. Constant factors are left out.

The usual divergences' weights are all of one form, ``h(r) = r^a (1 + r)^b``: a divergence is a name, or its (a, b).
"""

from typing import Literal, get_args

import torch
from torch import Tensor

DivergenceName = Literal[
    "reverse_kl",
    "softened_reverse_kl",
    "jensen_shannon",
    "squared_hellinger",
    "forward_kl",
    "jeffreys",
    "neyman_chi2",
    "pearson_chi2",
]
Divergence = DivergenceName | tuple[float, float]

DIVERGENCES: dict[DivergenceName, tuple[float, float]] = {
    "reverse_kl": (0.0, 0.0),
    "softened_reverse_kl": (0.0, -1.0),
    "jensen_shannon": (1.0, -1.0),
    "squared_hellinger": (0.5, 0.0),
    "forward_kl": (1.0, 0.0),
    "jeffreys": (0.0, 1.0),
    "neyman_chi2": (-1.0, 0.0),
    "pearson_chi2": (2.0, 0.0),
}
"""(a, b) by the divergence's name."""

LARGEST_LOGIT = 10.0


def powers(divergence: Divergence) -> tuple[float, float]:
    """(a, b) of ``h(r) = r^a (1 + r)^b``.

    Raises:
        ValueError: no divergence has that name.
    """
    if isinstance(divergence, tuple):
        return divergence
    if divergence not in DIVERGENCES:
        raise ValueError(
            f"{divergence!r} is no divergence: use one of {', '.join(get_args(DivergenceName))}, or (a, b)"
        )
    return DIVERGENCES[divergence]


def divergence_weight(divergence: Divergence, ratio: Tensor) -> Tensor:
    """``h(r)``, ``(B,)``.

    Args:
        divergence: a name of `DIVERGENCES`, or (a, b).
        ratio: r, positive, ``(B,)``.
    """
    a, b = powers(divergence)
    return ratio**a * (1 + ratio) ** b


def weight_elasticity(divergence: Divergence, ratio: Tensor) -> Tensor:
    """``r h'(r) / h(r) = a + b r / (1 + r)``, ``(B,)``; arguments as in `divergence_weight`."""
    a, b = powers(divergence)
    return a + b * ratio / (1 + ratio)


def density_ratio(logits: Tensor) -> Tensor:
    """``r = e^logit`` of each picture, ``(B,)`` float32: the mean over heads, held within +-10.

    Args:
        logits: ``(B, heads)``, larger meaning real.
    """
    return torch.exp(logits.float().flatten(1).mean(dim=1).clamp(-LARGEST_LOGIT, LARGEST_LOGIT))
