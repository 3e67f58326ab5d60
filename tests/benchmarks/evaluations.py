"""Counts the network evaluations of training as they happen, and repeats them bare, for `bench_train`.

An evaluation is an outermost call, below the denoisers, to a module with weights: networks, critics' heads, whatever else a
method asks, none of them known here by name. Every module's call is watched; hooks on the tensors inside tell whether a
gradient came back through it, and from where. So these are told apart:

    forward                     no gradient came back
    forward + backward          one did, from the output to the weights, or "to the input" alone
    ... backward from MODULE    the gradient came in at an inner module: the loss saw features only
    forward up to MODULE        the call was ended there, as `Denoiser.features` does
    jvp                         with a directional derivative (forward-mode differentiation)

Repeating one means the same call on inputs of the same shapes with the same parts requiring gradients, then a backward pass
of ones from where the gradient came in: what that evaluation costs in plain PyTorch.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook

from distillers.trained import TurnModule
from weights.denoiser import Denoiser


@dataclass(frozen=True)
class Kind:
    """What makes two evaluations cost the same."""

    network: str
    module: int
    inputs: tuple[tuple[tuple[int, ...], bool, bool], ...]
    """Shape of every tensor given, whether it required a gradient, and whether it carried a tangent."""
    graph: bool
    weights: tuple[bool, ...]
    """Which parameters required a gradient."""
    stopped: str | None
    """Inner module that ended the call."""
    start: str | None
    """Inner module whose output the gradient came in at, "" for the network itself; None: there was no backward pass."""
    backwards: int

    @property
    def rows(self) -> int:
        return self.inputs[0][0][0] if self.inputs and self.inputs[0][0] else 1

    @property
    def title(self) -> str:
        """For people."""
        what = "jvp" if any(tangent for _, _, tangent in self.inputs) else "forward"
        if self.stopped is not None:
            what += f" up to {self.stopped}"
        if self.backwards:
            what += " + backward" if self.backwards == 1 else f" + {self.backwards} backward"
            what += f" from {self.start}" if self.start not in ("", self.stopped) else ""
            what += "" if any(self.weights) else " to the input"
        return what


@dataclass
class Call:
    """One evaluation while, and after, it is watched."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    graph: bool
    weights: tuple[bool, ...]
    inputs: tuple[tuple[tuple[int, ...], bool, bool], ...]
    stopped: nn.Module | None = None
    passed: list[nn.Module] = field(default_factory=list)
    """Modules of it that have returned, in order."""
    arrived: Counter[int] = field(default_factory=Counter)
    """How often a gradient arrived at the output of ``passed[index]``."""

    def kind(self, network: str) -> Kind:
        """What is known of it once its pass, and the backward pass, are over."""
        names = {module: name for name, module in self.module.named_modules()}
        start = max(self.arrived, default=None)
        return Kind(
            network=network,
            module=id(self.module),
            inputs=self.inputs,
            graph=self.graph,
            weights=self.weights,
            stopped=None if self.stopped is None else names.get(self.stopped, ""),
            start=None if start is None else names.get(self.passed[start], ""),
            backwards=0 if start is None else self.arrived[start],
        )


class Recorder:
    """Watches training and keeps what it evaluates."""

    def __init__(self, names: dict[nn.Module, str]) -> None:
        """
        Args:
            names: of the modules worth naming; others go by their class.
        """
        self.names = names
        self.examples: dict[Kind, Call] = {}
        """A call of each kind, to repeat it."""
        self._passes: list[list[Call]] = []
        self._open: Call | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, every evaluation is recorded."""
        plain = nn.Module.__call__
        recorder = self

        def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return recorder._watch(partial(plain, module), module, args, kwargs)

        handle = register_module_forward_hook(self._returned)
        nn.Module.__call__ = watched  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = plain  # type: ignore[method-assign]
            handle.remove()

    def taken(self) -> list[list[Kind]]:
        """The kinds of all evaluations since this was last asked, a list for every pass through a turn's loss."""
        found = []
        for calls in self._passes:
            kinds = [call.kind(self.names.get(call.module, type(call.module).__name__)) for call in calls]
            for kind, call in zip(kinds, calls, strict=True):
                self.examples.setdefault(kind, call)
            found.append(kinds)
        self._passes = []
        return [kinds for kinds in found if kinds]

    def _watch(
        self, plain: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if isinstance(module, TurnModule) or not self._passes:
            self._passes.append([])
        inner = self._open is not None
        if isinstance(module, TurnModule | Denoiser) or (not inner and next(module.parameters(), None) is None):
            return plain(*args, **kwargs)
        if self._open is None:
            self._open = _begun(module, args, kwargs)
            self._passes[-1].append(self._open)
        call = self._open
        try:
            return plain(*args, **kwargs)
        except Exception:
            call.stopped = call.stopped or module  # the innermost one sees it first
            raise
        finally:
            if not inner:
                self._open = None

    def _returned(self, module: nn.Module, _args: Any, output: Any) -> None:
        """A module gave its output; its own hooks have not seen it yet."""
        call = self._open
        if call is None:
            return
        index = len(call.passed)
        call.passed.append(module)
        arrived = call.arrived

        def arrive(_gradient: Tensor) -> None:
            arrived[index] += 1

        for tensor in tensors(output)[:1]:
            if _plain(tensor).requires_grad:
                _plain(tensor).register_hook(arrive)


def repeat(kind: Kind, call: Call, device: torch.device) -> None:
    """The bare evaluation; gradients that it leaves are dropped."""
    for weight, wanted in zip(call.module.parameters(), kind.weights, strict=True):
        weight.requires_grad_(wanted)
    flags = iter(kind.inputs)

    def given(tensor: Tensor) -> Tensor:
        _, requires_grad, tangent = next(flags)
        return tensor.detach().requires_grad_(requires_grad and kind.graph and not tangent)

    args, kwargs = mapped(call.args, given), mapped(call.kwargs, given)
    with torch.set_grad_enabled(kind.graph), _caught(kind, call.module) as caught:
        try:
            output = _with_tangents(kind, call.module, args, kwargs)
        except _Stopped:
            output = None
    if kind.backwards:
        end = caught[-1] if caught else tensors(output)[0]
        with torch.autocast(device.type, enabled=False):
            for left in reversed(range(kind.backwards)):
                torch.autograd.backward(end, torch.ones_like(end), retain_graph=left > 0)
    for weight in call.module.parameters():
        weight.grad = None


class _Stopped(Exception):
    """Ends a call where it was ended in training."""


@contextmanager
def _caught(kind: Kind, module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the inner output that a backward pass begins at, and ends the call where it is to end."""
    outputs: list[Tensor] = []
    handles = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(tensors(output)[0])

    def stop(*_: Any) -> None:
        raise _Stopped

    if kind.start:
        handles.append(module.get_submodule(kind.start).register_forward_hook(keep))
    if kind.stopped is not None:
        handles.append(module.get_submodule(kind.stopped).register_forward_hook(stop))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _with_tangents(kind: Kind, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """The call, with a directional derivative where there was one."""
    moving = [tangent for _, _, tangent in kind.inputs]
    if not any(moving):
        return module(*args, **kwargs)
    everything = tensors([args, kwargs])

    def call(*moved: Tensor) -> Tensor:
        fresh, along = iter(moved), iter(moving)

        def given(tensor: Tensor) -> Tensor:
            return next(fresh) if next(along) else tensor

        return tensors(module(*mapped(args, given), **mapped(kwargs, given)))[0]

    primals = tuple(tensor for tensor, moves in zip(everything, moving, strict=True) if moves)
    return torch.func.jvp(call, primals, tuple(torch.ones_like(primal) for primal in primals))[0]


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The nested value with every tensor replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: mapped(inner, function) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([mapped(inner, function) for inner in value])
    return value


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a nested value, in the order of `mapped`."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for each in inner for tensor in tensors(each)]


def _begun(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    given = tensors([args, kwargs])
    return Call(
        module=module,
        args=mapped(args, _kept),
        kwargs=mapped(kwargs, _kept),
        graph=torch.is_grad_enabled(),
        weights=tuple(weight.requires_grad for weight in module.parameters()),
        inputs=tuple((tuple(each.shape), _plain(each).requires_grad, _moves(each)) for each in given),
    )


def _kept(tensor: Tensor) -> Tensor:
    return _plain(tensor).detach()


def _moves(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None if tensor.is_floating_point() else False


def _plain(tensor: Tensor) -> Tensor:
    """What is inside the wrapper that torch.func puts around tensors it differentiates."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
