"""Checks the engine's settings against this machine: existing models, a device, a precision."""

import os
from typing import Any, cast

import torch

from service.settings import BadSettings, Settings
from weights.families import AUTO, families, family_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def families_of_bases(settings: Settings) -> dict[str, str]:
    """The family of each base that the settings name, after checking that the base exists.

    Raises:
        BadSettings: the family or a base does not exist, or the family, or none, loads the base.
    """
    known = [AUTO, *families()]
    if settings.family not in known:
        raise BadSettings(f"FEWSTEP_FAMILY: no family is named {settings.family!r}; available: {', '.join(known)}")
    return {name: _family(settings.family, name) for name in settings.bases}


def _family(asked: str, base: str) -> str:
    """The family of a base: the one asked for, if it takes the base, or the pipeline's own."""
    try:
        if asked == AUTO:
            return family_of(base)
        families()[asked].check_source(base)
    except (FileNotFoundError, ValueError) as error:
        raise BadSettings(f"FEWSTEP_BASES: {error}") from None
    return asked


def device_of(settings: Settings) -> torch.device:
    """The device to use.

    Raises:
        BadSettings: this machine has no such device.
    """
    wanted = settings.device
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count()
        raise BadSettings(f"FEWSTEP_DEVICE: {wanted} was requested, but torch finds {count} CUDA GPU(s)")
    return device


def dtype_of(settings: Settings, device: torch.device) -> torch.dtype:
    """The precision of the weights, which on a CPU is never float16.

    Raises:
        BadSettings: float16 was requested for the CPU.
    """
    if settings.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if settings.dtype == "float16" and device.type == "cpu":
        raise BadSettings("FEWSTEP_DTYPE: float16 needs a GPU; use float32 or bfloat16 on the CPU")
    return DTYPES[settings.dtype]


def set_up(device: torch.device) -> None:
    """Configure torch before anything is computed on this device."""
    if device.type == "cuda":
        # Without this, cuBLAS is not deterministic even when asked to be.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # By default cuDNN rounds float32 to ten mantissa bits; float32 should give the same images as on a CPU.
        cast(Any, torch.backends.cudnn).conv.fp32_precision = "ieee"
