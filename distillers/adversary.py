"""A discriminator: a frozen feature network with a small head on each of its feature maps.

LADD (Sauer et al. 2024, https://arxiv.org/abs/2403.12015) uses the teacher itself as the frozen network: its features
are discriminative at every noise level, and conditioned on the prompt. Heads give one logit per position of their
feature map, so that images are judged locally. With x the student's image, y a real one, x_t and y_t these noised to
times whose ln(sigma_t / alpha_t) is normal, and D the logits:

    student  -mean D(x_t | c)                                                                         hinge
    heads    mean max(0, 1 - D(y_t | c)) + (1 - m) mean max(0, 1 + D(x_t | c)) + m mean max(0, 1 + D(y_t | c'))

c' is the condition of another image. Mismatched image-prompt pairs, a share m of the fakes, teach the heads to use the
prompt (SANA-Sprint, https://arxiv.org/abs/2503.09641, in its public code).

The head is that code's, taken from StyleGAN-T (https://arxiv.org/abs/2301.09515): a 1x1 block, a residual block with
nine taps, and a 1x1 convolution to one channel with spectral norm 1. Departures from it:

- The nine taps form a 3x3 square of the feature map; there, a row of nine tokens.
- Blocks normalise each image separately (GroupNorm), where the public code normalises over eight images of the batch,
  so that the logit of an image does not depend on the rest of its batch.
- The public code divides every convolution by its spectral norm. Each but the last is followed by a normalisation,
  which cancels any such factor, so only the last is divided here. It has one output channel, and the spectral norm of a
  one-row matrix is its length. This is exact, and needs no power iteration whose state a checkpoint would have to hold.
- Every head has the same weight. A UNet's maps differ in size, and a mean over all positions would be dominated by the
  largest.
- Pairs of images with the same condition are not a mismatch, and are left out of the fakes.

With ``features``, the frozen network is one pretrained on images (`distillers.backbones`), and sees decoded images
without noise, as in ADD (https://arxiv.org/abs/2311.17042): x_t is then x, and the heads are not conditioned on the
prompt. Prompt alignment is left to a matcher (``matching_weight``), the inner product of image and prompt in a learned
space, as in projection discriminators (https://arxiv.org/abs/1802.05637). It learns only from real images, with their
own prompts and with others', so that it also applies to prompts for which there is no image:

    student  ... - w mean M(x, c)
    matcher  mean max(0, 1 - M(y, c)) + mean max(0, 1 + M(y, c'))

Time and prompt reach the heads only through the features, as in SANA-Sprint's code; LADD conditions the heads directly
as well.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillers.adversary_settings import AdversaryConfig
from distillers.eyes import PictureEye, TeacherEye
from distillers.losses.adversarial import approximate_r1, hinge_discriminator_loss, hinge_generator_loss
from distillers.methods.base import OptimizerSettings, Setup, Trained, TurnLoss
from distillers.rollout import draw_noise
from weights.denoiser import GUIDANCE, Cond, cond_cat, cond_repeat, cond_rows

LABELS = 64
"""Number of classes that a matcher distinguishes if conditions are labels."""
Look = tuple[Tensor, Tensor, Cond]
"""An input of the discriminator: ``x_t (B, ...)``, ``t (B,)`` and B rows of conditions."""


class UnitConv(nn.Conv2d):
    """A 1x1 convolution to one channel, with its weight divided by its spectral norm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Returns ``(B, 1, h, w)`` for ``(B, channels, h, w)``."""
        return F.conv2d(features, F.normalize(self.weight, dim=1), self.bias)


def _block(channels: int, kernel: int) -> nn.Sequential:
    groups = math.gcd(channels // 8, 32) if channels % 8 == 0 else 1  # 8 or more channels: a map may be 1x1
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel, padding=kernel // 2), nn.GroupNorm(groups, channels), nn.LeakyReLU(0.2)
    )


class LatentHead(nn.Module):
    """A logit for every position of one feature map.

    Args:
        channels: C.
        size: the map's shorter side; kernel taps that would always fall into the padding are left out.
        kernel: side of the residual block's kernel, odd.
    """

    def __init__(self, channels: int, size: int, kernel: int = 3) -> None:
        super().__init__()
        self.enter = _block(channels, 1)
        self.around = _block(channels, min(kernel, 2 * size - 1))
        self.leave = UnitConv(channels)

    def forward(self, features: Tensor) -> Tensor:
        """Returns ``(B, 1, h, w)`` float32 for ``(B, C, h, w)``; larger means real."""
        hidden = self.enter(features.to(self.leave.weight.dtype))
        logits: Tensor = self.leave((hidden + self.around(hidden)) / math.sqrt(2))
        return logits.float()


class Matcher(nn.Module):
    """Prompt alignment of images: an inner product of image and prompt features in a learned space.

    Args:
        channels: of each feature map.
        prompt: length of the vectors from `prompt_vectors`.
        width: dimension of the space.
    """

    def __init__(self, channels: list[int], prompt: int, width: int = 128) -> None:
        super().__init__()
        self.of_picture = nn.Sequential(nn.LayerNorm(sum(channels)), nn.Linear(sum(channels), width))
        self.of_prompt = nn.Sequential(nn.LayerNorm(prompt), nn.Linear(prompt, width))
        self.width = width

    def forward(self, maps: list[Tensor], cond: Cond) -> Tensor:
        """Returns ``(B,)`` float32 for feature maps ``(B, C, h, w)``; larger means better aligned."""
        pooled = torch.cat([each.float().mean(dim=(2, 3)) for each in maps], dim=1)
        pictures, prompts = self.of_picture(pooled), self.of_prompt(prompt_vectors(cond))
        logits: Tensor = (pictures * prompts).sum(1) / math.sqrt(self.width)
        return logits.float()


def prompt_vectors(cond: Cond) -> Tensor:
    """One vector per prompt, ``(B, D)`` float32: the mean of text states ``(B, L, D)``, or labels ``(B,)`` one-hot.

    If the states come with an attention mask ``(B, L)``, bool, the mean is over the tokens where it is True. A guidance
    scale is no part of a prompt.
    """
    mask = next((value for value in cond.values() if value.dtype == torch.bool), None)

    def vector(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return F.one_hot(value % LABELS, LABELS).float()
        if value.ndim == 3 and mask is not None:
            counts = mask.unsqueeze(-1).float()
            return (value.float() * counts).sum(dim=1) / counts.sum(dim=1).clamp_min(1)
        return value.float().mean(dim=1) if value.ndim == 3 else value.float()

    prompts = [value for name, value in cond.items() if name != GUIDANCE and value is not mask]
    return torch.cat([vector(value) for value in prompts], dim=1)


class Adversary:
    """The frozen feature network with its heads, and the losses of both sides."""

    def __init__(self, config: AdversaryConfig, setup: Setup) -> None:
        """
        Args:
            config: the settings.
            setup: provides the teacher as the feature network, or decodes images for a pretrained one.

        Raises:
            Unavailable, ValueError: see `TeacherEye` and `PictureEye`.
        """
        self.config, self.setup = config, setup
        self.eye: TeacherEye | PictureEye
        if config.features is None:
            self.eye = TeacherEye(config, setup)
        else:
            self.eye = PictureEye(config.features, config.feature_size, setup)
        with torch.no_grad():
            x_t = torch.zeros(1, *setup.latent_shape, device=setup.device)
            maps = self.eye.maps(x_t, torch.ones(1, device=setup.device), setup.uncond)
        heads = [LatentHead(each.shape[1], min(each.shape[2:]), config.head_kernel) for each in maps]
        self.heads = nn.ModuleList(heads).to(setup.device)
        self.matcher: Matcher | None = None
        if config.matching_weight > 0:
            length = prompt_vectors(setup.uncond).shape[1]
            self.matcher = Matcher([each.shape[1] for each in maps], length).to(setup.device)

    def trained(self, weight_decay: float, warmup: int) -> Trained:
        """The heads (and the matcher), for `Method.trained`."""
        config = self.config
        optimizer = OptimizerSettings(
            lr=config.head_lr, betas=config.head_betas, weight_decay=weight_decay, warmup=warmup
        )
        if self.matcher is None:
            return Trained(module=self.heads, optimizer=optimizer)
        return Trained(module=nn.ModuleDict({"heads": self.heads, "matcher": self.matcher}), optimizer=optimizer)

    def student_loss(self, x: Tensor, cond: Cond, generator: torch.Generator) -> Tensor:
        """The student's adversarial loss; its gradient reaches x through the frozen feature network.

        Args:
            x: the student's images ``(B, ...)``, with a graph.
            cond: their conditions.
            generator: draws times and noise.
        """
        t = self.eye.times(len(x), generator)
        maps = self.eye.maps(self.eye.shown(x, t, generator), t, self._told(cond, len(x)))
        loss = _over_heads(hinge_generator_loss, self._logits(maps))
        if self.matcher is not None:
            loss = loss + self.config.matching_weight * hinge_generator_loss(self.matcher(maps, cond))
        return loss

    def critic_loss(self, x: Tensor, cond: Cond, real: Tensor, real_cond: Cond, generator: torch.Generator) -> TurnLoss:
        """The heads' loss on equally many real images and student's images, at the same times.

        Args:
            x: the student's images ``(B, ...)``, without a graph.
            cond: their conditions.
            real: images ``(B, ...)``.
            real_cond: their conditions.
            generator: draws times and noise.
        """
        config, t, asked = self.config, self.eye.times(len(x), generator), real_cond
        cond, real_cond = self._told(cond, len(x)), self._told(real_cond, len(real))
        real_t = self.eye.shown(real, t, generator)
        shown: dict[str, Look] = {"fake": (self.eye.shown(x, t, generator), t, cond), "real": (real_t, t, real_cond)}
        rows = mismatched_rows(real_cond) if config.mismatched_share > 0 else t.new_empty(0, dtype=torch.int64)
        if len(rows) > 0:
            others = self.eye.shown(real.roll(1, 0)[rows], t[rows], generator)
            shown["mismatched"] = (others, t[rows], cond_rows(real_cond, rows))
        if config.r1_weight > 0:
            noise = draw_noise(tuple(real.shape), generator, real.device)
            shown["disturbed"] = (real_t + config.r1_noise * noise, t, real_cond)
        maps = self._all_maps(shown)
        logits = {name: self._logits(own) for name, own in maps.items()}
        loss = _over_heads(hinge_discriminator_loss, logits["real"], logits["fake"])
        if "mismatched" in logits:
            share = config.mismatched_share * len(rows) / len(x)
            wrong = _over_heads(hinge_discriminator_loss, logits["real"], logits["mismatched"])
            loss = (1 - share) * loss + share * wrong
        metrics = {"critic/discriminator": loss}
        for name in ("real", "fake", "mismatched"):
            if name in logits:
                metrics[f"critic/{name}_logits"] = _over_heads(torch.mean, logits[name])
        if "disturbed" in logits:
            metrics["critic/r1"] = _over_heads(approximate_r1, logits["real"], logits["disturbed"])
            loss = loss + config.r1_weight * metrics["critic/r1"]
        if self.matcher is not None:
            matching, seen = self._matching_loss(self.matcher, maps["real"], asked)
            loss, metrics = loss + matching, metrics | seen
        return TurnLoss(loss=loss, metrics={name: value.detach() for name, value in metrics.items()})

    @staticmethod
    def _matching_loss(matcher: Matcher, maps: list[Tensor], cond: Cond) -> tuple[Tensor, dict[str, Tensor]]:
        """The matcher's loss on real images with their own prompts and with their neighbours', and values to log."""
        others = {name: value.roll(1, 0) for name, value in cond.items()}
        own, wrong = matcher(maps, cond), matcher(maps, others)
        counts = _differs(cond).to(wrong.dtype)
        loss = F.relu(1 - own).mean() + (F.relu(1 + wrong) * counts).sum() / counts.sum().clamp_min(1)
        return loss, {"critic/matching": loss, "critic/own_prompts": own.mean(), "critic/other_prompts": wrong.mean()}

    def _told(self, cond: Cond, count: int) -> Cond:
        """The conditions that the feature network gets: the given ones, or ``count`` rows of the empty prompt."""
        return cond if self.config.prompted else cond_repeat(self.setup.uncond, count)

    def _logits(self, maps: list[Tensor]) -> list[Tensor]:
        return [head(each) for head, each in zip(self.heads, maps, strict=True)]

    def _all_maps(self, shown: dict[str, Look]) -> dict[str, list[Tensor]]:
        """The feature maps of each batch, from one evaluation of the network; no graph is needed here."""
        x_t, t, conds = zip(*shown.values(), strict=True)
        with torch.no_grad():
            features = self.eye.maps(torch.cat(x_t), torch.cat(t), cond_cat(conds))
        sizes = [len(times) for times in t]
        parts = [each.split(sizes) for each in features]
        return dict(zip(shown, (list(maps) for maps in zip(*parts, strict=True)), strict=True))


def mismatched_rows(cond: Cond) -> Tensor:
    """Rows whose condition differs from that of the previous row (cyclically): int64, ``(at most B,)``."""
    return _differs(cond).nonzero().flatten()


def _differs(cond: Cond) -> Tensor:
    """Whether each row's condition differs from that of the previous row (cyclically): bool, ``(B,)``."""
    differs = [(value != value.roll(1, 0)).reshape(len(value), -1).any(dim=1) for value in cond.values()]
    return torch.stack(differs).any(dim=0)


def _over_heads(loss: Callable[..., Tensor], *logits: list[Tensor]) -> Tensor:
    """The mean of the heads' losses: maps of all sizes have the same weight."""
    return torch.stack([loss(*each) for each in zip(*logits, strict=True)]).mean()
