"""Checkpoints: one safetensors file each, written atomically, no pickle inside.

Tensors (weights, optimizer moments, random states) are the file's tensors; everything else (step, data position, the
optimizer's hyper-parameters) is JSON in its header. A checkpoint is written beside its target, flushed to the disk and
renamed, so that a process killed at any moment leaves the old checkpoint or the new one, never half of one.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_HEADER = "state"


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes ``tensors`` and the JSON-able ``state`` to ``path``, atomically and durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Clones: safetensors refuses tensors that share memory, as tied weights and views do.
        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        try:
            save_file(plain, temporary, metadata={_HEADER: json.dumps(state)})
        except SafetensorError as error:  # its own class, also where the disk is full
            raise OSError(f"{path} cannot be written ({error}); an older one is as it was") from error
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state that `save_checkpoint` wrote.

    Raises:
        ValueError: the file is not a checkpoint of ours (truncated, or written by something else).
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:  # safetensors raises its own SafetensorError, which is no public class
        raise ValueError(
            f"{path} is not a readable checkpoint ({error}); delete it to resume from an older one"
        ) from error
    if _HEADER not in header:
        raise ValueError(f"{path} holds tensors but no training state: it is a weights file, not a checkpoint")
    return tensors, json.loads(header[_HEADER])


def pack_optimizer(optimizer: torch.optim.Optimizer, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's moments as named tensors, and its hyper-parameters as JSON-able state."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for index, moments in state["state"].items():
        for key, value in moments.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}.{index}.{key}"] = value
            else:
                plain[f"{index}.{key}"] = value
    # Numbers that lie on the device, as a captured step's learning rate does, are numbers here.
    groups = [
        {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    return tensors, {"param_groups": groups, "plain": plain}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Puts back what `pack_optimizer` took."""
    moments: dict[int, dict[str, Any]] = {}
    start = f"{prefix}."
    for name, tensor in tensors.items():
        if name.startswith(start):
            index, key = name.removeprefix(start).split(".", 1)
            moments.setdefault(int(index), {})[key] = tensor
    for name, value in state["plain"].items():
        index, key = name.split(".", 1)
        moments.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
    for weight, restored in optimizer.state.items():
        for key, value in restored.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                # In the weight's own memory format (channels_last): fused optimizers go through both in memory order.
                restored[key] = torch.empty_like(weight, dtype=value.dtype, requires_grad=False).copy_(value)


def pack_module(module: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    """A module's state with every name behind ``prefix``."""
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def unpack_module(module: torch.nn.Module, prefix: str, tensors: dict[str, Tensor]) -> None:
    """Puts back what `pack_module` took; a missing or unknown name is an error."""
    start = f"{prefix}."
    module.load_state_dict({n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)})
