"""UNets of diffusers as denoisers, and as plain functions of tensors."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from weights.denoiser import GUIDANCE, Cond, Denoiser
from weights.diffusion.parameterizations import Prediction, to_x0
from weights.diffusion.schedules import DiscreteVP, expand

SIDES = ("down_blocks", "up_blocks")
MIDDLE = ("mid_block",)
"""A UNet's blocks by the names that the network itself gives them."""
TIMES = 1024
"""Batches of times at which a curve's values are kept."""


GUIDANCE_WIDTH = 256
"""Of a guidance scale's embedding, as in LCM's public weights."""


def embedded_scale(scale: Tensor) -> Tensor:
    """Guidance scales ``(B,)`` as sines and cosines ``(B, 256)``: what diffusers' pipelines give as ``timestep_cond``.

    Their frequencies are a timestep embedding's, of ``1000 (w - 1)`` (LCM, https://arxiv.org/abs/2310.04378, section 4.3,
    whose w is one less).
    """
    half = GUIDANCE_WIDTH // 2
    frequencies = torch.exp(torch.arange(half, device=scale.device) * -(math.log(10000.0) / (half - 1)))
    phase = (scale.float() - 1).unsqueeze(1) * 1000.0 * frequencies
    return torch.cat([phase.sin(), phase.cos()], dim=1)


class UNet(nn.Module):
    """A UNet that takes `UNetDenoiser.inputs` by position, and answers with ``(B, C, h, w)``."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, index: Tensor, states: Tensor, scale: Tensor | None = None) -> Tensor:
        return _evaluate(self.unet, x_t, index, states, scale)


class UNetXL(UNet):
    """SDXL's, which is also told the prompt as one vector ``(B, D)`` and the picture's sizes ``(B, 6)``."""

    def forward(  # type: ignore[override]
        self, x_t: Tensor, index: Tensor, states: Tensor, pooled: Tensor, sizes: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        return _evaluate_xl(self.unet, x_t, index, states, pooled, sizes, scale)


def _evaluate(unet: nn.Module, x_t: Tensor, index: Tensor, states: Tensor, scale: Tensor | None = None) -> Tensor:
    return cast(Tensor, unet(x_t, index, states, timestep_cond=scale, return_dict=False)[0])


def _evaluate_xl(
    unet: nn.Module,
    x_t: Tensor,
    index: Tensor,
    states: Tensor,
    pooled: Tensor,
    sizes: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    added = {"text_embeds": pooled, "time_ids": sizes}
    return cast(Tensor, unet(x_t, index, states, timestep_cond=scale, added_cond_kwargs=added, return_dict=False)[0])


Curve = Callable[[Tensor], Tensor]
"""Of a schedule, by the time."""


@lru_cache(maxsize=TIMES)
def _known(curve: Curve, times: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """The curve there, kept: drawings ask for few times again and again, and a small network takes not much longer."""
    return curve(torch.tensor(times, dtype=dtype))


def _at(curve: Curve, t: Tensor) -> Tensor:
    # On a GPU to read the times would wait for it; a gradient may be wanted where inference mode is off.
    if t.device.type == "cpu" and torch.is_inference_mode_enabled():
        return _known(curve, tuple(t.tolist()), t.dtype)
    return curve(t)


class _Enough(Exception):
    """Ends a forward pass once the features that were asked for are there."""


class UNetDenoiser(Denoiser):
    """A `UNet2DConditionModel` as a denoiser; ``cond`` is ``{"encoder_hidden_states": (B, L, D)}``."""

    schedule: DiscreteVP
    _evaluate: ClassVar[Callable[..., Tensor]] = staticmethod(_evaluate)
    """The network at `inputs`."""

    def __init__(
        self, unet: nn.Module, schedule: DiscreteVP, prediction: Prediction, program: nn.Module | None = None
    ) -> None:
        """
        Args:
            unet: the network.
            schedule: of the noise.
            prediction: what the network predicts.
            program: what evaluates the network in its place, but for features: takes `inputs` by position.
        """
        super().__init__()
        self.unet = unet
        self.schedule = schedule
        self.prediction = prediction
        self.program = program

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if self.program is None:
            return self._x0(self._evaluate(self.unet, *self.inputs(x_t, t, cond)), x_t, t)
        return self._x0(self.program(*self.inputs(x_t, t, cond)), x_t, t)

    def with_features(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, list[Tensor]]:
        with self._recording(MIDDLE, stop=False) as features:
            return self._x0(self._evaluate(self.unet, *self.inputs(x_t, t, cond)), x_t, t), features

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        return self.block_features(x_t, t, cond, MIDDLE)

    def block_features(self, x_t: Tensor, t: Tensor, cond: Cond, blocks: Sequence[str]) -> list[Tensor]:
        with self._recording(blocks, stop=True) as features:
            try:
                self._evaluate(self.unet, *self.inputs(x_t, t, cond))
            except _Enough:
                pass
            return features

    @property
    def feature_channels(self) -> list[int]:
        return [int(cast(Any, self.unet).config.block_out_channels[-1])]

    @property
    def embeds_guidance(self) -> bool:
        return cast(Any, self.unet).config.time_cond_proj_dim is not None

    @property
    def feature_blocks(self) -> list[str]:
        unet = cast(Any, self.unet)
        down, up = ([f"{side}.{index}" for index in range(len(getattr(unet, side)))] for side in SIDES)
        return [*down, *MIDDLE, *up]

    def inputs(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, ...]:
        """What the network itself takes: latents, native timesteps, hidden states, and a scale's embedding if it has one."""
        dtype = next(self.unet.parameters()).dtype
        told = (embedded_scale(cond[GUIDANCE]).to(dtype),) if self.embeds_guidance else ()
        index = _at(self.schedule.native_index, t).float()
        return x_t.to(dtype), index, cond["encoder_hidden_states"].to(dtype), *told

    def _x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (expand(_at(curve, t), x_t) for curve in (self.schedule.alpha, self.schedule.sigma))
        return to_x0(output.float(), x_t.float(), alpha, sigma, self.prediction)

    @contextmanager
    def _recording(self, blocks: Sequence[str], stop: bool) -> Iterator[list[Tensor]]:
        """Collects those blocks' outputs; with ``stop`` nothing is run after the last of them.

        After the mid block that saves the up blocks, more than half of the work.
        """
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Tensor | tuple[Tensor, Any]) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)  # down blocks give their skips as well
            if stop and len(kept) == len(blocks):
                raise _Enough

        handles = [self.unet.get_submodule(block).register_forward_hook(keep) for block in blocks]
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()


class UNetXLDenoiser(UNetDenoiser):
    """SDXL's UNet as a denoiser; ``cond`` has the prompt as one vector as well, ``{"text_embeds": (B, D)}``.

    The sizes that it is told (SDXL, https://arxiv.org/abs/2307.01952, section 2.2) follow from the latents': a picture that
    was always as large as it is drawn, and not cut.
    """

    _evaluate = staticmethod(_evaluate_xl)

    def __init__(
        self,
        unet: nn.Module,
        schedule: DiscreteVP,
        prediction: Prediction,
        program: nn.Module | None = None,
        *,
        scale: int,
    ) -> None:
        """See `UNetDenoiser`.

        Args:
            scale: pixels to a latent, each way.
        """
        super().__init__(unet, schedule, prediction, program)
        self.scale = scale

    def inputs(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, ...]:
        """`UNetDenoiser.inputs`, with the prompt's vector and the sizes before the scale."""
        latents, index, states, *told = super().inputs(x_t, t, cond)
        sizes = torch.zeros(
            len(x_t), 6, device=x_t.device
        )  # original size, corner of the cut, size wanted; heights first
        sizes[:, 0::4] = self.scale * x_t.shape[-2]
        sizes[:, 1::4] = self.scale * x_t.shape[-1]
        return latents, index, states, cond["text_embeds"].to(latents.dtype), sizes, *told
