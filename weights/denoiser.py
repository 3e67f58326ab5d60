"""Denoisers: networks wrapped as ``D(x_t, t, cond) -> x0``, whatever they predict themselves.

Everything above the families (losses, samplers, methods, the engine) deals only in x0. The project's conventions are
``x_t = alpha_t x_0 + sigma_t eps``, t in [0, 1], and t = 1 is noise; a guidance scale of 1.0 is off.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from weights.diffusion.schedules import Schedule

Cond = Mapping[str, Tensor]
"""What an image is conditioned on: named tensors, each with the batch as its first dimension."""
GUIDANCE = "guidance_scale"
"""Name of the condition ``(B,)`` with the guidance scale, for networks that embed it."""


class Denoiser(nn.Module, ABC):
    """A network that estimates ``E[x_0 | x_t, cond]``."""

    schedule: Schedule

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Estimate x_0.

        Args:
            x_t: noisy latents, ``(B, ...)``.
            t: times in [0, 1], ``(B,)``; 1 is noise.
            cond: conditions with B rows.

        Returns:
            ``(B, ...)``, float32.
        """

    def with_features(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, list[Tensor]]:
        """The estimate, and inner features ``[(B, C, h, w), ...]`` for a discriminator's heads, in one evaluation.

        Raises:
            TypeError: this denoiser has no inner features.
        """
        raise TypeError(f"{type(self).__name__} has no inner features, so it cannot have a discriminator head")

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """The features of `with_features` alone; overridden by networks that can stop early to save work."""
        return self.with_features(x_t, t, cond)[1]

    @property
    def feature_channels(self) -> list[int]:
        """Channels of each tensor that `with_features` returns; empty if there are none."""
        return []

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network embeds the guidance scale, ``cond[GUIDANCE]``, and needs no unconditional evaluation."""
        return False

    @property
    def feature_blocks(self) -> list[str]:
        """Names of the blocks that `block_features` can read, in execution order; empty if there are none."""
        return []

    def block_features(self, x_t: Tensor, t: Tensor, cond: Cond, blocks: Sequence[str]) -> list[Tensor]:
        """Outputs of several blocks, ``[(B, C, h, w), ...]``, in one evaluation, which may stop after the last of them.

        Args:
            x_t: noisy latents, ``(B, ...)``.
            t: times, ``(B,)``.
            cond: conditions with B rows.
            blocks: distinct names from `feature_blocks`, in that order, which is also the order of the features.

        Raises:
            TypeError: this denoiser has no inner features.
        """
        raise TypeError(f"{type(self).__name__} has no inner features, so it cannot have discriminator heads")


def cond_rows(cond: Cond, rows: Tensor | slice) -> dict[str, Tensor]:
    """Select rows of every tensor."""
    return {name: tensor[rows] for name, tensor in cond.items()}


def cond_cat(conds: Sequence[Cond]) -> dict[str, Tensor]:
    """Concatenate several conditions into one batch; all must have the same names."""
    return {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}


def cond_repeat(cond: Cond, count: int) -> dict[str, Tensor]:
    """Repeat each row ``count`` times, in order."""
    return {name: tensor.repeat_interleave(count, dim=0) for name, tensor in cond.items()}


def cond_to(cond: Cond, device: torch.device | str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Move the conditions to a device, and floating-point tensors to ``dtype`` if one is given."""
    return {name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in cond.items()}
