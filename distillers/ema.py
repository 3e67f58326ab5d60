"""Exponential moving average of a network's trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """``average <- d average + (1 - d) weights``, kept in float32.

    d is ``min(decay, (1 + n) / (10 + n))`` at update n, as in TensorFlow's ExponentialMovingAverage, so that the
    initial weights do not dominate the average of a short job.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """
        Args:
            module: only its parameters that require gradients are averaged.
            decay: in [0, 1); 0 keeps the newest weights.
        """
        self.decay = decay
        self.updates = 0
        self._weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.values = {name: weight.detach().float().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Updates the average with the current weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        weights = [weight.detach().float() for weight in self._weights.values()]
        torch._foreach_lerp_(list(self.values.values()), weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the module holds the average; its own weights are restored afterwards."""
        own = {name: weight.data for name, weight in self._weights.items()}
        try:
            for name, weight in self._weights.items():
                weight.data = self.values[name].to(weight.dtype)
            yield
        finally:
            for name, weight in self._weights.items():
                weight.data = own[name]

    def load(self, values: dict[str, Tensor], updates: int) -> None:
        """Restores a saved average.

        Raises:
            ValueError: it belongs to another module.
        """
        if values.keys() != self.values.keys():
            raise ValueError(
                f"the saved average has different weights: {sorted(values.keys() ^ self.values.keys())[:5]}"
            )
        for name, value in values.items():
            self.values[name].copy_(value)
        self.updates = updates
