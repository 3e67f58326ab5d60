"""The state of a training run on disk, for the networks that make up the bundled teacher."""

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
    """Writes modules, optimizer moments, the step, and the training time so far in seconds."""
    moments, hyper = pack_optimizer(optimizer, "optimizer")
    tensors = dict(moments)
    for name, module in modules.items():
        tensors |= pack_module(module, name)
    save_checkpoint(path, tensors, {"step": step, "seconds": seconds, "optimizer": hyper})


def load_run(
    path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> tuple[int, float] | None:
    """Restores what `save_run` wrote; returns the step and the seconds, or None if there is no such file.

    Raises:
        ValueError: the file cannot be read, or belongs to other modules.
    """
    if not path.exists():
        return None
    tensors, state = load_checkpoint(path)
    for name, module in modules.items():
        unpack_module(module, name, tensors)
    unpack_optimizer(optimizer, "optimizer", tensors, state["optimizer"])
    return state["step"], state["seconds"]
