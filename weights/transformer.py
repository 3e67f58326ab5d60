"""SD3's transformer (MMDiT) as a denoiser and as a plain function (https://arxiv.org/abs/2403.03206, section 4).

Its blocks process two token sequences, the image's patches and the prompt. A block's image tokens, one per patch, are
reshaped to a feature map, so that a discriminator's heads can treat them like a UNet's features.
"""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weights.denoiser import Cond
from weights.diffusion.schedules import RectifiedFlow
from weights.network_denoiser import NetworkDenoiser

BLOCKS = "transformer_blocks"
T5_STATES = "t5_hidden_states"
"""Name of the condition with the hidden states of the third text encoder, T5, in models that have it."""
T5_LENGTH = 256
"""Tokens of the third text encoder, as in diffusers' pipeline by default."""


def _evaluate(transformer: nn.Module, x_t: Tensor, timestep: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
    answer = transformer(
        hidden_states=x_t,
        timestep=timestep,
        encoder_hidden_states=states,
        pooled_projections=pooled,
        return_dict=False,
    )
    return cast(Tensor, answer[0])


class Transformer(nn.Module):
    """A transformer that takes `TransformerDenoiser.inputs` by position and returns ``(B, C, h, w)``."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x_t: Tensor, timestep: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
        return _evaluate(self.transformer, x_t, timestep, states, pooled)


class TransformerDenoiser(NetworkDenoiser):
    """An `SD3Transformer2DModel` as a denoiser over a rectified flow.

    ``cond`` has the CLIP encoders' concatenated hidden states, ``{"encoder_hidden_states": (B, L, D)}``, the pooled
    prompt embedding, ``{"text_embeds": (B, E)}``, and, if the model has a T5, its hidden states,
    ``{"t5_hidden_states": (B, T5_LENGTH, J)}``. The zeros that pad CLIP's states to T5's width, or replace an absent
    T5, are added in each call and not stored: without T5 they are seven eighths of what SD3's network takes.
    """

    schedule: RectifiedFlow
    evaluate: ClassVar[Callable[..., Tensor]] = staticmethod(_evaluate)

    @property
    def middle(self) -> str:
        return f"{BLOCKS}.{(self._config.num_layers - 1) // 2}"

    @property
    def feature_channels(self) -> list[int]:
        return [int(self._config.num_attention_heads * self._config.attention_head_dim)]

    @property
    def feature_blocks(self) -> list[str]:
        return [f"{BLOCKS}.{index}" for index in range(self._config.num_layers)]

    def inputs(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, ...]:
        """Latents, native timesteps, all encoders' hidden states, and the pooled prompt embedding."""
        dtype = self._dtype
        states = prompt_states(cond, int(self._config.joint_attention_dim)).to(dtype)
        return x_t.to(dtype), self._native(t), states, cond["text_embeds"].to(dtype)

    def _feature(self, output: Any, x_t: Tensor) -> Tensor:
        return self._map(output[1], x_t)  # output[0] holds the prompt's

    def _map(self, tokens: Tensor, x_t: Tensor) -> Tensor:
        """The image's tokens ``(B, N, C)``, one per patch of ``x_t`` in row-major order, as a map ``(B, C, h, w)``."""
        patch = int(self._config.patch_size)
        height, width = (side // patch for side in x_t.shape[-2:])
        return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)


def prompt_states(cond: Cond, width: int) -> Tensor:
    """All encoders' hidden states as SD3's network takes them, ``(B, L + T5_LENGTH, width)``, padded with zeros."""
    states, t5 = cond["encoder_hidden_states"], cond.get(T5_STATES)
    if t5 is None:
        return F.pad(states, (0, width - states.shape[-1], 0, T5_LENGTH))
    return torch.cat([F.pad(states, (0, width - states.shape[-1])), t5], dim=1)
