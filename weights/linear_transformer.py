"""SANA's transformer as a denoiser, and as a plain function of tensors (https://arxiv.org/abs/2410.10629).

Self-attention over the image's tokens is linear in their number. Cross-attention to the prompt's tokens is masked.
"""

from collections.abc import Callable
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from weights.denoiser import GUIDANCE, Cond
from weights.transformer import TransformerDenoiser

MASK = "encoder_attention_mask"
"""Name of the condition that holds the attention mask of a prompt's tokens."""


def _evaluate(
    transformer: nn.Module, x_t: Tensor, timestep: Tensor, states: Tensor, mask: Tensor, scale: Tensor | None = None
) -> Tensor:
    answer = transformer(
        hidden_states=x_t,
        timestep=timestep,
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        guidance=scale,
        return_dict=False,
    )
    # Some networks also predict a variance, in the second half of their channels.
    return cast(Tensor, answer[0])[:, : int(cast(Any, transformer).config.in_channels)]


class LinearTransformer(nn.Module):
    """A transformer that takes `LinearTransformerDenoiser.inputs` by position and returns ``(B, C, h, w)``."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, x_t: Tensor, timestep: Tensor, states: Tensor, mask: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        return _evaluate(self.transformer, x_t, timestep, states, mask, scale)


class LinearTransformerDenoiser(TransformerDenoiser):
    """A `SanaTransformer2DModel` as a denoiser over a rectified flow.

    ``cond`` has the text encoder's hidden states, ``{"encoder_hidden_states": (B, L, D)}``, and their attention mask,
    ``{"encoder_attention_mask": (B, L)}``, bool: True is a token, False is padding.
    """

    evaluate: ClassVar[Callable[..., Tensor]] = staticmethod(_evaluate)

    @property
    def embeds_guidance(self) -> bool:
        return bool(self._config.guidance_embeds)

    def inputs(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, ...]:
        """Latents, native timesteps, hidden states, attention mask and, if the network embeds guidance, the scale.

        The mask is 0 or 1 in the network's dtype. Timesteps and guidance ``(B,)`` are float32, multiplied by the
        network's ``timestep_scale`` and ``guidance_embeds_scale``.
        """
        dtype, config = self._dtype, self._config
        timestep = self._native(t) * float(config.timestep_scale)
        told = (cond[GUIDANCE].float() * float(config.guidance_embeds_scale),) if self.embeds_guidance else ()
        return x_t.to(dtype), timestep, cond["encoder_hidden_states"].to(dtype), cond[MASK].to(dtype), *told

    def _feature(self, output: Any, x_t: Tensor) -> Tensor:
        return self._map(output, x_t)  # its blocks return the image's tokens only
