"""Previews of pictures that are being drawn, at next to no cost: a linear map from latents to colours.

Autoencoders' latents are nearly a small picture with other channels: a pixel's colour is, to a fair approximation, a linear
function of the latent's channels at its place. The map is fitted to what the real decoder makes of latents that change
slowly over the picture, since a latent that differs from all around it is nothing that a picture has.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from weights.families import TextToImage

SAMPLES = 4
GRID = 4
"""Random colours across a sample, each way: 64 in all determine the map's few numbers well."""


class LinearPreview:
    """From latents to pictures of the latents' height and width.

    Args:
        weights: ``(C + 1, 3)``, the last row the constant.
    """

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights

    @classmethod
    def fit(cls, base: TextToImage) -> "LinearPreview":
        """The least-squares map for this base's decoder."""
        channels, height, width = base.latent_shape()
        colours = torch.randn(SAMPLES, channels, GRID, GRID, generator=torch.Generator().manual_seed(0))
        latents = F.interpolate(colours, size=(height, width), mode="bilinear")
        latents = (latents / latents.std()).to(base.device)
        # One at a time: any backend can decode that, and no more memory is taken than for a picture.
        pictures = torch.cat([base.decode(latent) for latent in latents.split(1)])
        wanted = F.adaptive_avg_pool2d(pictures.float(), (height, width)).permute(0, 2, 3, 1).reshape(-1, 3)
        given = _with_constant(latents).reshape(-1, channels + 1)
        # Solved where float64 always is, on whatever device the decoder runs.
        solution = torch.linalg.lstsq(given.double().cpu(), wanted.double().cpu()).solution
        return cls(solution.float().to(base.device))

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents ``(B, C, h, w)`` as pictures ``(B, 3, h, w)`` in [-1, 1]."""
        return (_with_constant(latents) @ self._weights).clamp(-1, 1).permute(0, 3, 1, 2)


def _with_constant(latents: Tensor) -> Tensor:
    """``(B, h, w, C + 1)``, the last channel 1."""
    pixels = latents.float().permute(0, 2, 3, 1)
    return torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1)
