"""A picture's way from noise to clean latents, written down before it is drawn.

Every sampler here (DDIM at any eta, the consistency sampler, a base's leg before a student's) goes from one state to the
next by a combination of three things whose weights depend on times alone:

    x_s = keep x_t + estimate x_0 + fresh eps            x_0 the network's answer for x_t, eps new noise

So a drawing is a list of steps, each a network, what it is told, and three numbers. Pictures of any prompts, seeds, step
counts and guidance can then share a call of the same network and one update, row by row, wherever each is on its own way:
that is what a server batches by. The numbers come from `few_step_update` itself: a linear map's coefficients are its values
at the unit vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypedDict

import torch
from torch import Tensor

from weights.contracts import Diversity, StepSchedule
from weights.diffusion.samplers import ddim_step, few_step_update, initial_state, needs_noise, trailing_times
from weights.diffusion.schedules import Schedule, expand

Leg = Literal["base", "student"]


class CannotDraw(ValueError):
    """These settings cannot be drawn with this student; the message says why and what can."""


@dataclass(frozen=True, kw_only=True)
class TrajectoryStep:
    """One evaluation of a network, and the update after it."""

    leg: Leg
    """Whose network."""
    t: float
    """The time that the network is told, in (0, 1]."""
    guidance_scale: float
    """1.0 is off."""
    tells_guidance: bool
    """Whether the network is told the scale, and needs no unconditional evaluation."""
    keep: float
    """Of x_t."""
    estimate: float
    """Of x_0."""
    fresh: float = 0.0
    """Of new noise; 0 where none is drawn."""
    unprompted: bool = False
    """Whether the network is told the empty prompt alone, whatever the picture's negative prompt says."""

    @property
    def evaluations(self) -> int:
        """Of the network, for this step."""
        return 1 if self.tells_guidance else evaluations_per_call(self.guidance_scale)


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """All steps of a picture."""

    start: float
    """Unit normal noise times this is the first state."""
    steps: tuple[TrajectoryStep, ...]
    skipped_draws: int = 0
    """Draws of noise to throw away after the first: those of steps that are left out, so that all others keep their own."""

    @property
    def evaluations(self) -> int:
        """Network evaluations of a picture; a guided step counts two."""
        return sum(step.evaluations for step in self.steps)

    def first_state(self, noise: Tensor) -> Tensor:
        """Unit normal noise ``(B, ...)`` as the state that the first step denoises, float32."""
        return noise.float() if self.start == 1 else (self.start * noise.double()).float()


def evaluations_per_call(guidance_scale: float) -> int:
    """Network evaluations of one guided call: one at 1.0 (off) and 0.0 (the unconditional estimate alone), else two."""
    return 1 if guidance_scale in (0, 1) else 2


def base_leg_times(schedule: StepSchedule, diversity: Diversity) -> list[float]:
    """The base leg's falling times: 1 first, the student's time at step ``skip`` last, ``base_steps`` steps between.

    The steps are equally long, but for the first where it goes without the prompt: that is as long as the calibration says.

    Raises:
        CannotDraw: the student has no step ``skip``, or takes over before the prompt is told.
    """
    steps = len(schedule.timesteps)
    if diversity.skip >= steps:
        raise CannotDraw(
            f"the base's first step replaces the student's first {diversity.skip} of {steps} step(s), which leaves "
            f"it none: draw with at least {diversity.skip + 1} steps, or turn diversity off"
        )
    target, count, first = schedule.timesteps[diversity.skip], diversity.base_steps, diversity.unprompted
    if not first:
        return [*_evenly(1.0, target, count), target]
    if 1 - first <= target:
        raise CannotDraw(
            f"the base goes without the prompt from t = 1 to {1 - first:g} (unprompted {first:g}), but with {steps} steps "
            f"the student takes over at {target:g} already: want unprompted below {1 - target:g}, or fewer steps"
        )
    return [1.0, *_evenly(1 - first, target, count - 1), target]


def _evenly(start: float, end: float, steps: int) -> list[float]:
    """Where each of so many equal steps from ``start`` to ``end`` begins."""
    return [start + (end - start) * step / steps for step in range(steps)]


def base_leg_scales(diversity: Diversity) -> list[float]:
    """The guidance of each of the base leg's steps; 0 is the first one's where it goes without the prompt."""
    guided = [diversity.base_guidance] * diversity.base_steps
    return [0.0, *guided[1:]] if diversity.unprompted else guided


def base_leg_evaluations(diversity: Diversity) -> int:
    """Network evaluations of the base leg."""
    return sum(map(evaluations_per_call, base_leg_scales(diversity)))


def base_trajectory(
    diffusion: Schedule, steps: int, guidance_scale: float, *, tells_guidance: bool = False
) -> Trajectory:
    """The base model's: DDIM (eta 0) over trailing times.

    Args:
        diffusion: the base's noise schedule.
        steps: at least 1.
        guidance_scale: 1.0 is off.
        tells_guidance: whether its network embeds guidance.
    """
    times = trailing_times(steps)
    return Trajectory(
        start=_start(diffusion, times[0]),
        steps=_ddim_steps("base", diffusion, times, [guidance_scale] * steps, tells_guidance),
    )


def student_trajectory(
    diffusion: Schedule,
    schedule: StepSchedule,
    guidance_scale: float = 1.0,
    *,
    tells_guidance: bool = False,
    diversity: Diversity | None = None,
    skip_only: bool = False,
    base_tells_guidance: bool = False,
) -> Trajectory:
    """A student's; with ``diversity`` its base goes the first part of the way.

    Args:
        diffusion: the noise schedule, of base and student.
        schedule: the student's times at this number of steps.
        guidance_scale: of the student's steps; 1.0 is off. The base's are in ``diversity``.
        tells_guidance: whether the student's network embeds guidance.
        diversity: which steps the base replaces, and how.
        skip_only: the control for ``diversity``: pure noise enters at step ``skip``, and the base is not run at all.
        base_tells_guidance: whether the base's network embeds guidance.

    Raises:
        CannotDraw: ``diversity`` leaves the student no step of its own.
    """
    first, start = 0, schedule.timesteps[0]
    leg: tuple[TrajectoryStep, ...] = ()
    if diversity is not None:
        first, times = diversity.skip, base_leg_times(schedule, diversity)
        start = times[-1] if skip_only else times[0]
        if not skip_only:
            # A leg at scale 0 is there to leave the prompt out: a negative prompt would be all that it is told.
            leg = _ddim_steps(
                "base", diffusion, times, base_leg_scales(diversity), base_tells_guidance, unprompted=True
            )
    x_t, x0, eps = _UNIT
    own = tuple(
        TrajectoryStep(
            leg="student",
            t=schedule.network_times[index],
            guidance_scale=guidance_scale,
            tells_guidance=tells_guidance,
            **_weights(*few_step_update(x_t, x0, index, schedule, diffusion, eps)),
        )
        for index in range(first, len(schedule.timesteps))
    )
    skipped = sum(needs_noise(schedule, index) for index in range(first))
    return Trajectory(start=_start(diffusion, start), steps=(*leg, *own), skipped_draws=skipped)


def advance(x_t: Tensor, x0: Tensor, steps: Sequence[TrajectoryStep], noise: Tensor | None = None) -> Tensor:
    """Every picture's next state, each by its own step.

    Args:
        x_t: ``(B, ...)``.
        x0: the networks' answers, guided, ``(B, ...)``.
        steps: one a picture.
        noise: ``(B, ...)`` unit normal where any step has ``fresh``; rows of the others do not matter, but are finite.

    Returns:
        ``(B, ...)`` float32, computed in float64. A row does not depend on the others, nor on their number.
    """

    def column(values: list[float]) -> Tensor | float:
        if len(set(values)) == 1:
            return values[0]
        return expand(torch.tensor(values, dtype=torch.float64, device=x_t.device), x_t)

    keep, fresh = [step.keep for step in steps], [step.fresh for step in steps]
    x_s = column([step.estimate for step in steps]) * x0.double()
    if any(keep):
        x_s = column(keep) * x_t.double() + x_s
    if any(fresh):
        assert noise is not None, "a step with fresh noise was not given any"
        x_s = x_s + column(fresh) * noise.double()
    return x_s.float()


_UNIT = [row.unsqueeze(1) for row in torch.eye(3, dtype=torch.float64)]
"""x_t, x_0 and eps ``(3, 1)`` of a batch in which each is 1 where the others are 0."""


class _Weights(TypedDict):
    keep: float
    estimate: float
    fresh: float


def _weights(keep: Tensor, estimate: Tensor, fresh: Tensor) -> _Weights:
    """An update's rows at the unit vectors, by name."""
    return {"keep": float(keep), "estimate": float(estimate), "fresh": float(fresh)}


def _start(diffusion: Schedule, t: float) -> float:
    return float(initial_state(torch.ones(1, dtype=torch.float64), diffusion, t))


def _ddim_steps(
    leg: Leg,
    diffusion: Schedule,
    times: Sequence[float],
    scales: Sequence[float],
    tells_guidance: bool,
    unprompted: bool = False,
) -> tuple[TrajectoryStep, ...]:
    """DDIM down falling times, each step under its own guidance.

    At time 0 the picture is the last x_0 itself, also where a trace of noise is left. ``unprompted``: steps at scale 0
    are told the empty prompt.
    """
    steps = []
    for (t, s), guidance_scale in zip(pairwise(times), scales, strict=True):
        now, then = (torch.full((3,), time, dtype=torch.float64) for time in (t, s))
        weights = (0.0, 1.0, 0.0) if s == 0 else ddim_step(_UNIT[0], _UNIT[1], now, then, diffusion)
        steps.append(
            TrajectoryStep(
                leg=leg,
                t=t,
                guidance_scale=guidance_scale,
                tells_guidance=tells_guidance,
                unprompted=unprompted and guidance_scale == 0,
                **_weights(*(torch.as_tensor(weight) for weight in weights)),
            )
        )
    return tuple(steps)
