"""FLUX.1's transformer as a denoiser, and as a plain function of tensors.

The architecture is diffusers' ``FluxTransformer2DModel``, after https://github.com/black-forest-labs/flux. It takes latents
packed: each 2x2 square of 16 channels is one token of 64 numbers, placed by its row and column. Packing happens here alone,
so that latents are ``(B, 16, h, w)`` everywhere else.
"""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weights.denoiser import GUIDANCE, Cond
from weights.diffusion.schedules import RectifiedFlow
from weights.network_denoiser import NetworkDenoiser

PATCH = 2
"""Latents to a token, each way."""
UNITS = 1000
"""The network itself multiplies the timestep and the guidance scale by this."""
DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"


def packed(latents: Tensor) -> Tensor:
    """Latents ``(B, C, h, w)`` as tokens ``(B, h/2 w/2, 4 C)``, row by row; h and w are even."""
    return F.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens ``(B, h/2 w/2, 4 C)`` as latents ``(B, C, h, w)`` of that height and width: the inverse of `packed`."""
    squares = tokens.transpose(1, 2).reshape(tokens.shape[0], -1, height // PATCH, width // PATCH)
    return F.pixel_shuffle(squares, PATCH)


def _places(x_t: Tensor) -> Tensor:
    """Each token's place ``(h/2 w/2, 3)``, float32: 0, its row, its column."""
    rows, columns = (torch.arange(side // PATCH, device=x_t.device).float() for side in x_t.shape[-2:])
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3)


def _evaluate(
    transformer: nn.Module, x_t: Tensor, timestep: Tensor, states: Tensor, pooled: Tensor, scale: Tensor | None = None
) -> Tensor:
    answer = transformer(
        hidden_states=packed(x_t),
        timestep=timestep / UNITS,
        guidance=scale,
        encoder_hidden_states=states,
        pooled_projections=pooled,
        txt_ids=torch.zeros(states.shape[1], 3, device=x_t.device),  # the prompt's tokens have no places
        img_ids=_places(x_t),
        return_dict=False,
    )
    return unpacked(cast(Tensor, answer[0]), x_t.shape[-2], x_t.shape[-1])


class FluxNetwork(nn.Module):
    """A transformer that takes `FluxDenoiser.inputs` by position, and answers with ``(B, C, h, w)``."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, x_t: Tensor, timestep: Tensor, states: Tensor, pooled: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        return _evaluate(self.transformer, x_t, timestep, states, pooled, scale)


class FluxDenoiser(NetworkDenoiser):
    """A `FluxTransformer2DModel` as a denoiser over a rectified flow.

    ``cond`` has T5's states, ``{"encoder_hidden_states": (B, L, D)}``, and CLIP's vector, ``{"text_embeds": (B, E)}``. A
    network with ``guidance_embeds`` (FLUX.1-dev's) needs the guidance scale as well, ``{GUIDANCE: (B,)}``, in the units of
    this project: diffusers' ``guidance_scale``.
    """

    schedule: RectifiedFlow
    evaluate: ClassVar[Callable[..., Tensor]] = staticmethod(_evaluate)

    @property
    def middle(self) -> str:
        blocks = self.feature_blocks
        return blocks[(len(blocks) - 1) // 2]

    @property
    def feature_channels(self) -> list[int]:
        return [int(self._config.num_attention_heads * self._config.attention_head_dim)]

    @property
    def embeds_guidance(self) -> bool:
        return bool(self._config.guidance_embeds)

    @property
    def feature_blocks(self) -> list[str]:
        counts = {DOUBLE: self._config.num_layers, SINGLE: self._config.num_single_layers}
        return [f"{blocks}.{index}" for blocks, count in counts.items() for index in range(count)]

    def inputs(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, ...]:
        """What the network itself takes: latents, native timesteps, T5's states, CLIP's vector, and a scale if it has one.

        Timesteps, in [0, 1000], and scales are float32 ``(B,)``.
        """
        dtype = self._dtype
        told = (cond[GUIDANCE].float(),) if self.embeds_guidance else ()
        states, pooled = cond["encoder_hidden_states"].to(dtype), cond["text_embeds"].to(dtype)
        return x_t.to(dtype), self._native(t), states, pooled, *told

    def _feature(self, output: Any, x_t: Tensor) -> Tensor:
        tokens: Tensor = output[1]  # of both kinds of block; the prompt's tokens come first
        height, width = (side // PATCH for side in x_t.shape[-2:])
        return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)
