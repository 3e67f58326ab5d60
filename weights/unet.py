"""Diffusers UNets as denoisers, and as plain functions of tensors."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from weights.denoiser import GUIDANCE, Cond
from weights.diffusion.parameterizations import Prediction
from weights.diffusion.schedules import DiscreteVP
from weights.network_denoiser import NetworkDenoiser

SIDES = ("down_blocks", "up_blocks")
MIDDLE = "mid_block"
"""Name of the mid block; ``SIDES`` names the lists of down and up blocks."""

GUIDANCE_WIDTH = 256
"""Width of a guidance scale's embedding, as in LCM's public weights."""


def embedded_scale(scale: Tensor) -> Tensor:
    """Embed guidance scales ``(B,)`` as sines and cosines ``(B, 256)``: diffusers' ``timestep_cond``.

    This is a timestep embedding of ``1000 (w - 1)`` (LCM, https://arxiv.org/abs/2310.04378, section 4.3, whose w is
    smaller by one).
    """
    half = GUIDANCE_WIDTH // 2
    frequencies = torch.exp(torch.arange(half, device=scale.device) * -(math.log(10000.0) / (half - 1)))
    phase = (scale.float() - 1).unsqueeze(1) * 1000.0 * frequencies
    return torch.cat([phase.sin(), phase.cos()], dim=1)


class UNet(nn.Module):
    """A UNet that takes `UNetDenoiser.inputs` by position and returns ``(B, C, h, w)``."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, index: Tensor, states: Tensor, scale: Tensor | None = None) -> Tensor:
        return _evaluate(self.unet, x_t, index, states, scale)


class UNetXL(UNet):
    """SDXL's UNet, which also takes the pooled prompt embedding ``(B, D)`` and the image's sizes ``(B, 6)``."""

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


class UNetDenoiser(NetworkDenoiser):
    """A `UNet2DConditionModel` as a denoiser; ``cond`` is ``{"encoder_hidden_states": (B, L, D)}``."""

    schedule: DiscreteVP
    middle = MIDDLE
    evaluate: ClassVar[Callable[..., Tensor]] = staticmethod(_evaluate)

    @property
    def feature_channels(self) -> list[int]:
        return [int(self._config.block_out_channels[-1])]

    @property
    def embeds_guidance(self) -> bool:
        return self._config.time_cond_proj_dim is not None

    @property
    def feature_blocks(self) -> list[str]:
        unet = cast(Any, self.network)
        down, up = ([f"{side}.{index}" for index in range(len(getattr(unet, side)))] for side in SIDES)
        return [*down, MIDDLE, *up]

    def inputs(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, ...]:
        """Latents, native timesteps, hidden states and, if the network embeds guidance, the scale's embedding."""
        dtype = self._dtype
        told = (embedded_scale(cond[GUIDANCE]).to(dtype),) if self.embeds_guidance else ()
        return x_t.to(dtype), self._native(t), cond["encoder_hidden_states"].to(dtype), *told

    def _feature(self, output: Any, x_t: Tensor) -> Tensor:
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)  # down blocks also return their skips


class UNetXLDenoiser(UNetDenoiser):
    """SDXL's UNet as a denoiser; ``cond`` also has the pooled prompt embedding, ``{"text_embeds": (B, D)}``.

    The size conditioning (SDXL, https://arxiv.org/abs/2307.01952, section 2.2) follows from the latents: original and
    target size are the image's size, and nothing is cropped.
    """

    evaluate = staticmethod(_evaluate_xl)

    def __init__(
        self,
        network: nn.Module,
        schedule: DiscreteVP,
        prediction: Prediction,
        program: nn.Module | None = None,
        *,
        scale: int,
    ) -> None:
        """See `UNetDenoiser`.

        Args:
            scale: pixels per latent, along each side.
        """
        super().__init__(network, schedule, prediction, program)
        self.scale = scale

    def inputs(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, ...]:
        """`UNetDenoiser.inputs`, with the pooled embedding and the sizes before the scale's embedding."""
        latents, index, states, *told = super().inputs(x_t, t, cond)
        sizes = torch.zeros(len(x_t), 6, device=x_t.device)  # original size, crop corner, target size; heights first
        sizes[:, 0::4] = self.scale * x_t.shape[-2]
        sizes[:, 1::4] = self.scale * x_t.shape[-1]
        return latents, index, states, cond["text_embeds"].to(latents.dtype), sizes, *told
