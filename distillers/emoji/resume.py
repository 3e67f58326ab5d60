"""A training run's state on disk, for the two networks that the bundled teacher is made of."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from distillers.checkpoint import (
    load_checkpoint,
    pack_module,
    pack_optimizer,
    save_checkpoint,
    unpack_module,
    unpack_optimizer,
)


def save_run(
    path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, step: int, seconds: float
) -> None:
    """Writes modules, optimizer moments, the step, and the seconds trained so far."""
    moments, hyper = pack_optimizer(optimizer, "optimizer")
    tensors = dict(moments)
    for name, module in modules.items():
        tensors |= pack_module(module, name)
    save_checkpoint(path, tensors, {"step": step, "seconds": seconds, "optimizer": hyper})


def load_run(
    path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> tuple[int, float] | None:
    """Puts back what `save_run` wrote; the step and the seconds, or None where there is no such file.

    Raises:
        ValueError: the file cannot be read, or is of other modules.
    """
    if not path.exists():
        return None
    tensors, state = load_checkpoint(path)
    for name, module in modules.items():
        unpack_module(module, name, tensors)
    unpack_optimizer(optimizer, "optimizer", tensors, state["optimizer"])
    return state["step"], state["seconds"]
