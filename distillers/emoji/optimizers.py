"""The teacher's optimizers: Muon for what is a matrix, AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) steps along the orthogonalised momentum of a matrix;
scaled as in Liu et al. 2025 (https://arxiv.org/abs/2502.16982), it takes AdamW's learning rate. A convolution's kernel is a
matrix of its outputs by everything that goes into one.
"""

from typing import Any

import torch
from torch import Tensor, nn

from distillers.checkpoint import pack_optimizer, unpack_optimizer

SMALLEST = 16
"""A matrix with a side below it (the network's first and last layer) is left to AdamW."""


def as_matrix(weight: Tensor) -> Tensor:
    """A linear weight as it is; a channels-last kernel ``(O, I, H, W)`` as ``(O, H * W * I)``, sharing its memory."""
    return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).flatten(1)


class Optimizers:
    """Both optimizers of one network, whose kernels must be in the channels-last format.

    Raises:
        ValueError: a kernel is in another memory format, so that a step would not reach it.
    """

    def __init__(self, network: nn.Module, weight_decay: float = 0.01) -> None:
        self.matrices: list[tuple[nn.Parameter, nn.Parameter]] = []
        rest = []
        for name, weight in network.named_parameters():
            if weight.ndim not in (2, 4) or min(as_matrix(weight).shape) < SMALLEST:
                rest.append(weight)
                continue
            matrix = as_matrix(weight.data)
            if matrix.data_ptr() != weight.data_ptr():
                raise ValueError(
                    f"{name}: the kernel is not channels-last; use network.to(memory_format=torch.channels_last)"
                )
            self.matrices.append((nn.Parameter(matrix), weight))
        settings: dict[str, Any] = {"lr": 0.0, "weight_decay": weight_decay}
        matrices = [matrix for matrix, _ in self.matrices]
        self.both: dict[str, torch.optim.Optimizer] = {
            "muon": torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings),
            "adamw": torch.optim.AdamW(rest, betas=(0.9, 0.99), **settings),
        }

    def step(self, rate: float) -> None:
        """One step at a learning rate, along the gradients that the network's weights hold."""
        for matrix, weight in self.matrices:
            matrix.grad = None if weight.grad is None else as_matrix(weight.grad)
        for optimizer in self.both.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The moments as named tensors, and the rest as JSON-able state."""
        tensors: dict[str, Tensor] = {}
        state: dict[str, Any] = {}
        for name, optimizer in self.both.items():
            moments, state[name] = pack_optimizer(optimizer, name)
            tensors |= moments
        return tensors, state

    def unpack(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Puts back what `pack` took."""
        for name, optimizer in self.both.items():
            unpack_optimizer(optimizer, name, tensors, state[name])
