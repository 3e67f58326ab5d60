"""Diffusers' autoencoders: images to latents of about unit variance and back, a few large ones at a time."""

from typing import Any, cast

import torch
from torch import Tensor, nn

PIXELS_AT_ONCE = 1024 * 1024
"""Pixels that go through the autoencoder together.

Stable Diffusion's widest activations, 256 channels at full resolution in the decoder, then take 1 GiB in float32. One
image of 1024 pixels keeps a GPU busy, so more together would gain nothing.
"""


class Decoder(nn.Module):
    """Decodes latents of about unit variance to images in [-1, 1], float32."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return decoded(self.vae, latents).clamp(-1, 1)


def split(pictures: Tensor, scale: int = 1) -> tuple[Tensor, ...]:
    """Split a batch into parts for the autoencoder; ``scale`` is the pixels per element, along each side."""
    rows = max(1, PIXELS_AT_ONCE // (pictures.shape[-2] * pictures.shape[-1] * scale * scale))
    return torch.split(pictures, rows)


def encoded(vae: nn.Module, pictures: Tensor) -> Tensor:
    """Encode images ``(B, 3, H, W)`` in [-1, 1] to latents ``(B, C, h, w)``, float32; takes a distribution's mode."""
    config = cast(Any, vae).config
    output = cast(Any, vae).encode(pictures)
    plain = [getattr(output, name) for name in ("latents", "latent") if hasattr(output, name)]
    latents: Tensor = plain[0] if plain else output.latent_dist.mode()
    return (latents.float() - _shift(config)) * cast(float, config.scaling_factor)


def decoded(vae: nn.Module, latents: Tensor) -> Tensor:
    """Decode latents to images, float32, differentiably and without clamping them to [-1, 1]."""
    config = cast(Any, vae).config
    scaled = latents / config.scaling_factor + _shift(config)
    pictures: Tensor = cast(Any, vae).decode(scaled.to(cast(Any, vae).dtype), return_dict=False)[0]
    return pictures.float()


def scale_of(vae: nn.Module) -> int:
    """Pixels per latent, along each side."""
    config = cast(Any, vae).config
    return int(2 ** (len(getattr(config, "encoder_block_out_channels", None) or config.block_out_channels) - 1))


def _shift(config: Any) -> float:
    """The shift of SD3's latents before scaling; 0 for other autoencoders."""
    return getattr(config, "shift_factor", None) or 0.0
