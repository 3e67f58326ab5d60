"""Derivatives along a trajectory, without a graph: forward-mode, or by finite differences where a network has none."""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from distillers.losses.distribution_matching import per_picture

Differentiation = Literal["jvp", "finite_difference"]
Function = Callable[[Tensor, Tensor], Tensor]
"""Of a state ``(B, ...)`` and times ``(B,)``, row by row."""


class ContiguousNorms(TorchFunctionMode):
    """Gives group normalisation its input row by row: torch's derivative of it takes no channels-last tensors."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.group_norm:  # a copy, since the derivative's layout may differ from the value's
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def jvp_along(function: Function, x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """``d/dt function(x(t), t)`` where ``dx/dt = velocity``, exactly: about the cost of two evaluations.

    Attention runs unfused inside, because its fused kernels have no forward-mode derivative.

    Args:
        function: of a state and times.
        x: ``(B, ...)``.
        t: ``(B,)``.
        velocity: ``(B, ...)``.

    Raises:
        RuntimeError: the function has an operation without a forward-mode derivative.
    """
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), ContiguousNorms():
            # torch loads its derivatives of some operations when it first needs one, by a way it deprecates itself
            warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", DeprecationWarning)
            derivative: Tensor = torch.func.jvp(function, (x, t), (velocity, torch.ones_like(t)))[1]
            return derivative
    except RuntimeError as error:
        if not isinstance(error, NotImplementedError) and "autograd.Function" not in str(error):
            raise
        raise RuntimeError(
            "the student's network has an operation without a forward-mode derivative; set tangent to "
            f"'finite_difference', which needs none ({str(error).splitlines()[0]})"
        ) from error


@torch.no_grad()
def difference_along(
    function: Function, x: Tensor, t: Tensor, velocity: Tensor, step: float = 1e-3, last: float = float("inf")
) -> Tensor:
    """The same by a central difference, two evaluations in full precision, whose rounding it would magnify.

    Args:
        function: of a state and times.
        x: ``(B, ...)``, float32 at least.
        t: ``(B,)``, above 0 and at most ``last``.
        velocity: ``(B, ...)``.
        step: how far to go either way, as a part of t.
        last: the largest time; the difference is one-sided there.
    """
    before, after = t * (1 - step), (t * (1 + step)).clamp(max=last)

    def at(time: Tensor) -> Tensor:
        return function((x + per_picture((time - t).to(x.dtype), x) * velocity).to(x.dtype), time)

    with torch.autocast(x.device.type, enabled=False):
        difference = at(after) - at(before)
        return difference / per_picture((after - before).to(difference.dtype), difference)
