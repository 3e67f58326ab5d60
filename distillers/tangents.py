"""Values and derivatives along a trajectory, without a graph: forward-mode, or by a difference where a network has none."""

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
def jvp_along(function: Function, x: Tensor, t: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
    """``function(x, t)``, and ``d/dt function(x(t), t)`` where ``dx/dt = velocity``: exact, for about two evaluations' cost.

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
    """The same by the difference to an earlier point of the trajectory, in one evaluation of twice the rows.

    Args:
        function: of states and times, here of ``2 B`` rows: those of ``x``, then those of ``earlier``.
        x: state at t, ``(B, ...)``.
        t: ``(B,)``.
        earlier: state at s, ``(B, ...)``.
        s: ``(B,)``, below t. Rounding is magnified by 1 / (t - s).
    """
    value, before = function(torch.cat([x, earlier]), torch.cat([t, s])).chunk(2)
    return value, (value - before) / per_picture((t - s).to(value.dtype), value)
