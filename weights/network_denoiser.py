"""Diffusers networks as denoisers: what UNets and transformers have in common."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from weights.denoiser import Cond, Denoiser
from weights.diffusion.parameterizations import Prediction, to_x0
from weights.diffusion.schedules import DiscreteVP, RectifiedFlow, expand

TIMES = 1024
"""Size of the cache of curve values, in batches of times."""

Curve = Callable[[Tensor], Tensor]
"""A schedule's function of time, such as alpha."""


@lru_cache(maxsize=TIMES)
def _known(curve: Curve, times: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """The curve's values, cached: sampling repeats times, and computing them is not negligible for a small network."""
    return curve(torch.tensor(times, dtype=dtype))


def at(curve: Curve, t: Tensor) -> Tensor:
    """The curve's values at times ``(B,)``, from the cache where that is cheaper than computing them."""
    # Reading times from a GPU would synchronise; outside inference mode, the caller may need gradients.
    if t.device.type == "cpu" and torch.is_inference_mode_enabled():
        return _known(curve, tuple(t.tolist()), t.dtype)
    return curve(t)


class _Enough(Exception):
    """Stops a forward pass once the requested features are there."""


class NetworkDenoiser(Denoiser):
    """A diffusers network as a denoiser. Subclasses define its inputs and its blocks' features."""

    schedule: DiscreteVP | RectifiedFlow
    evaluate: ClassVar[Callable[..., Tensor]]
    """Maps the network, then its `inputs` by position, to its prediction ``(B, C, h, w)``."""

    def __init__(
        self,
        network: nn.Module,
        schedule: DiscreteVP | RectifiedFlow,
        prediction: Prediction,
        program: nn.Module | None = None,
    ) -> None:
        """
        Args:
            network: the diffusers network.
            schedule: the noise schedule.
            prediction: what the network predicts.
            program: evaluates the network in its place, except for features; takes `inputs` by position.
        """
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.prediction = prediction
        self.program = program

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if self.program is None:
            return self._x0(self.evaluate(self.network, *self.inputs(x_t, t, cond)), x_t, t)
        return self._x0(self.program(*self.inputs(x_t, t, cond)), x_t, t)

    def with_features(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, list[Tensor]]:
        with self._recording(x_t, [self.middle], stop=False) as features:
            return self._x0(self.evaluate(self.network, *self.inputs(x_t, t, cond)), x_t, t), features

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        return self.block_features(x_t, t, cond, [self.middle])

    def block_features(self, x_t: Tensor, t: Tensor, cond: Cond, blocks: Sequence[str]) -> list[Tensor]:
        with self._recording(x_t, blocks, stop=True) as features:
            try:
                self.evaluate(self.network, *self.inputs(x_t, t, cond))
            except _Enough:
                pass
            return features

    @property
    @abstractmethod
    def middle(self) -> str:
        """The block that `features` reads."""

    @abstractmethod
    def inputs(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, ...]:
        """The network's own inputs, in its dtype except for the native timesteps, which are float32."""

    @abstractmethod
    def _feature(self, output: Any, x_t: Tensor) -> Tensor:
        """A block's output for these latents as a feature map ``(B, C, h, w)``."""

    @property
    def _config(self) -> Any:
        return cast(Any, self.network).config

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def _native(self, t: Tensor) -> Tensor:
        return at(self.schedule.native_index, t).float()

    def _x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (expand(at(curve, t), x_t) for curve in (self.schedule.alpha, self.schedule.sigma))
        return to_x0(output.float(), x_t.float(), alpha, sigma, self.prediction)

    @contextmanager
    def _recording(self, x_t: Tensor, blocks: Sequence[str], stop: bool) -> Iterator[list[Tensor]]:
        """Record the feature maps of these blocks; with ``stop``, end the forward pass after the last of them.

        Stopping after a UNet's mid block skips the up blocks, more than half of the work.
        """
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            kept.append(self._feature(output, x_t))
            if stop and len(kept) == len(blocks):
                raise _Enough

        handles = [self.network.get_submodule(block).register_forward_hook(keep) for block in blocks]
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()
