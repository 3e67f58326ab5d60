"""Used on top of denoisers in training: discriminator heads on their features, and guidance for a subset of rows."""

import math

import torch
from torch import Tensor, nn

from weights.denoiser import GUIDANCE, Cond, Denoiser, cond_cat, cond_repeat, cond_rows
from weights.diffusion.guidance import scale_at
from weights.diffusion.schedules import expand


def head(channels: int, size: int) -> nn.Sequential:
    """A head that maps features ``(B, channels, size, size)`` to logits ``(B, 1, 1, 1)``.

    This is DMD2's head for a UNet: (4x4 convolution with stride 2, GroupNorm, SiLU) down to 4x4, a convolution over all
    remaining positions, GroupNorm and SiLU again, and a 1x1 convolution. For features smaller than 4x4, the kernel has
    their size. There are 32 groups, or fewer so that each has at least four channels: at the end a channel is a single
    number, and normalising one or two numbers would leave nothing of them.
    """
    groups = math.gcd(32, channels)
    while groups > 1 and channels // groups < 4:
        groups //= 2
    layers: list[nn.Module] = []
    while size >= 8:
        layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), nn.GroupNorm(groups, channels), nn.SiLU()]
        size //= 2
    layers += [nn.Conv2d(channels, channels, size), nn.GroupNorm(groups, channels), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))


class Heads(nn.Module):
    """One head per feature map of a denoiser, with concatenated logits."""

    def __init__(self, denoiser: Denoiser, latent_shape: tuple[int, ...], cond: Cond, device: torch.device) -> None:
        """Runs the denoiser once to find the sizes of its features.

        Args:
            denoiser: computes the features.
            latent_shape: of one latent.
            cond: any one row.
            device: that of the denoiser's weights.

        Raises:
            TypeError: the denoiser has no features.
        """
        super().__init__()
        with torch.no_grad():
            time = torch.ones(1, device=device)
            features = denoiser.features(torch.zeros(1, *latent_shape, device=device), time, cond)
        self.heads = nn.ModuleList([head(feature.shape[1], feature.shape[-1]) for feature in features]).to(device)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Returns ``(B, number of feature maps)`` float32; larger means real."""
        weight = next(self.parameters())
        logits = [each(feature.to(weight.dtype)).flatten(1) for each, feature in zip(self.heads, features, strict=True)]
        return torch.cat(logits, dim=1).float()


def guided_x0(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Cond,
    uncond: Cond,
    scale: float | Tensor,
    interval: tuple[float, float] | None = None,
) -> Tensor:
    """``uncond + w (cond - uncond)`` in one call, whose unconditional half contains only the rows inside ``interval``.

    Unlike `weights.diffusion.guidance.Guided`, which doubles the whole batch, rows outside the interval cost one
    evaluation instead of two, since times in training differ between rows. A denoiser that embeds guidance is given the
    scale (1.0 outside the interval) and evaluated once; ``uncond`` is not used.

    Args:
        denoiser: the teacher.
        x_t: ``(B, ...)``.
        t: ``(B,)``.
        cond: B rows.
        uncond: 1 row.
        scale: w; 1.0 is off. A number, or ``(B,)``, which costs the unconditional evaluation of every row.
        interval: guide only where ``low <= t <= high``; everywhere when left out.
    """
    if denoiser.embeds_guidance:
        return denoiser(x_t, t, {**cond, GUIDANCE: scale_at(scale, t, interval)})
    if not isinstance(scale, Tensor) and scale == 1.0:
        return denoiser(x_t, t, cond)
    if interval is None:
        rows = torch.arange(len(t), device=t.device)
    else:
        rows = torch.nonzero((t >= interval[0]) & (t <= interval[1])).flatten()
    if len(rows) == 0:
        return denoiser(x_t, t, cond)
    both = denoiser(
        torch.cat([x_t, x_t[rows]]),
        torch.cat([t, t[rows]]),
        cond_cat([cond, cond_repeat(cond_rows(uncond, slice(0, 1)), len(rows))]),
    )
    given, without = both[: len(x_t)], both[len(x_t) :]
    guided = given.clone()
    every = scale if isinstance(scale, Tensor) else torch.full((len(x_t),), scale, device=x_t.device)
    factor = every.to(x_t.device, torch.float32).expand(len(x_t))[rows]
    guided[rows] = without + expand(factor, without) * (given[rows] - without)
    return guided
