"""Density ratios from a discriminator, and the settings of methods that weight images by them."""

from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distillers.losses.divergences import Divergence, density_ratio
from distillers.methods.base import MethodConfig, Setup
from distillers.methods.score_distillation import ScoreDistillation
from distillers.methods.score_settings import Interval
from distillers.processes import place, summed


class RatioConfig(MethodConfig):
    """Settings of the divergence, as a mixin for methods of the score distillation family."""

    gan_weight: float = Field(
        1e-3, gt=0, description="weight of the student's adversarial loss; its discriminator provides the ratios"
    )
    share_times: bool = Field(
        True, description="always true: the ratios are those of the score losses' own noised images"
    )
    divergence: Divergence = Field(
        "jensen_shannon",
        description="f-divergence whose h(r) weights the gradient: a name, or (a, b) of h(r) = r^a (1 + r)^b",
    )
    ratio_range: Interval = Field((0.1, 20.0), description="range to which r is clamped")
    ratio_bins: int = Field(10, ge=1, description="intervals of t, each with its own moving average of r")
    ratio_decay: float = Field(0.99, ge=0, lt=1, description="decay of those averages")
    normalize_weights: bool = Field(
        True,
        description="divide h by its mean over the batch of all processes, so that the step stays as large as without it; "
        "a small batch takes part of the divergence away with it (about a fifth at 8 images), and one image all of it",
    )

    @model_validator(mode="after")
    def _has_ratios(self) -> Self:
        if not self.share_times:
            raise ValueError(
                "share_times: must be true, since the ratios are those of the score losses' own noised images"
            )
        low, high = self.ratio_range
        if not 0 < low < high:
            raise ValueError(f"ratio_range: {self.ratio_range} must be (low, high) with 0 < low < high")
        return self


class Ratios:
    """r of each image, divided by a moving average for its interval of t, then clamped (as in f-distill's code).

    All processes of a job share the same averages, over all of their images.
    """

    def __init__(self, config: RatioConfig, device: torch.device) -> None:
        self.config = config
        self.means = torch.ones(config.ratio_bins, device=device)

    def __call__(self, logits: Tensor | None, t: Tensor) -> Tensor:
        """Updates the averages, and returns the normalised ratios ``(B,)``, with the graph of the logits.

        Args:
            logits: ``(B, heads)``.
            t: ``(B,)``.
        """
        assert logits is not None, "the config lets no job without a discriminator through"
        ratio, bins = density_ratio(logits), len(self.means)
        member = torch.nn.functional.one_hot((t * bins).long().clamp(0, bins - 1), bins).to(ratio.dtype)
        total, count = summed(torch.stack([(member * ratio.detach().unsqueeze(1)).sum(0), member.sum(0)]))
        seen = total / count.clamp_min(1)
        decay = torch.where(count > 0, self.config.ratio_decay, 1.0)
        self.means.mul_(decay).add_((1 - decay) * seen)  # in place, since a captured iteration holds this tensor
        with torch.autocast(t.device.type, enabled=False):  # which would round the averages to bfloat16
            return (ratio / (member @ self.means)).clamp(*self.config.ratio_range)


def normalized(weight: Tensor) -> Tensor:
    """``h / mean h`` over the images of all processes; the mean receives no gradient.

    Args:
        weight: h, ``(B,)``.

    Raises:
        ValueError: there is one image, whose weight would be 1 under any divergence.
    """
    weights = weight.detach()
    processes = place()[1]
    if len(weights) * processes == 1:
        raise ValueError(
            "normalize_weights: true divides the weight of a batch of 1 image by itself, so that the divergence would have "
            "no effect: raise train.batch_size (micro-batches are normalised separately), or set it to false"
        )
    mean = weights.mean()
    return weight / (mean if processes == 1 else summed(mean.clone()) / processes)


class WithRatios(ScoreDistillation):
    """Mixin for methods of the family that weight images by density ratios; precedes the method among the bases."""

    def __init__(self, config: Any, setup: Setup) -> None:
        super().__init__(config, setup)
        self.ratios = Ratios(config, setup.device)

    def state(self) -> dict[str, Tensor]:
        return {"ratio_means": self.ratios.means}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.ratios.means.copy_(tensors["ratio_means"])
