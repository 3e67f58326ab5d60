"""What modules are made of: their memory, shared or not, and what tells one architecture from another."""

import hashlib
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn


def storages(modules: Iterable[nn.Module]) -> dict[int, int]:
    """Bytes of the memory behind all parameters and buffers, by its address: what two modules share is in both's."""
    found: dict[int, int] = {}
    for module in modules:
        for tensor in chain(module.parameters(), module.buffers()):
            storage = tensor.untyped_storage()
            if storage.data_ptr():  # none where nothing was ever stored: the meta device, an empty tensor
                found[storage.data_ptr()] = storage.nbytes()
    return found


def architecture(module: nn.Module) -> str:
    """The same for modules that take the same time: of one class, with parameters of the same names, shapes and types."""
    lines = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in module.named_parameters()]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return f"{type(module).__name__} {digest[:16]}"


def stored_numbers(files: Iterable[Path]) -> int:
    """How many numbers these safetensors files hold, from their headers alone."""
    count = 0
    for path in files:
        with safe_open(path, framework="numpy") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - no mapping
        count += sum(torch.Size(shape).numel() for shape in shapes)
    return count
