"""Values and derivatives of a function along a trajectory, without a graph: forward-mode or by finite differences."""

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
"""A function of states ``(B, ...)`` and times ``(B,)``, independent across rows."""


class ContiguousNorms(TorchFunctionMode):
    """Makes the inputs of group normalisation contiguous: its forward-mode derivative rejects channels_last tensors."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.group_norm:  # always a copy, since the tangent's layout may differ from the value's
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def jvp_along(function: Function, x: Tensor, t: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
    """``function(x, t)`` and ``d/dt function(x(t), t)`` with ``dx/dt = velocity``: exact, for about two evaluations.

    Attention runs unfused here, because fused kernels have no forward-mode derivative.

    Args:
        function: of states and times.
        x: ``(B, ...)``.
        t: ``(B,)``.
        velocity: ``(B, ...)``.

    Raises:
        RuntimeError: the function has an operation without a forward-mode derivative.
    """
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), ContiguousNorms():
            # torch loads the derivatives of some operations on first use, through an interface that it deprecates
            warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", DeprecationWarning)
            value, derivative = torch.func.jvp(function, (x, t), (velocity, torch.ones_like(t)))[:2]
            return value, derivative
    except RuntimeError as error:
        if not isinstance(error, NotImplementedError) and "autograd.Function" not in str(error):
            raise
        raise RuntimeError(
            "the student's network has an operation without a forward-mode derivative; set tangent to "
            f"'finite_difference', which needs none ({str(error).splitlines()[0]})"
        ) from error


@torch.no_grad()
def difference_along(function: Function, x: Tensor, t: Tensor, earlier: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Like `jvp_along`, by a finite difference to an earlier point of the trajectory: one evaluation of twice the rows.

    Args:
        function: of states and times, called with ``2 B`` rows: those of ``x``, then those of ``earlier``.
        x: state at t, ``(B, ...)``.
        t: ``(B,)``.
        earlier: state at s, ``(B, ...)``.
        s: ``(B,)``, below t. Rounding errors are multiplied by 1 / (t - s).
    """
    value, before = function(torch.cat([x, earlier]), torch.cat([t, s])).chunk(2)
    return value, (value - before) / per_picture((t - s).to(value.dtype), value)
