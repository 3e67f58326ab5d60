"""SD3's transformer (MMDiT) as a denoiser, and as a plain function of tensors (https://arxiv.org/abs/2403.03206, section 4).

Its blocks work on two rows of tokens at once, the picture's patches and the prompt's. What they give of the picture is read
here as a map, a token a patch, so that critics' heads take it for a UNet's.
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
"""Name of the condition with the third text encoder's states, where the model has that encoder."""
T5_LENGTH = 256
"""Tokens of the third text encoder's, as diffusers' pipeline counts them unless told otherwise."""


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
    """A transformer that takes `TransformerDenoiser.inputs` by position, and answers with ``(B, C, h, w)``."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x_t: Tensor, timestep: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
        return _evaluate(self.transformer, x_t, timestep, states, pooled)


class TransformerDenoiser(NetworkDenoiser):
    """An `SD3Transformer2DModel` as a denoiser over a rectified flow.

    ``cond`` has the CLIP encoders' states side by side, ``{"encoder_hidden_states": (B, L, D)}``, the prompt as one vector,
    ``{"text_embeds": (B, E)}``, and, where the model has a T5, its states ``{"t5_hidden_states": (B, T5_LENGTH, J)}``.
    Zeros that fill the CLIPs' states up to T5's width, or stand for an absent T5, are added at each call and kept nowhere:
    without T5 they are seven eighths of what SD3's network takes.
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
        """What the network itself takes: latents, native timesteps, every encoder's states, and the prompt's vector."""
        dtype = self._dtype
        states = prompt_states(cond, int(self._config.joint_attention_dim)).to(dtype)
        return x_t.to(dtype), self._native(t), states, cond["text_embeds"].to(dtype)

    def _feature(self, output: Any, x_t: Tensor) -> Tensor:
        tokens: Tensor = output[1]  # the prompt's come first
        patch = int(self._config.patch_size)
        height, width = (side // patch for side in x_t.shape[-2:])
        return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)


def prompt_states(cond: Cond, width: int) -> Tensor:
    """All encoders' states ``(B, L + T5_LENGTH, width)`` as SD3's network takes them, with zeros for what is not there."""
    states, t5 = cond["encoder_hidden_states"], cond.get(T5_STATES)
    if t5 is None:
        return F.pad(states, (0, width - states.shape[-1], 0, T5_LENGTH))
    return torch.cat([F.pad(states, (0, width - states.shape[-1])), t5], dim=1)
