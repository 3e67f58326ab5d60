"""Guidance, as denoisers that wrap a denoiser.

Classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, equation 6) is used in the convention
``D = D_uncond + w (D_cond - D_uncond)``; w = 1 is off. x_0 is an affine function of the network's output, with the same
coefficients for both estimates, so guiding x_0 is equivalent to guiding the output itself.

Autoguidance (Karras et al. 2024, https://arxiv.org/abs/2406.02507, section 3) replaces the unconditional estimate by
that of a worse version of the model, which is smaller or less trained. Both err in the same directions, the worse one
further, so guiding away from the worse model reduces the error.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from weights.denoiser import GUIDANCE, Cond, Denoiser, cond_cat, cond_repeat, cond_rows, cond_to
from weights.diffusion.schedules import expand


def scale_at(scale: float | Tensor, t: Tensor, interval: tuple[float, float] | None) -> Tensor:
    """The scale of each row, ``(B,)`` float32 for times ``(B,)``: 1, which is off, beyond the interval if there is one."""
    scales = torch.as_tensor(scale, dtype=torch.float32, device=t.device).expand(len(t))
    if interval is None:
        return scales
    return torch.where((t >= interval[0]) & (t <= interval[1]), scales, torch.ones_like(scales))


class Guided(Denoiser):
    """A denoiser under classifier-free guidance, evaluated in one call of twice the batch.

    Args:
        denoiser: the denoiser to guide.
        uncond: conditions of the unconditional (or negative) prompt: one row for all images, or one per image.
        scale: w, at least 0: one for all, or a tensor ``(B,)``. If all are 1.0, the call evaluates ``cond`` alone
            (exactly the unguided denoiser), and if all are 0.0, ``uncond`` alone; both avoid doubling the batch.
        interval: guide only where ``low <= t <= high`` (Kynkaanniemi et al. 2024, https://arxiv.org/abs/2404.07724). A
            call whose times all lie outside does not double the batch.

    Raises:
        ValueError: a negative scale, or an interval that is not inside [0, 1].
    """

    def __init__(
        self,
        denoiser: Denoiser,
        uncond: Cond,
        scale: float | Tensor,
        interval: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if (float(scale.min()) if isinstance(scale, Tensor) else scale) < 0:
            raise ValueError(f"guidance scale {scale} is negative: 1.0 turns guidance off, more than 1.0 guides")
        if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"guidance interval {interval} must be (low, high) with 0 <= low <= high <= 1")
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.uncond = uncond
        self.scale = scale
        self.interval = interval

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The guided estimate of x_0; shapes as in `Denoiser.forward`."""
        scale = scale_at(self.scale, t, self.interval)
        if bool((scale == 1).all()):
            return self._single(x_t, t, cond)
        uncond = self._uncond_rows(x_t)
        if bool((scale == 0).all()):
            return self._single(x_t, t, uncond)
        both: Tensor = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), cond_cat([uncond, cond]))
        without, given = both.chunk(2)
        return without + expand(scale, given) * (given - without)

    def _single(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        x0: Tensor = self.denoiser(x_t, t, cond)
        return x0

    def _uncond_rows(self, x_t: Tensor) -> dict[str, Tensor]:
        rows = {len(tensor) for tensor in self.uncond.values()}
        uncond = cond_to(self.uncond, x_t.device)
        if rows == {1}:
            return cond_repeat(uncond, len(x_t))
        if rows != {len(x_t)}:
            raise ValueError(f"uncond has {sorted(rows)} rows for a batch of {len(x_t)}: give 1, or one per image")
        return uncond


class AutoGuided(Denoiser):
    """A denoiser guided away from a worse one at the same prompt: ``D = G + w (D - G)``.

    The unconditional estimate is left unguided, since classifier-free guidance (`Guided` around this) guides away from
    it. The two then add up: ``D_cond + s (w - 1) (D_cond - G_cond) + (s - 1) (D_cond - D_uncond)``. Features are those
    of the guided denoiser.

    Args:
        denoiser: the denoiser to guide.
        guide: the worse one, over the same schedule.
        scale: w, at least 1.0, which is off.
        uncond: conditions of the unconditional prompt, one row.

    Raises:
        ValueError: a scale below 1.
    """

    def __init__(self, denoiser: Denoiser, guide: Denoiser, scale: float, uncond: Cond) -> None:
        super().__init__()
        if scale < 1:
            raise ValueError(f"autoguidance scale {scale} is below 1.0: 1.0 turns it off, more than 1.0 guides")
        self.denoiser, self.schedule, self.guide = denoiser, denoiser.schedule, guide
        self.scale, self.uncond = scale, uncond

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The guided estimate of x_0; shapes as in `Denoiser.forward`."""
        return self._guided(self.denoiser(x_t, t, cond), x_t, t, cond)

    def with_features(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, list[Tensor]]:
        x0, features = self.denoiser.with_features(x_t, t, cond)
        return self._guided(x0, x_t, t, cond), features

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        return self.denoiser.features(x_t, t, cond)

    def block_features(self, x_t: Tensor, t: Tensor, cond: Cond, blocks: Sequence[str]) -> list[Tensor]:
        return self.denoiser.block_features(x_t, t, cond, blocks)

    @property
    def feature_channels(self) -> list[int]:
        return self.denoiser.feature_channels

    @property
    def feature_blocks(self) -> list[str]:
        return self.denoiser.feature_blocks

    def _guided(self, x0: Tensor, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if self.scale == 1:
            return x0
        rows = torch.nonzero(~self._unconditional(cond)).flatten()
        if len(rows) == 0:
            return x0
        own = x0[rows]
        worse: Tensor = self.guide(x_t[rows], t[rows], cond_rows(cond, rows))
        return x0.index_copy(0, rows, worse + self.scale * (own - worse))

    def _unconditional(self, cond: Cond) -> Tensor:
        """Mask ``(B,)`` of the rows that hold the unconditional prompt."""
        same = [
            (cond[name] == one.to(cond[name])).reshape(len(cond[name]), -1).all(1) for name, one in self.uncond.items()
        ]
        return torch.stack(same).all(0)


class EmbeddedGuidance(Denoiser):
    """A denoiser whose network embeds the guidance scale, at a fixed scale: one evaluation per call.

    Its network was distilled from a guided teacher over a range of scales (Meng et al. 2023,
    https://arxiv.org/abs/2210.03142, section 3.1), so it needs no unconditional evaluation.

    Args:
        denoiser: a denoiser whose ``embeds_guidance`` is true.
        scale: w.
        interval: guide only where ``low <= t <= high``; everywhere when left out.
    """

    def __init__(self, denoiser: Denoiser, scale: float, interval: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.denoiser, self.schedule, self.scale, self.interval = denoiser, denoiser.schedule, scale, interval

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The estimate of x_0 at that scale; shapes as in `Denoiser.forward`."""
        x0: Tensor = self.denoiser(x_t, t, {**cond, GUIDANCE: scale_at(self.scale, t, self.interval)})
        return x0
