"""Model families: one file each, discovered automatically."""

import importlib
import inspect
import pkgutil
from functools import cache
from pathlib import Path

import torch

from weights.bundled import pipeline_class_name, resolve_base
from weights.families.base import TextToImage

__all__ = ["AUTO", "TextToImage", "families", "family_of", "load", "taker_of"]

AUTO = "auto"
"""Stands for the family that loads the pipeline's class; see `family_of`."""


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


def taker_of(pipeline: str) -> str | None:
    """The family that loads diffusers pipelines of this class name; None if there is none."""
    return next((name for name, each in families().items() if each.pipeline_name() == pipeline), None)


def family_of(source: str | Path) -> str:
    """The family of a diffusers pipeline: a bundled base's name, a folder, or a hub id, which is downloaded.

    Raises:
        FileNotFoundError: there is no such pipeline.
        ValueError: no family loads its class, or its index cannot be read.
    """
    pipeline = pipeline_class_name(resolve_base(source))
    family = taker_of(pipeline)
    if family is None:
        known = sorted(name for each in families().values() if (name := each.pipeline_name()) is not None)
        raise ValueError(f"{source} holds a {pipeline}, which no family loads; those that can be: {', '.join(known)}")
    return family


def load(
    family: str, source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextToImage:
    """Load the model ``source`` of a family: a bundled base's name, a folder, or a hub id.

    With ``auto``, the family is `family_of` the source.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: no family has that name, the family cannot load this model, or the weights are not those that its card
            states.
    """
    known = families()
    name = family_of(source) if family == AUTO else family
    if name not in known:
        raise ValueError(f"no family is named {name!r}; available: {', '.join([AUTO, *sorted(known)])}")
    return known[name].load(source, device, dtype)
