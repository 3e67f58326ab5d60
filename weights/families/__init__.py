"""Model families: one file each, discovered automatically."""

import importlib
import inspect
import pkgutil
from functools import cache
from pathlib import Path

import torch

from weights.families.base import TextToImage

__all__ = ["TextToImage", "families", "load"]


@cache
def families() -> dict[str, type[TextToImage]]:
    """Every family in this folder, by name.

    Raises:
        RuntimeError: two families have the same name.
    """
    found: dict[str, type[TextToImage]] = {}
    for module_info in pkgutil.iter_modules(__path__):
        if module_info.name == "base":
            continue
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for _, member in inspect.getmembers(module, inspect.isclass):
            if member.__module__ != module.__name__ or not issubclass(member, TextToImage):
                continue
            if member.family in found:
                raise RuntimeError(f"two families are named {member.family!r}: {found[member.family]} and {member}")
            found[member.family] = member
    return found


def load(
    family: str, source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextToImage:
    """Load the model ``source`` of a family: a bundled base's name, a folder, or a hub id.

    Raises:
        ValueError: no family has that name.
    """
    known = families()
    if family not in known:
        raise ValueError(f"no family is named {family!r}; available: {', '.join(sorted(known))}")
    return known[family].load(source, device, dtype)
