"""Checkpoints: each is one safetensors file, written atomically and without pickle.

Weights, optimizer moments and a method's state are the file's tensors; everything else (iteration, update counts,
optimizer hyper-parameters) is JSON in its header. A checkpoint is written beside its target, flushed to disk and
renamed, so that a process killed at any moment, or a power failure, leaves either the old checkpoint or the new one.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weights.files import replacing

_HEADER = "state"


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a job's folder, oldest first."""
    return sorted((folder / "checkpoints").glob("iteration-*.safetensors"))


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes ``tensors`` and the JSON-serialisable ``state`` to ``path``, atomically and durably."""
    with replacing(path) as temporary:
        # Clones, since safetensors rejects tensors that share memory, such as tied weights and views.
        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        try:
            save_file(plain, temporary, metadata={_HEADER: json.dumps(state)})
        except SafetensorError as error:  # raised for a full disk, too
            raise OSError(f"{path} cannot be written ({error}); older checkpoints are intact") from error


def load_checkpoint(path: Path, *, with_tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and the state written by `save_checkpoint`.

    Args:
        path: the file.
        with_tensors: whether to read the tensors; without them, this takes no time.

    Raises:
        ValueError: the file is not one of our checkpoints (truncated, or written by something else).
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            names = file.keys() if with_tensors else []
            tensors = {name: file.get_tensor(name) for name in names}
    except Exception as error:  # safetensors raises its own SafetensorError, which is not a public class
        raise ValueError(
            f"{path} is not a readable checkpoint ({error}); delete it to resume from an older one"
        ) from error
    if _HEADER not in header:
        raise ValueError(f"{path} holds tensors but no training state: it is a weights file, not a checkpoint")
    return tensors, json.loads(header[_HEADER])


def pack_optimizer(optimizer: torch.optim.Optimizer, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's moments as named tensors, and its hyper-parameters as JSON-serialisable state."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for index, moments in state["state"].items():
        for key, value in moments.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}.{index}.{key}"] = value
            else:
                plain[f"{index}.{key}"] = value
    # Values on the device, such as the learning rate of a captured step, are stored as numbers.
    groups = [
        {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    return tensors, {"param_groups": groups, "plain": plain}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Restores what `pack_optimizer` returned."""
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
                # Keep the weight's memory format (channels_last): fused optimizers iterate over both in memory order.
                restored[key] = torch.empty_like(weight, dtype=value.dtype, requires_grad=False).copy_(value)


def pack_module(module: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    """A module's state, with ``prefix`` before every name."""
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def unpack_module(module: torch.nn.Module, prefix: str, tensors: dict[str, Tensor]) -> None:
    """Restores what `pack_module` returned; missing or unknown names are an error."""
    start = f"{prefix}."
    module.load_state_dict({n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)})
