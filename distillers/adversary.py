"""A discriminator: a frozen network that looks at pictures, and a small head on each of its feature maps.

LADD (Sauer et al. 2024, https://arxiv.org/abs/2403.12015) takes the teacher itself for the frozen denoiser: its features
tell pictures apart at every noise level, and know their prompts. Heads give a logit for every position of their
block's output, so that pictures are judged part by part. With x the student's picture and y a real one, x_t and y_t noised
to times whose ln(sigma_t / alpha_t) is normal, and D the logits:

    student  -mean D(x_t | c)                                                                         hinge
    heads    mean max(0, 1 - D(y_t | c)) + (1 - m) mean max(0, 1 + D(x_t | c)) + m mean max(0, 1 + D(y_t | c'))

c' is another picture's condition: pictures that do not show what was asked for count as fakes, which teaches the heads to
look at the prompt (SANA-Sprint, https://arxiv.org/abs/2503.09641, in its public code). They are a share m of the fakes.

The head is that code's, which has StyleGAN-T's (https://arxiv.org/abs/2301.09515): a 1x1 block, a residual
block with nine taps, and a 1x1 convolution to one channel, whose spectral norm is 1. Departures from it:

- The nine taps lie in a row of tokens there, in a 3x3 square of the map here.
- Blocks normalise each picture by itself (GroupNorm), where the public code does it over eight pictures of the batch: a
  picture's logit does not depend on which others it came with.
- The public code divides every convolution by its spectral norm. All but the last have a normalisation behind them that
  undoes any such factor, so only the last is divided here. It has one output channel, and a matrix of one row is its own
  singular vector: the spectral norm is its length, exactly, with no power iteration whose state a checkpoint would need.
- Every head weighs the same. A UNet's maps differ in size, and a mean over all positions would be the largest map's.
- Pairs whose two pictures have the same condition are no mismatch, and are left out of the fakes.

With ``features`` the frozen network is one that was trained on pictures (`distillers.backbones`), and looks at decoded ones
without noise, as in ADD (https://arxiv.org/abs/2311.17042): then x_t is x, and the heads are told no prompt. What was asked
for is the business of a matcher (``matching_weight``), a product of picture and prompt in a space of its own, as in
projection discriminators (https://arxiv.org/abs/1802.05637). It learns from real pictures alone, under their own prompts and
others', so that it can be asked about prompts that nobody has a picture of:

    student  ... - w mean M(x, c)
    matcher  mean max(0, 1 - M(y, c)) + mean max(0, 1 + M(y, c'))

Heads are told time and prompt by the features alone, as in SANA-Sprint's code; LADD tells them once more.
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
from weights.denoiser import Cond, cond_cat, cond_repeat, cond_rows

LABELS = 64
"""Classes that a matcher tells apart where conditions are labels."""
Look = tuple[Tensor, Tensor, Cond]
"""What the discriminator is shown: ``x_t (B, ...)``, ``t (B,)`` and B rows of conditions."""


class UnitConv(nn.Conv2d):
    """A 1x1 convolution to one channel, divided by its spectral norm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """``(B, 1, h, w)`` for ``(B, channels, h, w)``."""
        return F.conv2d(features, F.normalize(self.weight, dim=1), self.bias)


def _block(channels: int, kernel: int) -> nn.Sequential:
    groups = math.gcd(channels // 8, 32) if channels % 8 == 0 else 1  # 8 channels or more: maps may have one position
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel, padding=kernel // 2), nn.GroupNorm(groups, channels), nn.LeakyReLU(0.2)
    )


class LatentHead(nn.Module):
    """A logit for every position of one feature map.

    Args:
        channels: C.
        size: the map's shorter side; taps of the kernel that could only ever meet padding are left out.
        kernel: side of the residual block's kernel, odd.
    """

    def __init__(self, channels: int, size: int, kernel: int = 3) -> None:
        super().__init__()
        self.enter = _block(channels, 1)
        self.around = _block(channels, min(kernel, 2 * size - 1))
        self.leave = UnitConv(channels)

    def forward(self, features: Tensor) -> Tensor:
        """``(B, 1, h, w)`` float32 for ``(B, C, h, w)``; larger means 'real'."""
        hidden = self.enter(features.to(self.leave.weight.dtype))
        logits: Tensor = self.leave((hidden + self.around(hidden)) / math.sqrt(2))
        return logits.float()


class Matcher(nn.Module):
    """How well pictures show what was asked for: a product of both in a space of their own.

    Args:
        channels: of each feature map.
        prompt: length of `prompt_vectors`.
        width: of the space.
    """

    def __init__(self, channels: list[int], prompt: int, width: int = 128) -> None:
        super().__init__()
        self.of_picture = nn.Sequential(nn.LayerNorm(sum(channels)), nn.Linear(sum(channels), width))
        self.of_prompt = nn.Sequential(nn.LayerNorm(prompt), nn.Linear(prompt, width))
        self.width = width

    def forward(self, maps: list[Tensor], cond: Cond) -> Tensor:
        """``(B,)`` float32 for feature maps ``(B, C, h, w)``; larger means that they belong together."""
        pooled = torch.cat([each.float().mean(dim=(2, 3)) for each in maps], dim=1)
        pictures, prompts = self.of_picture(pooled), self.of_prompt(prompt_vectors(cond))
        logits: Tensor = (pictures * prompts).sum(1) / math.sqrt(self.width)
        return logits.float()


def prompt_vectors(cond: Cond) -> Tensor:
    """One vector a prompt, ``(B, D)`` float32: text states ``(B, L, D)`` by their mean, labels ``(B,)`` one-hot."""

    def vector(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return F.one_hot(value % LABELS, LABELS).float()
        return value.float().mean(dim=1) if value.ndim == 3 else value.float()

    return torch.cat([vector(value) for value in cond.values()], dim=1)


class Adversary:
    """The frozen critic with its heads, and both sides' losses."""

    def __init__(self, config: AdversaryConfig, setup: Setup) -> None:
        """
        Args:
            config: the settings.
            setup: whose teacher is the critic, or whose pictures the critic looks at.

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
        """The heads, for `Method.trained`."""
        config = self.config
        optimizer = OptimizerSettings(
            lr=config.head_lr, betas=config.head_betas, weight_decay=weight_decay, warmup=warmup
        )
        if self.matcher is None:
            return Trained(module=self.heads, optimizer=optimizer)
        return Trained(module=nn.ModuleDict({"heads": self.heads, "matcher": self.matcher}), optimizer=optimizer)

    def student_loss(self, x: Tensor, cond: Cond, generator: torch.Generator) -> Tensor:
        """How fake the student's pictures look; its gradient reaches x through the frozen critic.

        Args:
            x: the student's pictures ``(B, ...)``, with their graph.
            cond: what they were asked to show.
            generator: draws times and noise.
        """
        t = self.eye.times(len(x), generator)
        maps = self.eye.maps(self.eye.shown(x, t, generator), t, self._told(cond, len(x)))
        loss = _over_heads(hinge_generator_loss, self._logits(maps))
        if self.matcher is not None:
            loss = loss + self.config.matching_weight * hinge_generator_loss(self.matcher(maps, cond))
        return loss

    def critic_loss(self, x: Tensor, cond: Cond, real: Tensor, real_cond: Cond, generator: torch.Generator) -> TurnLoss:
        """The heads' loss on as many real pictures as the student's, at the same times.

        Args:
            x: the student's pictures ``(B, ...)``, without a graph.
            cond: what they were asked to show.
            real: pictures ``(B, ...)``.
            real_cond: what these show.
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
        """The matcher's loss on real pictures under their own prompts and their neighbours', and what to log."""
        others = {name: value.roll(1, 0) for name, value in cond.items()}
        own, wrong = matcher(maps, cond), matcher(maps, others)
        counts = _differs(cond).to(wrong.dtype)
        loss = F.relu(1 - own).mean() + (F.relu(1 + wrong) * counts).sum() / counts.sum().clamp_min(1)
        return loss, {"critic/matching": loss, "critic/own_prompts": own.mean(), "critic/other_prompts": wrong.mean()}

    def _told(self, cond: Cond, count: int) -> Cond:
        """What the critic is told of so many pictures: what was asked for, or the empty prompt."""
        return cond if self.config.prompted else cond_repeat(self.setup.uncond, count)

    def _logits(self, maps: list[Tensor]) -> list[Tensor]:
        return [head(each) for head, each in zip(self.heads, maps, strict=True)]

    def _all_maps(self, shown: dict[str, Look]) -> dict[str, list[Tensor]]:
        """The critic's feature maps of each batch, in one evaluation of it, which needs no graph here."""
        x_t, t, conds = zip(*shown.values(), strict=True)
        with torch.no_grad():
            features = self.eye.maps(torch.cat(x_t), torch.cat(t), cond_cat(conds))
        sizes = [len(times) for times in t]
        parts = [each.split(sizes) for each in features]
        return dict(zip(shown, (list(maps) for maps in zip(*parts, strict=True)), strict=True))


def mismatched_rows(cond: Cond) -> Tensor:
    """Rows whose condition is not that of the row before (the last, for the first): int64, ``(at most B,)``."""
    return _differs(cond).nonzero().flatten()


def _differs(cond: Cond) -> Tensor:
    """Whether a row's condition is not that of the row before (the last, for the first): bool, ``(B,)``."""
    differs = [(value != value.roll(1, 0)).reshape(len(value), -1).any(dim=1) for value in cond.values()]
    return torch.stack(differs).any(dim=0)


def _over_heads(loss: Callable[..., Tensor], *logits: list[Tensor]) -> Tensor:
    """The mean over heads of their losses: maps of all sizes weigh the same."""
    return torch.stack([loss(*each) for each in zip(*logits, strict=True)]).mean()
