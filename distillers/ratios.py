"""Density ratios from a discriminator, and the settings of methods that weight images by them."""

from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distillers.losses.divergences import Divergence, density_ratio, divergence_weight
from distillers.methods.base import MethodConfig, Setup, Turn
from distillers.methods.score_distillation import ScoreDistillation
from distillers.methods.score_settings import Interval
from distillers.processes import summed


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
    ratio_decay: float = Field(0.99, ge=0, lt=1, description="decay of those averages, and of h's, at each step")
    normalize_weights: bool = Field(
        True, description="divide h by its moving average, so that the step stays as large as without it"
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
    """Density ratios and the weights made of them, relative to their moving averages over earlier steps.

    r is divided by an average for its interval of t, then clamped (as in f-distill's code); h by an average of its own.
    A step of the optimizer first uses the averages, then changes them, by all images of its micro-batches and processes.
    So an image's weight does not depend on how its batch is divided, nor on the batch's other images.
    """

    def __init__(self, config: RatioConfig, device: torch.device) -> None:
        self.config = config
        bins = config.ratio_bins
        self.means = torch.ones(bins, device=device)
        """Average of r in each interval of t, ``(bins,)``."""
        one = torch.ones(1, device=device)
        self.weight_mean = divergence_weight(config.divergence, one)
        """Average of h, ``(1,)``; at first that of ratios of 1."""
        self.noted = torch.zeros(2, bins + 1, device=device)
        """Sums, and numbers of images, since the last step: of r in each interval, and of h."""

    def __call__(self, logits: Tensor | None, t: Tensor) -> Tensor:
        """The normalised ratios ``(B,)``, with the graph of the logits.

        Args:
            logits: ``(B, heads)``.
            t: ``(B,)``.
        """
        assert logits is not None, "the config lets no job without a discriminator through"
        ratio, bins = density_ratio(logits), len(self.means)
        member = torch.nn.functional.one_hot((t * bins).long().clamp(0, bins - 1), bins).to(ratio.dtype)
        self.noted[:, :-1] += torch.stack([(member * ratio.detach().unsqueeze(1)).sum(0), member.sum(0)])
        with torch.autocast(t.device.type, enabled=False):  # which would round the averages to bfloat16
            return (ratio / (member @ self.means)).clamp(*self.config.ratio_range)

    def weights(self, ratio: Tensor) -> Tensor:
        """h of each image ``(B,)``, divided by its average if the config says so; the average receives no gradient.

        Args:
            ratio: normalised, ``(B,)``.
        """
        weight = divergence_weight(self.config.divergence, ratio)
        if not self.config.normalize_weights:
            return weight
        self.noted[0, -1] += weight.detach().sum()
        self.noted[1, -1] += len(weight)
        return weight / self.weight_mean

    def step(self) -> None:
        """Moves the averages towards the means of what was noted since the last step, where there was any."""
        total, count = summed(self.noted)
        seen = total / count.clamp_min(1)
        share = torch.where(count > 0, 1 - self.config.ratio_decay, 0.0)
        # In place, since a captured iteration holds these tensors.
        self.means.lerp_(seen[:-1], share[:-1])
        self.weight_mean.lerp_(seen[-1:], share[-1:])
        self.noted.zero_()


class WithRatios(ScoreDistillation):
    """Mixin for methods of the family that weight images by density ratios; precedes the method among the bases."""

    def __init__(self, config: Any, setup: Setup) -> None:
        super().__init__(config, setup)
        self.ratios = Ratios(config, setup.device)

    def after_step(self, turn: Turn, iteration: int) -> None:
        super().after_step(turn, iteration)
        if "student" in turn.trains:
            self.ratios.step()

    def state(self) -> dict[str, Tensor]:
        ratios = self.ratios
        return {"ratio_means": ratios.means, "ratio_weight_mean": ratios.weight_mean, "ratio_noted": ratios.noted}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for name, value in self.state().items():
            if name in tensors:  # early checkpoints of version 0.1.0 have only the first
                value.copy_(tensors[name])
