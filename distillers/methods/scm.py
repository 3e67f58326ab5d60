"""sCM: continuous-time consistency distillation, for a teacher of any schedule and prediction type.

Lu & Song 2024, https://arxiv.org/abs/2410.11081; any teacher as in SANA-Sprint, Chen et al. 2025,
https://arxiv.org/abs/2503.09641, section 3.1. Teacher and student are converted to the TrigFlow schedule by matching
SNRs (`weights.diffusion.conversion`), without training. There, with t the angle in (0, pi / 2) and ``sigma_data`` as
sd,

    x_t = cos(t) x + sin(t) sd eps                        x a real image, ln(sd tan t) ~ N(time_mean, time_std^2)
    sd F = (cos(t) x_t - D(x_t, t)) / sin(t)              F_T of the guided teacher, F of the student
    g = -cos^2(t) sd (F^- - F_T) - r cos(t) sin(t) (x_t + sd dF^-/dt),    dx_t/dt = sd F_T
    loss = w e^{-u(t)} mean (sd F - sg(sd F^- + k g / (|g| + c)))^2 / k^2 + u(t),     w = 1 / (sd tan t)

(equations 5 to 8 and algorithm 1; see `distillers.losses.continuous_consistency`). r rises from 0 to 1 over
``tangent_warmup`` iterations. u is a small network of t that learns the size of the loss at each t and so equalises it.
In the end it cancels w, which therefore only decides how the first updates are distributed (1 / sigma favours low
noise). The target at one time depends on the prediction a moment earlier, and so on down to the clean image: at times
that are rarely sampled, predictions drift unnoticed, and those at all higher noise levels follow. ``time_std`` must
therefore be large enough to reach both ends of the schedule.

F^- is the student itself without a graph, with k = ``tangent_scale`` = 1, as in the paper, or its moving average
(``target_decay``). A network's predictions at t and a moment earlier are tied, so that moving one towards the other
moves the other as well. With small batches, a student that is its own target diverges, at low noise first, and its
images get grainier with every step. The average lags behind and stabilises the student.

dF^-/dt, along the teacher's trajectory, is a Jacobian-vector product (``tangent = "jvp"``) or a finite difference to
the prediction after the teacher's DDIM step to where ln(sigma / alpha) is ``finite_difference_step`` less
(``"finite_difference"``). The difference is for networks that have no forward-mode derivative, or whose exact
derivative is not useful: with sinusoidal embeddings of timesteps 0..999, predictions fluctuate from one timestep to the
next, which a difference over several timesteps averages out. The difference is backward, because a consistency function
is learned from cleaner states, and long enough for bfloat16 to distinguish both predictions. With a fixed step in
ln(sigma / alpha), rounding errors contribute equally to g at all times, and the step in t shrinks towards pure noise,
where a guided teacher's estimate changes quickly. An iteration costs, in network evaluations, one trained, two plain
ones of the teacher (one without guidance), and two plain ones of F^-.

The published student is a denoiser on its base's own schedule, as in `distillers.methods.consistency`.

Departures from the paper: sigma_data is 1, since latents have unit variance here (at the paper's 0.5 the same
trajectories run at another speed), and time_mean is the paper's -1 plus ln 2 accordingly. k and the average in F^- are
not in the paper; the loss is divided by k^2, so that u starts near its final value. |g| is a root mean square, and w
multiplies the normalised loss, as in the public code (the paper's w has become the cos(t) in g). cos(t) sin(t)
multiplies the derivative, and not the tangents that enter the JVP; this would matter only in half precision. The
dense time embedding and the normalised queries and keys that SANA-Sprint first gives its teacher need another network
and a training of their own, and are left out. With ``guidance_range`` the student is conditioned on the guidance scale
(see `SelfTaught`), as in SANA-Sprint, which draws 4, 4.5 or 5; by default, the scale is fixed, so that a student can be
a LoRA. A network that predicts x0 is unconstrained at t = 0, where the other prediction types return x_t whatever their
weights, so that any constant would be a valid consistency function: at noise levels below ``boundary`` its r stays 0,
and it learns the teacher's own estimate.
"""

import math
from typing import Self

import torch
from pydantic import Field
from torch import Tensor, nn

from distillers.losses.continuous_consistency import (
    consistency_tangent,
    normalize_tangent,
    tangent_loss,
    trig_velocity,
)
from distillers.methods.base import (
    Betas,
    OptimizerSettings,
    Setup,
    Step,
    Trained,
    Turn,
    TurnLoss,
)
from distillers.methods.few_step import SelfTaught, SelfTaughtConfig
from distillers.rollout import draw_lognormal_times, draw_noise, evaluating
from distillers.tangents import Differentiation, difference_along, jvp_along
from weights.denoiser import Cond, cond_cat
from weights.diffusion.conversion import Converted
from weights.diffusion.samplers import ddim_step
from weights.diffusion.schedules import TrigFlow, add_noise

QUARTER_TURN = math.pi / 2
MARGIN = 1e-4
"""Distance of times from the ends of the teacher's schedule, beyond which states are constant and derivatives 0."""
FREE_BOUNDARY = 0.1
"""sigma / alpha below which a network that predicts x0 learns the teacher's own estimate."""


class SCMConfig(SelfTaughtConfig):
    """Settings of sCM. Defaults are those of the paper and its public code; guidance_scale is from SANA-Sprint."""

    sigma_data: float = Field(
        1.0, gt=0, description="TrigFlow's standard deviation of the latents (the paper's is 0.5)"
    )
    guidance_scale: float = Field(
        4.5, ge=0, description="teacher's guidance w: uncond + w (cond - uncond); 1.0 turns it off"
    )
    time_mean: float = Field(-0.3, description="mean of ln(sigma / alpha) at the training times")
    time_std: float = Field(1.4, gt=0, description="its standard deviation (1.6 for ImageNet-512 and SANA-Sprint)")
    tangent: Differentiation = Field(
        "jvp", description="the derivative: exact (jvp), or finite_difference if the network has no useful exact one"
    )
    finite_difference_step: float = Field(
        0.1, gt=0, lt=1, description="how far back a finite difference reaches, in ln(sigma / alpha)"
    )
    tangent_offset: float = Field(0.1, gt=0, description="c in g / (|g| + c)")
    tangent_scale: float = Field(
        1.0,
        gt=0,
        description="k, the length of the step along the normalised tangent; makes no difference if target_decay is 0",
    )
    target_decay: float = Field(
        0.0, ge=0, lt=1, description="decay of the target's moving average; 0: the student is its own target"
    )
    tangent_warmup: int = Field(
        10_000, ge=0, description="iterations over which r, the share of the tangent, rises to 1"
    )
    boundary: float | None = Field(
        None,
        ge=0,
        description="sigma / alpha below which r stays 0; if left out, 0.1 for a network that predicts x0, else 0",
    )
    prior_weighting: bool = Field(True, description="weight the loss by alpha / sigma")
    adaptive_weighting: bool = Field(True, description="learn the size of the loss at each time, and divide by it")
    log_variance_lr: float = Field(1e-2, gt=0, description="learning rate of the adaptive weighting")
    betas: Betas = Field((0.9, 0.99), description="RAdam's betas")

    def scaled(self, factor: float) -> Self:
        return self.model_copy(update={"tangent_warmup": round(factor * self.tangent_warmup)})


class LogVariance(nn.Module):
    """u(t): a cosine series in ln tan(t), initialised to 0."""

    TERMS, REACH = 16, 8.0

    def __init__(self) -> None:
        super().__init__()
        self.series = nn.Linear(self.TERMS, 1, bias=False)
        nn.init.zeros_(self.series.weight)

    def forward(self, angle: Tensor) -> Tensor:
        """Returns ``(B,)`` float32 for angles ``(B,)`` in (0, pi / 2)."""
        place = (0.5 + angle.tan().log() / (2 * self.REACH)).clamp(0, 1)
        terms = torch.cos(math.pi * place.unsqueeze(1) * torch.arange(self.TERMS, device=angle.device))
        with torch.autocast(angle.device.type, enabled=False):  # which would round the product to bfloat16
            return (terms.float() @ self.series.weight.float().T).squeeze(1)


class SCM(SelfTaught):
    """See the module docstring."""

    name = "scm"
    Config = SCMConfig
    config: SCMConfig
    optimizer = "radam"

    def __init__(self, config: SCMConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.trig = TrigFlow(config.sigma_data)
        free = getattr(self.student.denoiser, "prediction", None) == "x0"
        given = config.boundary
        self.boundary: float = given if given is not None else FREE_BOUNDARY if free else 0.0
        self.log_variance = LogVariance().to(setup.device) if config.adaptive_weighting else None

    @classmethod
    def needs_pictures(cls, config: SCMConfig) -> str | None:
        return "continuous-time consistency distillation follows the teacher from noised real images"

    def trained(self) -> dict[str, Trained]:
        config, networks = self.config, super().trained()
        if self.log_variance is not None:
            settings = OptimizerSettings(
                kind=self.optimizer, lr=config.log_variance_lr, betas=config.betas, weight_decay=0.0
            )
            networks["log_variance"] = Trained(module=self.log_variance, optimizer=settings)
        return networks

    def turns(self, iteration: int) -> list[Turn]:
        adaptive = self.log_variance is not None
        return [Turn(name="student", trains=("student", "log_variance") if adaptive else ("student",))]

    def loss(self, turn: Turn, step: Step) -> TurnLoss:
        return self.consistency_loss(step)

    def consistency_loss(self, step: Step) -> TurnLoss:
        """The whole loss of a micro-batch, for methods that add another (adversarial) loss to it."""
        real, plain = step.batch.pictures
        cond = self._told(plain, step)
        angle = self._angles(len(real), step)
        eps = draw_noise(tuple(real.shape), step.local, real.device)
        x_t = add_noise(self.trig, real, eps, angle / QUARTER_TURN).float()
        x0 = Converted(self.student.denoiser, self.trig)(x_t, angle / QUARTER_TURN, cond)
        velocity = trig_velocity(x0, x_t, angle)
        target, metrics = self._target(velocity, x_t, angle, cond, step.iteration)
        weight = 1 / (self.config.sigma_data * angle.tan()) if self.config.prior_weighting else torch.ones_like(angle)
        log_variance = None
        if self.log_variance is not None:
            log_variance = self.log_variance(angle)
            metrics["student/log_variance"] = log_variance.detach().mean()
        weight = weight.float() / self.config.tangent_scale**2
        return TurnLoss(loss=tangent_loss(velocity, target, weight, log_variance), metrics=metrics)

    def _angles(self, count: int, step: Step) -> Tensor:
        """Draws angles t, ``(count,)`` float64, within the range of the teacher's schedule."""
        config, schedule = self.config, self.teacher.schedule
        t = draw_lognormal_times(count, config.time_mean, config.time_std, schedule, step.local, self.setup.device)
        return self._angle(t.double().clamp(MARGIN, 1 - MARGIN))

    def _angle(self, t: Tensor) -> Tensor:
        """TrigFlow's angle at the teacher's time t."""
        return self.trig.angle(self.trig.time_of_log_snr(self.teacher.schedule.log_snr(t)))

    @torch.no_grad()
    def _target(
        self, velocity: Tensor, x_t: Tensor, angle: Tensor, cond: Cond, iteration: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The target, F^- plus a step along the normalised g, and values to log."""
        config, t = self.config, angle / QUARTER_TURN
        guided = self._guided(Converted(self.teacher, self.trig), x_t, t, cond)
        teacher = trig_velocity(guided, x_t, angle)
        own, derivative = self._derivative(x_t, angle, cond, guided, teacher)
        tangent = consistency_tangent(own, teacher, derivative, x_t, angle, self._ramp(angle, iteration))
        metrics = {
            "student/tangent": tangent.square().mean().sqrt(),
            "student/derivative": derivative.square().mean().sqrt(),
            "student/velocity_gap": (own - teacher).square().mean().sqrt(),
            "student/lag": (velocity - own).square().mean().sqrt(),
        }
        return own + config.tangent_scale * normalize_tangent(tangent, config.tangent_offset), metrics

    def _derivative(
        self, x_t: Tensor, angle: Tensor, cond: Cond, guided: Tensor, velocity: Tensor
    ) -> tuple[Tensor, Tensor]:
        """sd F^- and its derivative d/dt along the teacher's trajectory.

        Args:
            x_t: state, ``(B, ...)``.
            angle: t, ``(B,)``.
            cond: B rows.
            guided: the teacher's x_0 estimate at x_t.
            velocity: dx_t/dt, from the same estimate.
        """
        view = Converted(self.target, self.trig)
        exact = self.config.tangent == "jvp"
        told = cond if exact else cond_cat([cond, cond])

        def function(x: Tensor, t: Tensor) -> Tensor:
            return trig_velocity(view(x, t / QUARTER_TURN, told), x, t)

        with evaluating(self.target):  # dropout would make the two evaluations of a difference two different functions
            if exact:
                return jvp_along(function, x_t, angle, velocity)
            earlier = torch.atan(angle.tan() * math.exp(-self.config.finite_difference_step))
            x_s = ddim_step(x_t, guided, angle / QUARTER_TURN, earlier / QUARTER_TURN, self.trig)
            return difference_along(function, x_t, angle, x_s, earlier)

    def _ramp(self, angle: Tensor, iteration: int) -> Tensor:
        """r, ``(B,)``."""
        warmed = min(1.0, iteration / self.config.tangent_warmup) if self.config.tangent_warmup else 1.0
        return warmed * (self.config.sigma_data * angle.tan() >= self.boundary)
