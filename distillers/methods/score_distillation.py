"""The score distillation family: three networks, two turns, and one hook for the loss between the two scores.

The networks are the student G, the frozen teacher (guided x0 estimate F_T) and the fake score (F_S, a copy of the
teacher that tracks the student's distribution). The fake score learns from the student's samples in every iteration;
the student is updated in every ``student_every``-th (the two-time-scale update rule, DMD2,
https://arxiv.org/abs/2405.14867, section 4.2). For a student's image x and ``x_t = alpha_t x + sigma_t eps``:

    student     dm_weight * matching(x, F_S(x_t), F_T(x_t))               defined by each method: `matching`
                + gan_weight * softplus(-D(x_t))                          DMD2, section 4.3
    fake score  w_t ||F_S(x_t) - x||^2                                    denoising score matching
                + discriminator_weight * (softplus(D(x_t)) + softplus(-D(real_t)))

D is a small head on the fake score's bottleneck features. With ``adversary``, a second discriminator (LADD's) also
judges the student's images, on features of several blocks of the frozen teacher (`distillers.adversary`). It is updated
once per student update, and its gradient with respect to the images is scaled to ``adversary_weight`` times that of the
matching loss. A multi-step student is trained on states that it generates itself (backward simulation, DMD2, section
4.5). One student serves several step counts: each iteration draws a count and one of its steps.
"""

from abc import abstractmethod
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distillers.adversary import Adversary
from distillers.critics import Heads, guided_x0
from distillers.losses.adversarial import approximate_r1, discriminator_loss, generator_loss, relative_weight
from distillers.losses.score import denoising_loss, score_weight
from distillers.methods.base import (
    Betas,
    OptimizerSettings,
    Setup,
    Step,
    Trained,
    Turn,
    TurnLoss,
)
from distillers.methods.few_step import RolledOut
from distillers.methods.score_settings import Interval, ScoreDistillationConfig
from distillers.rollout import draw_lognormal_times, draw_noise, draw_times
from weights.denoiser import Cond
from weights.diffusion.schedules import add_noise


@dataclass(frozen=True, kw_only=True)
class Noised:
    """A batch of the student's images, noised, with the estimates of both scores."""

    x: Tensor
    """Images before noising, ``(B, ...)``, with a graph to the student."""
    x_t: Tensor
    t: Tensor
    """``(B,)``."""
    fake_x0: Tensor
    """``F_S(x_t)``; with a graph to x if the method differentiates through the scores."""
    teacher_x0: Tensor
    """``F_T(x_t)``, guided; with a graph to x in the same case."""
    logits: Tensor | None
    """The discriminator's logits, ``(B, heads)``, with a graph to x; at x_t itself if times are shared."""


class ScoreDistillation(RolledOut):
    """See the module docstring. Subclasses define the loss between the scores."""

    config: ScoreDistillationConfig
    differentiates_scores: ClassVar[bool] = False
    """Whether the loss's gradient flows through both scores to x_t, which costs their backward passes."""

    def __init__(self, config: ScoreDistillationConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self._fake_score = setup.new_network(config.fake_score_lora)
        self.fake_score = self._fake_score.denoiser
        self.heads: Heads | None = None
        if config.gan_weight > 0:
            self.critic = self.fake_score if config.gan_features == "fake_score" else self.teacher
            self.heads = Heads(self.critic, setup.latent_shape, setup.uncond, setup.device)
        self.adversary = None if config.adversary is None else Adversary(config.adversary, setup)

    @classmethod
    def needs_pictures(cls, config: ScoreDistillationConfig) -> str | None:
        if config.gan_weight > 0:
            return f"gan_weight {config.gan_weight} compares with real images; set it to 0 to train on prompts alone"
        if config.adversary is not None:
            return "adversary compares with real images; leave it out to train on prompts alone"
        if config.starts_from_pictures:
            return "backward_simulation = false needs real images to noise; set it to true to train on prompts alone"
        return None

    @classmethod
    def needs_eager(cls, config: ScoreDistillationConfig) -> str | None:
        if config.guidance_interval is not None:
            return f"guidance_interval {config.guidance_interval} counts the rows that are guided; leave it out"
        if config.adversary is not None and config.adversary.mismatched_share > 0:
            share = config.adversary.mismatched_share
            return f"adversary.mismatched_share {share} counts the rows that differ; set it to 0"
        return None

    @property
    def fake_score_network(self) -> nn.Module:
        """The fake score's trainable network."""
        return self._fake_score.network

    @abstractmethod
    def matching(self, seen: Noised) -> Tensor:
        """The loss that moves the student's distribution towards the teacher's: a scalar, with a graph to x."""

    def trained(self) -> dict[str, Trained]:
        config = self.config

        def settings(lr: float, betas: Betas) -> OptimizerSettings:
            return OptimizerSettings(
                kind=config.optimizer, lr=lr, betas=betas, weight_decay=config.weight_decay, warmup=config.warmup
            )

        networks = {
            "student": Trained(
                module=self.student.network, optimizer=settings(config.student_lr, config.student_betas), average=True
            ),
            "fake_score": Trained(
                module=self.fake_score_network, optimizer=settings(config.fake_score_lr, config.critic_betas)
            ),
        }
        if self.heads is not None:
            lr = config.head_lr or config.fake_score_lr
            networks["heads"] = Trained(module=self.heads, optimizer=settings(lr, config.critic_betas))
        if self.adversary is not None:
            networks["adversary"] = self.adversary.trained(config.weight_decay, config.warmup)
        return networks

    def turns(self, iteration: int) -> list[Turn]:
        turns = [self.critic_turn()]
        if (iteration + 1) % self.config.student_every == 0:
            turns.insert(0, Turn(name="student", trains=("student",)))
            if self.adversary is not None:
                turns.append(Turn(name="adversary", trains=("adversary",)))
        return turns

    def critic_turn(self) -> Turn:
        """The turn of the fake score and the discriminator."""
        return Turn(name="critic", trains=("fake_score", "heads") if self.heads is not None else ("fake_score",))

    def branch(self, iteration: int, shared: Callable[[Turn], torch.Generator]) -> Hashable:
        """For each turn that generates images, the step it trains, as the times and sampler that lead to it."""
        turns = self.turns(iteration)
        if self.config.share_samples and turns[0].name == "student":
            turns = turns[:1]
        return tuple(
            (turn.name, self._way(*self._draw_step(shared(turn)))) for turn in turns if turn.name != "adversary"
        )

    def loss(self, turn: Turn, step: Step) -> TurnLoss:
        if turn.name == "adversary":
            return self._adversary_loss(step)
        return self._student_loss(step) if turn.name == "student" else self._critic_loss(step)

    def _noised(self, x: Tensor, t: Tensor, step: Step) -> Tensor:
        return add_noise(self.teacher.schedule, x, draw_noise(tuple(x.shape), step.local, x.device), t)

    def _times(self, uniform: Interval, levels: Interval | None, step: Step, device: torch.device) -> Tensor:
        """Times ``(B,)``: uniform in an interval, or with a normal ln(sigma / alpha) of that (mean, std)."""
        if levels is None:
            return draw_times(step.size, uniform, step.local, device)
        return draw_lognormal_times(step.size, *levels, self.teacher.schedule, step.local, device)

    def _shares_pass(self) -> bool:
        """Whether one pass of the fake score yields both its estimate and the discriminator's features."""
        return self.heads is not None and self.config.share_times and self.critic is self.fake_score

    def _features(
        self, x: Tensor, shared: tuple[Tensor, Tensor], cond: Cond, step: Step
    ) -> tuple[list[Tensor], Tensor]:
        """The discriminator's features of x, and their times: the score losses' (x_t, t), or newly drawn ones."""
        x_t, t = shared
        if not self.config.share_times:
            t = draw_times(step.size, self.config.gan_times, step.local, x.device)
            x_t = self._noised(x, t, step)
        return self.critic.features(x_t, t, cond), t

    def _see(self, x: Tensor, cond: Cond, step: Step) -> Noised:
        """Noises the images, and computes both scores' estimates and the discriminator's logits."""
        config = self.config
        t = self._times(config.dm_times, config.dm_levels, step, x.device)
        x_t = self._noised(x, t, step)
        share = self._shares_pass()
        features: list[Tensor] = []
        with nullcontext() if self.differentiates_scores else torch.no_grad():
            teacher_x0 = guided_x0(
                self.teacher, x_t, t, cond, self.setup.uncond, config.guidance_scale, config.guidance_interval
            )
            if not share:
                fake_x0 = self.fake_score(x_t, t, cond)
        if share:
            fake_x0, features = self.fake_score.with_features(x_t, t, cond)
        logits = None
        if self.heads is not None:
            if not share:
                features, _ = self._features(x, (x_t, t), cond, step)
            logits = self.heads(features)
        return Noised(x=x, x_t=x_t, t=t, fake_x0=fake_x0, teacher_x0=teacher_x0, logits=logits)

    def _student_loss(self, step: Step) -> TurnLoss:
        x, cond = self._sample(step)
        if self.config.share_samples:
            step.scratch["samples"] = (x.detach(), cond)
        seen = self._see(x, cond, step)
        matching = self.matching(seen)
        loss = self.config.dm_weight * matching
        metrics = {
            "student/matching": matching,
            "student/score_gap": (seen.fake_x0 - seen.teacher_x0).square().mean().sqrt(),
            "student/mean": x.mean(),
            "student/std": x.std(),
        }
        if self.adversary is not None:
            judged = self.adversary.student_loss(x, cond, step.local)
            loss = loss + self.config.adversary_weight * relative_weight(matching, judged, x) * judged
            step.scratch["judged"] = (x.detach(), cond)
            metrics["student/judged"] = judged
        if seen.logits is not None:
            adversarial = generator_loss(seen.logits)
            loss = loss + self.config.gan_weight * adversarial
            metrics["student/adversarial"] = adversarial
        return TurnLoss(loss=loss, metrics=detached(metrics))

    def _adversary_loss(self, step: Step) -> TurnLoss:
        assert self.adversary is not None, "its turn is there where it is"
        if "judged" not in step.scratch:
            with torch.no_grad():
                step.scratch["judged"] = self._sample(step)
        x, cond = step.scratch["judged"]
        found = self.adversary.critic_loss(x, cond, *step.batch.pictures, step.local)
        return TurnLoss(
            loss=found.loss, metrics={f"adversary/{name.split('/')[1]}": value for name, value in found.metrics.items()}
        )

    def _critic_loss(self, step: Step) -> TurnLoss:
        config = self.config
        if "samples" in step.scratch:
            x, cond = step.scratch["samples"]
        else:
            with torch.no_grad():
                x, cond = self._sample(step)
        t = self._times(config.score_times, config.score_levels, step, x.device)
        x_t = self._noised(x, t, step)
        schedule = self.teacher.schedule
        weight = score_weight(schedule.alpha(t), schedule.sigma(t), config.score_weighting, config.sigma_data)
        share = self._shares_pass()
        features: list[Tensor] = []
        if share:
            x0, features = self.fake_score.with_features(x_t, t, cond)
        else:
            x0 = self.fake_score(x_t, t, cond)
        score = denoising_loss(x0, x, weight)
        loss, metrics = score, {"critic/score": score}
        if self.heads is not None:
            if not share:
                features, t = self._features(x, (x_t, t), cond, step)
            adversarial, seen = self._discriminator_loss(self.heads, self.heads(features), t, step)
            loss = loss + config.discriminator_weight * adversarial
            metrics |= seen
        return TurnLoss(loss=loss, metrics=detached(metrics))

    def _discriminator_loss(
        self, heads: Heads, fake_logits: Tensor, t: Tensor, step: Step
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss and values to log, given its logits for the student's images at times t."""
        real, cond = step.batch.pictures
        real_t = self._noised(real, t[: len(real)], step)
        logits = heads(self.critic.features(real_t, t[: len(real)], cond))
        loss = discriminator_loss(logits, fake_logits)
        metrics = {
            "critic/discriminator": loss,
            "critic/real_logits": logits.mean(),
            "critic/fake_logits": fake_logits.mean(),
        }
        if self.config.r1_weight > 0:
            noise = draw_noise(tuple(real.shape), step.local, real.device)
            disturbed = heads(self.critic.features(real_t + self.config.r1_noise * noise, t[: len(real)], cond))
            penalty = approximate_r1(logits, disturbed)
            loss = loss + self.config.r1_weight * penalty
            metrics["critic/r1"] = penalty
        return loss, metrics


def detached(metrics: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.detach() for name, value in metrics.items()}
