r"""f-divergences as weights on one gradient.

For ``D_f(p || q) = E_q[f(p / q)]`` between the teacher's distribution p and the student's q, at one noise level,

    d D_f / d theta = E_q[ h(r) (score_q - score_p) . dx_t / d theta ],    r = p(x_t) / q(x_t),    h(r) = r^2 f''(r)

(Xu et al. 2025, https://arxiv.org/abs/2502.15681, theorem 1): every f-divergence is the reverse KL's gradient, whose h is
1, times a weight. r comes from a discriminator's logits, whose optimum is ``log r``. Large h where r is large (forward KL)
covers the teacher's modes; small h there (reverse KL, Neyman) seeks them. Constant factors are left out.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Divergence = Literal[
    "reverse_kl",
    "softened_reverse_kl",
    "jensen_shannon",
    "squared_hellinger",
    "forward_kl",
    "jeffreys",
    "neyman_chi2",
    "pearson_chi2",
]

DIVERGENCES: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "jensen_shannon": lambda r: r / (1 + r),
    "squared_hellinger": torch.sqrt,
    "forward_kl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
    "neyman_chi2": lambda r: 1 / r,
    "pearson_chi2": torch.square,
}
"""h by the divergence's name."""

LARGEST_LOGIT = 10.0


def divergence_weight(name: Divergence, ratio: Tensor) -> Tensor:
    """``h(r)``, ``(B,)``.

    Args:
        name: one of `DIVERGENCES`.
        ratio: r, positive, ``(B,)``.

    Raises:
        ValueError: no divergence has that name.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"{name!r} is no divergence; there are: {', '.join(DIVERGENCES)}")
    return DIVERGENCES[name](ratio)


def density_ratio(logits: Tensor) -> Tensor:
    """``r = e^logit`` of each picture, ``(B,)`` float32: the mean over heads, held within +-10, without a graph.

    Args:
        logits: ``(B, heads)``, larger meaning real.
    """
    return logits.detach().float().flatten(1).mean(dim=1).clamp(-LARGEST_LOGIT, LARGEST_LOGIT).exp()
