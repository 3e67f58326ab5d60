"""Number formats for training: bfloat16 if the processor supports it natively, float32 otherwise."""

import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

Precision = Literal["auto", "float32", "bfloat16"]


def device_name(text: str) -> str:
    """The device of a command-line option.

    Raises:
        ArgumentTypeError: it cannot compute in float64, or this machine has no such device.
    """
    kind, _, index = text.partition(":")
    if kind == "mps":
        raise ArgumentTypeError(
            f"{text!r} is an Apple GPU, which cannot compute in float64, as the conversions between noise and image do: "
            "use 'cpu', 'cuda' or 'cuda:N'"
        )
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", text):
        raise ArgumentTypeError(f"{text!r} is no device: use 'cpu', 'cuda' or 'cuda:N'")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= count:
        raise ArgumentTypeError(
            f"{text!r} was requested, but torch finds {count} CUDA GPU(s): use one of these, or 'cpu'"
        )
    return text


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively; otherwise it is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def resolve_precision(asked: Precision, device: torch.device) -> str:
    """Resolves "auto" for this device: "bfloat16" or "float32". Other values are returned unchanged."""
    if asked != "auto":
        return asked
    return "bfloat16" if computes_in_bfloat16(device) else "float32"


class Float32Kernels(TorchFunctionMode):
    """Runs attention and group normalisation in float32 when their inputs are bfloat16, and returns bfloat16.

    torch's CPU kernels for these are slower in bfloat16 than in float32, attention's backward pass many times (torch
    2.13 on Zen 4), which cost most of what the other layers gain. Accuracy can only improve.
    """

    SLOW = (F.scaled_dot_product_attention, F.group_norm)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self.SLOW or not _is_bfloat16(args[0] if args else next(iter(kwargs.values()))):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*map(_widen, args), **{key: _widen(value) for key, value in kwargs.items()}).bfloat16()


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16


def _widen(value: Any) -> Any:
    return value.float() if _is_bfloat16(value) else value


def fast_kernels(device: torch.device) -> AbstractContextManager[Any]:
    """Context in which bfloat16 training avoids kernels that are slow in it on this device; float32 is unaffected."""
    return Float32Kernels() if device.type == "cpu" else nullcontext()


def checkpointed(module: Callable[..., Any], *inputs: Any) -> Any:
    """Activation checkpointing (https://arxiv.org/abs/1604.06174) whose two forward passes run the same kernels.

    The second pass runs inside ``backward``, where modes such as `Float32Kernels` are not active.
    """
    device = next(each.device for each in inputs if isinstance(each, torch.Tensor))
    return checkpoint(
        module, *inputs, use_reentrant=False, context_fn=lambda: (fast_kernels(device), fast_kernels(device))
    )


@contextmanager
def training_format(device: torch.device) -> Iterator[None]:
    """Context in which networks run in this device's "auto" format, without the kernels that are slow in it."""
    bfloat16 = resolve_precision("auto", device) == "bfloat16"
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16), fast_kernels(device):
        yield
