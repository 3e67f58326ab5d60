"""Properties of modules: the memory they occupy, shared or not, and a key for their architecture."""

import hashlib
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn


def storages(modules: Iterable[nn.Module]) -> dict[int, int]:
    """Bytes of the storages behind all parameters and buffers, by address; a shared storage counts once."""
    found: dict[int, int] = {}
    for module in modules:
        for tensor in chain(module.parameters(), module.buffers()):
            storage = tensor.untyped_storage()
            if storage.data_ptr():  # 0 on the meta device and for empty tensors
                found[storage.data_ptr()] = storage.nbytes()
    return found


def architecture(module: nn.Module) -> str:
    """A key shared by modules of equal cost: same class, and parameters of the same names, shapes and dtypes."""
    lines = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in module.named_parameters()]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return f"{type(module).__name__} {digest[:16]}"


def stored_numbers(files: Iterable[Path]) -> int:
    """Number of elements in these safetensors files, read from their headers alone."""
    count = 0
    for path in files:
        with safe_open(path, framework="numpy") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (not a mapping)
        count += sum(torch.Size(shape).numel() for shape in shapes)
    return count
