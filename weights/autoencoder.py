"""diffusers' autoencoders: pictures to latents of about unit variance and back, a few large ones at a time."""

from typing import Any, cast

import torch
from torch import Tensor, nn

PIXELS_AT_ONCE = 4 * 1024 * 1024
"""Of the pictures that go through the autoencoder together: each of its widest activations is 2 GiB in float32 then."""


class Decoder(nn.Module):
    """Latents of about unit variance to pictures in [-1, 1], float32."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return decoded(self.vae, latents).clamp(-1, 1)


def split(pictures: Tensor, scale: int = 1) -> tuple[Tensor, ...]:
    """These, each as a picture so many times larger, in the parts that go through the autoencoder one after another."""
    rows = max(1, PIXELS_AT_ONCE // (pictures.shape[-2] * pictures.shape[-1] * scale * scale))
    return torch.split(pictures, rows)


def encoded(vae: nn.Module, pictures: Tensor) -> Tensor:
    """Pictures ``(B, 3, H, W)`` in [-1, 1] to latents ``(B, C, h, w)``, float32; the mode where there is a distribution."""
    config = cast(Any, vae).config
    output = cast(Any, vae).encode(pictures)
    latents: Tensor = output.latents if hasattr(output, "latents") else output.latent_dist.mode()
    return (latents.float() - _shift(config)) * cast(float, config.scaling_factor)


def decoded(vae: nn.Module, latents: Tensor) -> Tensor:
    """Latents to pictures, float32, not cut off at -1 and 1; with its graph."""
    config = cast(Any, vae).config
    scaled = latents / config.scaling_factor + _shift(config)
    pictures: Tensor = cast(Any, vae).decode(scaled.to(cast(Any, vae).dtype), return_dict=False)[0]
    return pictures.float()


def scale_of(vae: nn.Module) -> int:
    """Pixels to a latent, each way."""
    config = cast(Any, vae).config
    return int(2 ** (len(getattr(config, "encoder_block_out_channels", None) or config.block_out_channels) - 1))


def _shift(config: Any) -> float:
    """What SD3's latents are shifted by before they are scaled; others' are not."""
    return getattr(config, "shift_factor", None) or 0.0
