"""Previews of images in progress at almost no cost: a linear map from latents to colours.

An autoencoder's latents are nearly a small image with other channels: a pixel's colour is, to a good approximation, a
linear function of the latent's channels at that position. The map is fitted to the decoder's output for smooth latents,
since a latent that differs from all its neighbours does not occur in images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from weights.families import TextToImage

SAMPLES = 4
GRID = 4
"""Random colours across a sample, per side: 64 in all determine the map's few parameters well."""


class LinearPreview:
    """Maps latents to images of the latents' height and width.

    Args:
        weights: ``(C + 1, 3)``; the last row is the constant.
    """

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights

    @classmethod
    def fit(cls, base: TextToImage) -> "LinearPreview":
        """Fit the map to this base's decoder by least squares."""
        channels, height, width = base.latent_shape()
        colours = torch.randn(SAMPLES, channels, GRID, GRID, generator=torch.Generator().manual_seed(0))
        latents = F.interpolate(colours, size=(height, width), mode="bilinear")
        latents = (latents / latents.std()).to(base.device)
        # One at a time: every backend can decode that, and it takes no more memory than for an image.
        pictures = torch.cat([base.decode(latent) for latent in latents.split(1)])
        wanted = F.adaptive_avg_pool2d(pictures.float(), (height, width)).permute(0, 2, 3, 1).reshape(-1, 3)
        given = _with_constant(latents).reshape(-1, channels + 1)
        # Solved on the CPU, since not every device has float64.
        solution = torch.linalg.lstsq(given.double().cpu(), wanted.double().cpu()).solution
        return cls(solution.float().to(base.device))

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents ``(B, C, h, w)`` as images ``(B, 3, h, w)`` in [-1, 1]."""
        return (_with_constant(latents) @ self._weights).clamp(-1, 1).permute(0, 3, 1, 2)


def _with_constant(latents: Tensor) -> Tensor:
    """Latents as ``(B, h, w, C + 1)``, with 1 in the last channel."""
    pixels = latents.float().permute(0, 2, 3, 1)
    return torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1)
