"""Muon: an optimizer that steps along the orthogonalised momentum of a matrix, and is AdamW for all that is no matrix.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); the step's size is Liu et al. 2025's
(https://arxiv.org/abs/2502.16982, section 2.2), with which Muon takes AdamW's learning rate and weight decay.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distillers.precision import computes_in_bfloat16

SMALLEST = 16
"""A matrix with a side below it (a network's first and last layer) is left to AdamW."""


def as_matrix(weight: Tensor) -> Tensor:
    """A linear layer's weight as it is, a kernel ``(O, I, H, W)`` as ``(O, H * W * I)``: outputs by inputs."""
    return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).flatten(1)


def is_matrix(weight: Tensor) -> bool:
    """Whether Muon steps this weight; AdamW does the others: vectors, and layers of few inputs or outputs."""
    return weight.ndim in (2, 4) and min(weight.shape[0], weight[0].numel()) >= SMALLEST


def orthogonalised(matrix: Tensor, iterations: int = 5) -> Tensor:
    """About ``U V^T`` of ``matrix = U S V^T``: its singular values come out between about 0.7 and 1.2.

    Newton-Schulz iteration with the quintic ``3.4445 x - 4.7750 x^3 + 2.0315 x^5`` (Jordan et al. 2024), which need not
    converge; in bfloat16 where the device computes in it. Singular values far below the largest stay small.
    """
    x = matrix.to(torch.bfloat16 if computes_in_bfloat16(matrix.device) else torch.float32)
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp_min(1e-7)  # no singular value above 1
    for _ in range(iterations):
        square = x @ x.T
        x = 3.4445 * x + torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


class Muon(torch.optim.AdamW):
    """Muon for matrices and kernels, AdamW for the rest, with one learning rate and weight decay for both."""

    def __init__(self, weights: Any, *, momentum: float = 0.95, **settings: Any) -> None:
        """
        Args:
            weights: as in any torch optimizer.
            momentum: of the matrices' gradients, with Nesterov's look ahead.
            settings: AdamW's.
        """
        super().__init__(weights, **settings)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every weight that has a gradient. The matrices' gradients are gone after it."""
        if closure is not None:
            raise ValueError("Muon takes no closure: compute the gradients before the step")
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and is_matrix(weight):
                    self._step_matrix(weight, weight.grad, group["lr"], group["weight_decay"])
                    weight.grad = None  # AdamW passes over it
        return super().step()

    def _step_matrix(self, weight: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0)  # AdamW, when it is loaded, expects one of everybody
            state["momentum"] = torch.zeros_like(weight)
        state["step"] += 1
        momentum = state["momentum"].mul_(self.momentum).add_(gradient)
        direction = orthogonalised(as_matrix(gradient.add(momentum, alpha=self.momentum)))
        size = 0.2 * max(direction.shape) ** 0.5
        if weight.ndim == 4:
            out, into, *kernel = weight.shape
            direction = direction.view(out, *kernel, into).permute(0, 3, 1, 2)
        weight.mul_(1 - lr * weight_decay).add_(direction, alpha=-lr * size)
