"""TSCD: trajectory-segmented consistency distillation, as in Hyper-SD and PCM.

Hyper-SD (Ren et al. 2024, https://arxiv.org/abs/2404.13686); phased consistency models, PCM (Wang et al. 2024,
https://arxiv.org/abs/2405.18407).

Consistency distillation (`distillers.methods.consistency`, whose solver, target and settings are used here) predicts
the clean image from every state of a trajectory. Here the trajectory is cut into K segments
(`distillers.losses.trajectories`), and the student predicts only the state at the clean end e of the current segment:
an easier task, whose student generates in K deterministic steps. K falls in stages, 8, 4, 2, 1; with one segment this
is consistency distillation.

    x_t = alpha_t x + sigma_t eps,  t = t_n             x a real image, n uniform in 1..solver_steps
    x_s = DDIM(x_t, D_T(x_t, t; w), t -> s)             s = t_{n - skip}, but not below e
    ours = DDIM(x_t, f(x_t, t), t -> e)                 at e = 0, f itself
    target = DDIM(x_s, f^-(x_s, s), s -> e),  x_s itself where s = e
    loss = d(ours / |e|, target / |e|),  |e| = sqrt(alpha_e^2 + sigma_e^2)
           - gan_weight D(ours_u)                       u uniform in the segment, (e, its upper edge]
    heads: max(0, 1 - D(target_u)) + max(0, 1 + D(ours_u))

f^- is the student itself without gradient (as in PCM's public code), or its moving average (``target_decay``). D
compares the state that the student jumps to with its target, both noised further from e to u by the forward process. It
consists of heads on features of the frozen teacher, which are conditioned on u and the prompt. Student and heads have
one turn each, on the same pair of states; with ``gan_weight = 0`` there are no heads and no second turn.

|e| is 1 on variance-preserving schedules, as in both papers. Elsewhere it makes the loss that of the
variance-preserving schedule with the same SNRs. The weights of segments and the meaning of the pseudo-Huber constant
are then the same in EDM, whose states reach a size of 80, as in the other schedules.

Hyper-SD's next stages, human feedback and score distillation for one step, are other jobs that ``start`` from this
job's student. A student of one segment generates with the consistency sampler, which is TCD's at eta = 1 (Hyper-SD's
choice for its unified LoRA); "ddim" schedules lower eta. A student of K > 1 segments must stop at the end of each
segment: its schedules are "ddim" and include the segments' upper edges. Before the job's last stage, the student has
more segments than its schedules may have steps; this affects the sample sheets, and the published student if the job
ends early. The metric ``student/segments`` shows the current number.

Departures from PCM's public code: the student's adversarial loss is -D, not max(0, 1 - D). The heads are DMD2's, on the
teacher's bottleneck, not four on every block. D's turn reuses the pair of the student's turn instead of a batch of its
own. The guidance scale is fixed, where PCM draws it. u is not on the grid of native timesteps, and the boundary e = 0
is the clean image, not the first timestep. Departure from Hyper-SD: it shifts weight from the distance to the
adversarial loss as K falls; here ``gan_weight`` is constant (a separate job per stage can change it).
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distillers.critics import Heads
from distillers.losses.adversarial import hinge_discriminator_loss, hinge_generator_loss
from distillers.losses.regression import regression_loss
from distillers.losses.trajectories import jump, segment_edges, segment_of, unit_state
from distillers.methods.base import (
    Betas,
    MethodConfig,
    OptimizerSettings,
    Setup,
    Step,
    Trained,
    Turn,
    TurnLoss,
)
from distillers.methods.consistency import Consistency, ConsistencyConfig
from distillers.rollout import draw_noise
from weights.denoiser import Cond, Denoiser, cond_cat
from weights.diffusion.schedules import add_more_noise, expand

SAME_TIME = 1e-6


class Stage(MethodConfig):
    """A stage of training with a fixed number of segments."""

    segments: int = Field(ge=1, description="number of segments K")
    iterations: int | None = Field(
        None, ge=1, description="length of this stage; leave it out of the last one, which ends with the job"
    )


def default_stages() -> list[Stage]:
    """Hyper-SD's 8, 4, 2 and 1 segments, each for as many iterations as PCM trains one number of segments."""
    return [*(Stage(segments=segments, iterations=5000) for segments in (8, 4, 2)), Stage(segments=1)]


class TSCDConfig(ConsistencyConfig):
    """Settings of TSCD. The defaults are PCM's for SD1.5, with Hyper-SD's stages."""

    stages: list[Stage] = Field(
        default_factory=default_stages,
        min_length=1,
        description="falling numbers of segments, and their lengths; the job's iterations must reach into the last stage",
    )
    guidance_scale: float = Field(
        5.5, ge=0, description="teacher's guidance w: uncond + w (cond - uncond); 1.0 turns it off (PCM: 5 to 6)"
    )
    target_decay: float = Field(
        0.0, ge=0, lt=1, description="decay of the target's moving average; 0: the student is its own target"
    )
    lr: float = Field(5e-6, gt=0, description="the student's learning rate (SDXL 2e-6)")
    gan_weight: float = Field(0.1, ge=0, description="weight of the student's adversarial loss; 0 turns the GAN off")
    head_lr: float = Field(1e-5, gt=0, description="the discriminator heads' learning rate")
    head_betas: Betas = Field((0.0, 0.999), description="AdamW's betas for the heads")

    @property
    def least_iterations(self) -> int:
        return sum(stage.iterations or 1 for stage in self.stages)

    def scaled(self, factor: float) -> Self:
        stages = [
            stage.model_copy(update={"iterations": stage.iterations and max(1, round(factor * stage.iterations))})
            for stage in self.stages
        ]
        return self.model_copy(update={"stages": stages})

    @model_validator(mode="after")
    def _stages_follow(self) -> Self:
        counts = [stage.segments for stage in self.stages]
        if any(later >= earlier for earlier, later in pairwise(counts)):
            raise ValueError(f"stages: segments must fall from stage to stage, got {counts}")
        if counts[0] > self.solver_steps:
            raise ValueError(
                f"stages: {counts[0]} segments need at least as many solver_steps, got {self.solver_steps}"
            )
        lengths = [stage.iterations for stage in self.stages]
        if lengths[-1] is not None or None in lengths[:-1]:
            raise ValueError(
                f"stages: every stage but the last needs iterations, and the last must have none, got {lengths}"
            )
        return self

    @model_validator(mode="after")
    def _schedules_stop_at_the_segments(self) -> Self:
        segments = self.stages[-1].segments
        if segments == 1:
            return self
        starts = [edge / self.solver_steps for edge in segment_edges(self.solver_steps, segments)[:0:-1]]
        for steps, schedule in self.schedules.items():
            visited = all(min(abs(start - t) for t in schedule.timesteps) < SAME_TIME for start in starts)
            if not visited or schedule.sampler != "ddim":
                raise ValueError(
                    f"schedules: {steps} has timesteps {schedule.timesteps} and sampler {schedule.sampler!r}, but a student "
                    f"of {segments} segments jumps to their ends: use 'ddim', and timesteps that include {starts}"
                )
        return self


@dataclass(frozen=True)
class Landing:
    """Where a batch's jumps land."""

    ours: Tensor
    """The student's jump from t, ``(B, ...)``: a state at ``edge``."""
    target: Tensor
    """The target of that jump, ``(B, ...)``, without a graph."""
    edge: Tensor
    """Time of the segment's clean end, ``(B,)``."""
    top: Tensor
    """Time of the segment's noisy end, ``(B,)``."""
    cond: Cond


class TSCD(Consistency):
    """See the module docstring."""

    name = "tscd"
    Config = TSCDConfig
    config: TSCDConfig
    critic: Denoiser

    def __init__(self, config: TSCDConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.heads: Heads | None = None
        if config.gan_weight > 0:
            # A denoiser around the teacher's network: an analytic teacher's own denoiser has no features.
            self.critic = setup.base.with_network(setup.base.network).denoiser
            self.heads = Heads(self.critic, setup.latent_shape, setup.uncond, setup.device)

    def trained(self) -> dict[str, Trained]:
        networks = super().trained()
        if self.heads is not None:
            config = self.config
            optimizer = OptimizerSettings(
                lr=config.head_lr, betas=config.head_betas, weight_decay=config.weight_decay, warmup=config.warmup
            )
            networks["heads"] = Trained(module=self.heads, optimizer=optimizer)
        return networks

    def turns(self, iteration: int) -> list[Turn]:
        discriminator = [Turn(name="discriminator", trains=("heads",))] if self.heads is not None else []
        return [*super().turns(iteration), *discriminator]

    def segments(self, iteration: int) -> int:
        """K at that iteration, counted from 0."""
        for stage in self.config.stages[:-1]:
            iteration -= stage.iterations or 0
            if iteration < 0:
                return stage.segments
        return self.config.stages[-1].segments

    def loss(self, turn: Turn, step: Step) -> TurnLoss:
        return self._student_loss(step) if turn.name == "student" else self._discriminator_loss(step)

    def _student_loss(self, step: Step) -> TurnLoss:
        landing, schedule = self._land(step), self.teacher.schedule
        ours, target = (unit_state(x, landing.edge, schedule) for x in (landing.ours, landing.target))
        loss = consistency = regression_loss(ours, target, self.config.huber)
        metrics = {
            "student/consistency": consistency.detach(),
            "student/target_std": target.std(),
            "student/segments": torch.tensor(float(self.segments(step.iteration))),
        }
        if self.heads is not None:
            step.scratch["landing"] = replace(landing, ours=landing.ours.detach())
            u = self._times(landing, step)
            features = self.critic.features(self._noised(landing.ours, u, landing, step), u, landing.cond)
            adversarial = hinge_generator_loss(self.heads(features))
            loss = loss + self.config.gan_weight * adversarial
            metrics["student/adversarial"] = adversarial.detach()
        return TurnLoss(loss=loss, metrics=metrics)

    def _discriminator_loss(self, step: Step) -> TurnLoss:
        assert self.heads is not None, "without heads there is no such turn"
        with torch.no_grad():
            landing = step.scratch["landing"] if "landing" in step.scratch else self._land(step)
            u = self._times(landing, step)
            both = torch.cat([self._noised(x, u, landing, step) for x in (landing.target, landing.ours)])
            features = self.critic.features(both, torch.cat([u, u]), cond_cat([landing.cond, landing.cond]))
        real, fake = self.heads(features).chunk(2)
        metrics = {
            "discriminator/real_logits": real.detach().mean(),
            "discriminator/fake_logits": fake.detach().mean(),
        }
        return TurnLoss(loss=hinge_discriminator_loss(real, fake), metrics=metrics)

    def _land(self, step: Step) -> Landing:
        """The student's and the target's jumps for a batch; only the student's has a graph."""
        config, schedule, steps = self.config, self.teacher.schedule, self.config.solver_steps
        real, plain = step.batch.pictures
        cond = self._told(plain, step)
        index = torch.randint(1, steps + 1, (len(real),), generator=step.local).to(real.device)
        lower, upper = segment_of(index, segment_edges(steps, self.segments(step.iteration)))
        later = torch.maximum(index - config.skip, lower)
        t, s, edge = index / steps, later / steps, lower / steps
        x_t, guided, x_s = self._solve(real, cond, t, s, step)
        with torch.no_grad():
            x_s = torch.where(expand(s, x_s) > 0, x_s, guided)
            # Rows that have reached their edge need no prediction: it is computed for them, then discarded.
            asked = s.clamp_min(1 / steps)
            answered = jump(x_s, self._answer(x_s, asked, cond), asked, edge, schedule)
            target = torch.where(expand(later > lower, x_s), answered, x_s)
        ours = jump(x_t, self.student.denoiser(x_t, t, cond), t, edge, schedule)
        return Landing(ours=ours, target=target, edge=edge, top=upper / steps, cond=cond)

    @staticmethod
    def _times(landing: Landing, step: Step) -> Tensor:
        """Times at which the discriminator sees states, ``(B,)``: uniform over the segment, without its clean end."""
        drawn = torch.rand(len(landing.edge), generator=step.local).to(landing.edge.device)
        return landing.top - drawn * (landing.top - landing.edge)

    def _noised(self, x: Tensor, u: Tensor, landing: Landing, step: Step) -> Tensor:
        noise = draw_noise(tuple(x.shape), step.local, x.device)
        return add_more_noise(self.teacher.schedule, x, noise, landing.edge, u)
