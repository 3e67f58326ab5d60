"""f-distill: distribution matching under any f-divergence (Xu et al. 2025, https://arxiv.org/abs/2502.15681).

DMD2 (`distillers.methods.dmd2`, whose networks, turns and losses these are) descends the reverse KL divergence, which
prefers few of the teacher's modes to a picture between them. Another divergence is the same gradient times ``h(r)``,
picture by picture, where r = p / q is how much likelier the teacher's distribution makes the noised picture than the
student's:

    student     grad_x = h(r) (F_S(x_t) - F_T(x_t)) / mean|x - F_T(x_t)|,    r = e^{D(x_t)}

D, DMD2's discriminator, looks at the score losses' own noised pictures (``share_times``), so that r is theirs. As in the
public code r is divided by a moving average of its own, kept for each of ``ratio_bins`` intervals of t, and held within
``ratio_range``; h is divided by its batch mean. The reverse KL's h is 1: with it, this is DMD2.

A departure: r's averages are kept by each process for itself, where the public code keeps one.
"""

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distillers.losses.divergences import Divergence, density_ratio, divergence_weight
from distillers.methods.base import Setup
from distillers.methods.dmd2 import DMD2, DMD2Config, Interval


class FDistillConfig(DMD2Config):
    """DMD2's settings, and the divergence's."""

    share_times: bool = Field(
        True, description="show the discriminator the score losses' own noised pictures: ratios are theirs, so always"
    )
    divergence: Divergence = Field("jensen_shannon", description="whose weight h(r) the gradient gets")
    ratio_range: Interval = Field((0.1, 20.0), description="what r is held within")
    ratio_bins: int = Field(10, ge=1, description="intervals of t that have an average of r each")
    ratio_decay: float = Field(0.99, ge=0, lt=1, description="of those averages")
    normalize_weights: bool = Field(True, description="divide h by its batch mean: the step's size stays DMD2's")

    @model_validator(mode="after")
    def _has_ratios(self) -> Self:
        if self.gan_weight == 0 or not self.share_times:
            raise ValueError(
                f"gan_weight {self.gan_weight}, share_times {self.share_times}: ratios come from a discriminator of the "
                "score losses' noised pictures, so gan_weight must be above 0 and share_times on; or use dmd2"
            )
        low, high = self.ratio_range
        if not 0 < low < high:
            raise ValueError(f"ratio_range: {self.ratio_range} must be (low, high) with 0 < low < high")
        return self


class FDistill(DMD2):
    """See the module's text."""

    name = "f_distill"
    Config = FDistillConfig
    config: FDistillConfig

    def __init__(self, config: FDistillConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.ratio_means = torch.ones(config.ratio_bins, device=setup.device)

    def _weight(self, logits: Tensor | None, t: Tensor) -> Tensor:
        assert logits is not None, "the config lets no job without a discriminator through"
        ratio = self._normalized(density_ratio(logits), t).clamp(*self.config.ratio_range)
        weight = divergence_weight(self.config.divergence, ratio)
        return weight / weight.mean() if self.config.normalize_weights else weight

    def _normalized(self, ratio: Tensor, t: Tensor) -> Tensor:
        """Each r over its bin's average, which has taken it in."""
        bins = len(self.ratio_means)
        member = torch.nn.functional.one_hot((t * bins).long().clamp(0, bins - 1), bins).to(ratio.dtype)
        count = member.sum(0)
        seen = (member * ratio.unsqueeze(1)).sum(0) / count.clamp_min(1)
        decay = torch.where(count > 0, self.config.ratio_decay, 1.0)
        self.ratio_means = decay * self.ratio_means + (1 - decay) * seen
        return ratio / (member @ self.ratio_means)

    def state(self) -> dict[str, Tensor]:
        return {"ratio_means": self.ratio_means}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.ratio_means = tensors["ratio_means"].to(self.setup.device)
