r"""Gaussian mixtures under noise: x_0, score and density in closed form, as a reference for tests.

For components ``N(m_k, s_k^2 I)`` with weights pi_k, the noisy ``x_t = alpha x_0 + sigma eps`` is a mixture of
``N(alpha m_k, v_k I)`` with ``v_k = alpha^2 s_k^2 + sigma^2``, and

    r_k(x) = softmax_k(log pi_k + log N(x; alpha m_k, v_k I))
    E[x_0 | x_t = x] = sum_k r_k (m_k + alpha s_k^2 / v_k (x - alpha m_k))
    score(x) = grad log p_t(x) = -sum_k r_k (x - alpha m_k) / v_k = (alpha E[x_0 | x] - x) / sigma^2

(Tweedie's formula; Efron 2011, https://doi.org/10.1198/jasa.2011.tm11181). A label selects its own components; label -1
selects all of them and is the unconditional model. Everything is computed in float64.
"""

import math

import torch
from torch import Tensor

UNCONDITIONAL = -1
_TINY = 1e-30


class Mixture:
    """A mixture of isotropic Gaussians in D dimensions, in which each component belongs to one label.

    Args:
        weights: ``(K,)``, positive; normalised here.
        means: ``(K, D)``.
        stds: ``(K,)``, at least 0 (0 is a point mass).
        labels: ``(K,)`` integers 0..L-1, with at least one component per label; all 0 by default.

    Raises:
        ValueError: the shapes or values are not as above.
    """

    def __init__(self, weights: Tensor, means: Tensor, stds: Tensor, labels: Tensor | None = None) -> None:
        labels = torch.zeros(len(weights), dtype=torch.long) if labels is None else labels
        if means.ndim != 2 or not len(weights) == len(means) == len(stds) == len(labels) > 0:
            shapes = ", ".join(str(tuple(part.shape)) for part in (weights, means, stds, labels))
            raise ValueError(f"weights, means, stds, labels have shapes {shapes}: want (K,), (K, D), (K,), (K,)")
        if bool((weights <= 0).any()) or bool((stds < 0).any()):
            raise ValueError(f"weights {weights.tolist()} must be positive and stds {stds.tolist()} at least 0")
        if sorted(set(labels.tolist())) != list(range(int(labels.max()) + 1)):
            raise ValueError(f"labels {labels.tolist()} must be 0..L-1 with every label used")
        self.weights, self.means, self.stds = weights.double() / weights.sum(), means.double(), stds.double()
        self.labels, self.dim, self.num_labels = labels.long(), means.shape[1], int(labels.max()) + 1
        member = torch.nn.functional.one_hot(self.labels, self.num_labels).T.bool()
        member = torch.cat([member, torch.ones_like(member[:1])])  # the last row, indexed by label -1, selects all
        table = self.weights.log().masked_fill(~member, -math.inf)
        self._log_weights = table - table.logsumexp(1, keepdim=True)

    def log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        """``log p_t(x | label)``, ``(B,)``.

        Args:
            x: ``(B, D, ...)`` with D values per row.
            alpha: ``(B,)`` or a scalar.
            sigma: as alpha.
            label: ``(B,)`` integers; -1, like no label at all, gives the unconditional density.

        Returns:
            float64 if x is, else float32.
        """
        _, _, joint = self._joint(x, alpha, sigma, label)
        return _like(joint.logsumexp(1), x)

    def x0(self, x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        """``E[x_0 | x_t = x, label]``, shaped like x; arguments as in `log_density`."""
        difference, variance, joint = self._joint(x, alpha, sigma, label)
        gain = _column(alpha, x) * self.stds.to(x.device) ** 2 / variance
        posterior = self.means.to(x.device) + gain.unsqueeze(-1) * difference
        return _like((joint.softmax(1).unsqueeze(-1) * posterior).sum(1).reshape(x.shape), x)

    def score(self, x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        """``grad_x log p_t(x | label)``, shaped like x; arguments as in `log_density`."""
        difference, variance, joint = self._joint(x, alpha, sigma, label)
        pull = -(joint.softmax(1) / variance).unsqueeze(-1) * difference
        return _like(pull.sum(1).reshape(x.shape), x)

    def sample(self, label: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Clean points ``(B, D, 1, 1)`` float32, one per label (-1 is unconditional), from a CPU ``generator``."""
        component = torch.multinomial(self._log_weights[label.cpu()].exp(), 1, generator=generator).squeeze(1)
        noise = torch.randn(len(label), self.dim, generator=generator, dtype=torch.float64)
        points = self.means[component] + self.stds[component].unsqueeze(1) * noise
        return points.float().reshape(-1, self.dim, 1, 1).to(label.device)

    def _joint(self, x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``x - alpha m_k`` (B, K, D), v_k (B, K) and ``log pi_k + log N(x; alpha m_k, v_k I)`` (B, K), in float64."""
        a, s = _column(alpha, x), _column(sigma, x)
        label = torch.full((len(x),), UNCONDITIONAL, device=x.device) if label is None else label
        difference = x.double().reshape(len(x), 1, self.dim) - a.unsqueeze(-1) * self.means.to(x.device)
        # A point mass without noise has no density; a tiny variance makes E[x_0 | x] the nearest point.
        variance = ((a * self.stds.to(x.device)) ** 2 + s**2).clamp(min=_TINY)
        log_normal = -0.5 * (difference.square().sum(-1) / variance + self.dim * (2 * math.pi * variance).log())
        return difference, variance, self._log_weights.to(x.device)[label] + log_normal


def log_ratio(p: Mixture, q: Mixture, x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    """``log p_t(x | label) - log q_t(x | label)``, ``(B,)``: the logit of the optimal discriminator between p and q."""
    return p.log_density(x, alpha, sigma, label) - q.log_density(x, alpha, sigma, label)


def _column(coefficient: Tensor, x: Tensor) -> Tensor:
    """The coefficient as ``(B, 1)`` or ``(1, 1)``, float64."""
    return coefficient.to(x.device).double().reshape(-1, 1)


def _like(value: Tensor, given: Tensor) -> Tensor:
    return value if given.dtype == torch.float64 else value.float()
