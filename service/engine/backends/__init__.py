"""Backends, which run a model's parts. The engine knows only their interface, in base.py."""

import importlib
import importlib.util

import torch

from service.engine.backends.base import Backend, doubling
from service.engine.backends.torch_backend import Attention, TorchBackend
from service.settings import BadSettings, Settings
from weights.families import families

__all__ = ["Backend", "make_backend"]


def make_backend(settings: Settings, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that the settings ask for, or the fastest one available on this machine.

    Args:
        settings: settings of the server.
        device: where models are loaded.
        dtype: precision of their weights.

    Raises:
        BadSettings: what the settings ask for is not available; the message says what is.
    """
    hindrance = _no_openvino(settings, device)
    if settings.backend == "openvino" and hindrance is not None:
        raise BadSettings(f"FEWSTEP_BACKEND: openvino {hindrance}; use torch, or auto, which picks the fastest")
    _check_gpu_settings(settings, device)
    if settings.backend == "torch" or hindrance is not None:
        return TorchBackend(
            device=device,
            max_batch=settings.max_batch,
            attention=_attention(settings, device),
            compiled=settings.compile,
            threads=settings.threads,
        )
    from service.engine.backends.cache import Cache
    from service.engine.backends.openvino_backend import OpenVinoBackend

    return OpenVinoBackend(
        batches=doubling(settings.max_batch),
        cache=Cache(settings.cache / "openvino", settings.cache_bytes),
        precision="auto" if settings.dtype == "auto" else "f32" if dtype == torch.float32 else "bf16",
        threads=settings.threads,
    )


def _no_openvino(settings: Settings, device: torch.device) -> str | None:
    """Why OpenVINO cannot be used here; None if it can."""
    if device.type != "cpu":
        return f"runs only on the CPU, but FEWSTEP_DEVICE is {device}"
    family = families().get(settings.family)
    if family is not None and not family.part_names:
        return f"can run no part of models of family {settings.family!r}"
    try:
        silent = importlib.import_module("service.engine.backends.silent_openvino")
        silent.openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")
    except (ImportError, OSError, RuntimeError) as error:  # not installed, or not for this system or processor
        return f"cannot be used here ({error}): pip install openvino"
    return None


def _check_gpu_settings(settings: Settings, device: torch.device) -> None:
    if settings.compile and device.type != "cuda":
        raise BadSettings(f"FEWSTEP_COMPILE: it needs an NVIDIA GPU, but FEWSTEP_DEVICE is {device}; leave it off")
    if settings.attention == "xformers" and device.type != "cuda":
        raise BadSettings(f"FEWSTEP_ATTENTION: xformers needs an NVIDIA GPU, but FEWSTEP_DEVICE is {device}; use sdpa")
    if settings.attention == "xformers" and importlib.util.find_spec("xformers") is None:
        raise BadSettings("FEWSTEP_ATTENTION: xformers is not installed: pip install 'fewstep[gpu]', or use sdpa")


def _attention(settings: Settings, device: torch.device) -> Attention:
    if settings.attention != "auto":
        return settings.attention
    return "xformers" if device.type == "cuda" and importlib.util.find_spec("xformers") is not None else "sdpa"
