"""Muon: steps matrices along their orthogonalised momentum, and everything else with AdamW.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/). The step size is that of Liu et al. 2025
(https://arxiv.org/abs/2502.16982, section 2.2), so that Muon takes AdamW's learning rate and weight decay.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from distillers.precision import computes_in_bfloat16

SMALLEST = 16
"""A matrix with a smaller side (a network's first and last layers) is left to AdamW."""


def as_matrix(weight: Tensor) -> Tensor:
    """A linear layer's weight unchanged, a kernel ``(O, I, H, W)`` as ``(O, H * W * I)``: outputs by inputs."""
    return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).flatten(1)


def is_matrix(weight: Tensor) -> bool:
    """Whether Muon updates this weight. AdamW updates the rest: vectors, and layers with few inputs or outputs."""
    return weight.ndim in (2, 4) and min(weight.shape[0], weight[0].numel()) >= SMALLEST


def orthogonalised(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Approximately ``U V^T`` of each ``M = U S V^T``: the resulting singular values lie between about 0.7 and 1.2.

    Newton-Schulz iteration with the quintic ``3.4445 x - 4.7750 x^3 + 2.0315 x^5`` (Jordan et al. 2024), which need not
    converge; in bfloat16 if the device supports it. Singular values far below the largest stay small.

    Args:
        matrices: one, ``(R, C)``, or several, ``(N, R, C)``.
        iterations: of the quintic.
    """
    x = matrices.to(torch.bfloat16 if computes_in_bfloat16(matrices.device) else torch.float32)
    x = x if x.ndim == 3 else x.unsqueeze(0)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)  # bounds all singular values by 1
    for _ in range(iterations):
        square = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315) @ x
    return (x.mT if tall else x).to(matrices.dtype).reshape(matrices.shape)


class Muon(torch.optim.AdamW):
    """Muon for matrices and kernels, AdamW for the rest, with a common learning rate and weight decay."""

    def __init__(self, weights: Any, *, momentum: float = 0.95, **settings: Any) -> None:
        """
        Args:
            weights: as in any torch optimizer.
            momentum: of the matrices' gradients (Nesterov).
            settings: AdamW's.
        """
        super().__init__(weights, **settings)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every weight that has a gradient, and clears the gradients of matrices."""
        if closure is not None:
            raise ValueError("Muon does not support a closure: compute the gradients before the step")
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None and is_matrix(weight):
                    alike.setdefault(weight.shape, []).append(weight)
            for weights in alike.values():
                self._step_matrices(weights, group["lr"], group["weight_decay"])
                for weight in weights:
                    weight.grad = None  # so that AdamW skips it
        return super().step()

    def _step_matrices(self, weights: list[Tensor], lr: float | Tensor, weight_decay: float) -> None:
        """Updates all weights of one shape at once, since launching a kernel for each would dominate on a GPU."""
        gradients = [cast(Tensor, weight.grad) for weight in weights]
        momenta = [self._momentum(weight) for weight in weights]
        torch._foreach_mul_(momenta, self.momentum)
        torch._foreach_add_(momenta, gradients)
        ahead = torch._foreach_add(gradients, momenta, alpha=self.momentum)
        directions = orthogonalised(torch.stack([as_matrix(each) for each in ahead]))
        directions *= lr * 0.2 * max(directions.shape[1:]) ** 0.5
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_sub_(weights, [_as_weight(each, weights[0].shape) for each in directions.unbind()])

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            # On loading, AdamW expects a step count for every weight; a capturable one is on the device.
            state["step"] = torch.tensor(0.0, device=weight.device if self.defaults["capturable"] else None)
            state["momentum"] = torch.zeros_like(weight)
        state["step"] += 1
        return cast(Tensor, state["momentum"])


def _as_weight(matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `as_matrix`."""
    if len(shape) == 2:
        return matrix
    out, into, *kernel = shape
    return matrix.view(out, *kernel, into).permute(0, 3, 1, 2)
