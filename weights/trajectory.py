"""Trajectories: the steps from noise to clean latents, planned before an image is generated.

Every sampler here (DDIM at any eta, the consistency sampler, a base leg before a student's steps) updates the state by
a linear combination whose coefficients depend on times alone:

    x_s = keep x_t + estimate x_0 + fresh eps            x_0 the network's estimate at x_t, eps new noise

So generating an image is a list of steps, each with a network, its conditioning, and three coefficients. Images with
any prompts, seeds, step counts and guidance can then share a call of the same network and one update, row by row,
whichever step each is at. This is how a server batches. The coefficients come from `few_step_update` and `ddim_step`
themselves, evaluated at unit vectors.
"""

from collections.abc import Mapping, Sequence
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
    """The student cannot generate with these settings; the message says why, and what is possible."""


@dataclass(frozen=True, kw_only=True)
class TrajectoryStep:
    """One network evaluation (or guided pair), and the update after it."""

    leg: Leg
    """Whose network to run."""
    t: float
    """The time that the network is conditioned on, in (0, 1]."""
    guidance_scale: float
    """1.0 is off."""
    tells_guidance: bool
    """Whether the network embeds the scale, and so needs no unconditional evaluation."""
    keep: float
    """Coefficient of x_t."""
    estimate: float
    """Coefficient of x_0."""
    fresh: float = 0.0
    """Coefficient of new noise; 0 if none is drawn."""
    unprompted: bool = False
    """Whether the network is conditioned on the empty prompt alone, even if the image has a negative prompt."""

    @property
    def evaluations(self) -> int:
        """Network evaluations in this step."""
        return 1 if self.tells_guidance else evaluations_per_call(self.guidance_scale)


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """All steps of an image."""

    start: float
    """Scale of the unit normal noise in the first state."""
    steps: tuple[TrajectoryStep, ...]
    skipped_draws: int = 0
    """Noise draws to discard after the first, those of skipped steps, so that the other steps get their usual noise."""

    @property
    def evaluations(self) -> int:
        """Network evaluations per image; a guided step counts as two."""
        return sum(step.evaluations for step in self.steps)

    def first_state(self, noise: Tensor) -> Tensor:
        """Scale unit normal noise ``(B, ...)`` to the state that the first step denoises, float32."""
        return noise.float() if self.start == 1 else (self.start * noise.double()).float()


def evaluations_per_call(guidance_scale: float) -> int:
    """Network evaluations of a guided call: one at 1.0 (off) and 0.0 (the unconditional estimate alone), else two."""
    return 1 if guidance_scale in (0, 1) else 2


def schedule_for(schedules: Mapping[int, StepSchedule], steps: int) -> StepSchedule:
    """A student's schedule for any number of steps up to the most that it was trained for.

    Where it has none of its own, it takes n of the N times of the next larger one, since its network knows these:
    numbers ``ceil(i N / n)``, which are pure noise and evenly spread later ones. Where n does not divide N they are late
    rather than early, since late times count most (docs/decisions.md has figures).

    Args:
        schedules: the student's own, by number of steps.
        steps: how many are wanted.

    Raises:
        CannotDraw: there are none or too many.
    """
    most = max(schedules)
    if not 1 <= steps <= most:
        raise CannotDraw(f"steps: the student supports 1 to {most}, not {steps}")
    if steps in schedules:
        return schedules[steps]
    larger = schedules[min(count for count in schedules if count > steps)]
    chosen = [-(-number * len(larger.timesteps) // steps) for number in range(steps)]
    conditioning = None if larger.conditioning is None else [larger.conditioning[index] for index in chosen]
    return StepSchedule(
        timesteps=[larger.timesteps[index] for index in chosen],
        conditioning=conditioning,
        sampler=larger.sampler,
        eta=larger.eta,
    )


def own_schedule(schedule: StepSchedule, diversity: Diversity | None) -> StepSchedule:
    """The student's own steps: those from step ``skip`` on, scaled to begin at ``until`` if that is set.

    The network is told scaled times as they are, whatever ``schedule`` tells it instead of its own times.

    Raises:
        CannotDraw: the student has no step ``skip``.
    """
    if diversity is None:
        return schedule
    steps, first = len(schedule.timesteps), diversity.skip
    if first >= steps:
        raise CannotDraw(
            f"the base's first step replaces the student's first {first} of {steps} step(s), which leaves none: use at "
            f"least {first + 1} steps, set skip to 0 and until to the time at which the student takes over, or turn "
            "diversity off"
        )
    times, conditioning = schedule.timesteps[first:], schedule.conditioning
    if diversity.until is not None:
        times, conditioning = [diversity.until * (time / times[0]) for time in times], None
    elif conditioning is not None:
        conditioning = conditioning[first:]
    return schedule.model_copy(update={"timesteps": times, "conditioning": conditioning})


def base_leg_times(schedule: StepSchedule, diversity: Diversity) -> list[float]:
    """The base leg's ``base_steps + 1`` falling times, from its start to the time at which the student takes over.

    The steps are equally long, except for a first step without the prompt, whose length is part of the calibration.

    Raises:
        CannotDraw: the student has no step ``skip``, or takes over before the base starts, or before it uses the prompt.
    """
    target, start = own_schedule(schedule, diversity).timesteps[0], base_leg_start(schedule, diversity)
    steps, count, first = len(schedule.timesteps), diversity.base_steps, diversity.unprompted
    if start <= target:
        raise CannotDraw(
            f"the base starts at t = {start:g}, but with {steps} step(s) the student takes over at {target:g}: set start "
            f"above {target:g}, or until below {start:g}"
        )
    if not first:
        return [*_evenly(start, target, count), target]
    if start - first <= target:
        raise CannotDraw(
            f"the base goes without the prompt from t = {start:g} to {start - first:g} (unprompted {first:g}), but with "
            f"{steps} step(s) the student takes over at {target:g}: set unprompted below {start - target:g}, or use fewer "
            "steps"
        )
    return [start, *_evenly(start - first, target, count - 1), target]


def base_leg_start(schedule: StepSchedule, diversity: Diversity) -> float:
    """The time that the base is told for pure noise: the calibrated one, or else the student's own first time.

    A network told t = 1 may predict the same image from any noise. A student that is told an earlier time, to be more
    diverse, would lose by a first step from 1 (docs/measured.md).
    """
    return schedule.timesteps[0] if diversity.start is None else diversity.start


def _evenly(start: float, end: float, steps: int) -> list[float]:
    """Start times of equally long steps from ``start`` to ``end``."""
    return [start + (end - start) * step / steps for step in range(steps)]


def base_leg_scales(diversity: Diversity) -> list[float]:
    """Guidance scales of the base leg's steps; 0 for a first step without the prompt."""
    guided = [diversity.base_guidance] * diversity.base_steps
    return [0.0, *guided[1:]] if diversity.unprompted else guided


def base_leg_evaluations(diversity: Diversity) -> int:
    """Network evaluations of the base leg."""
    return sum(map(evaluations_per_call, base_leg_scales(diversity)))


def base_trajectory(
    diffusion: Schedule, steps: int, guidance_scale: float, *, tells_guidance: bool = False
) -> Trajectory:
    """The base model's trajectory: DDIM (eta 0) over trailing times.

    Args:
        diffusion: the base's noise schedule.
        steps: at least 1.
        guidance_scale: 1.0 is off.
        tells_guidance: whether the base's network embeds guidance.
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
    """A student's trajectory; with ``diversity``, its base runs the first part.

    Args:
        diffusion: the noise schedule of base and student.
        schedule: the student's step schedule for this number of steps.
        guidance_scale: guidance of the student's steps; 1.0 is off. The base's is in ``diversity``.
        tells_guidance: whether the student's network embeds guidance.
        diversity: how the base begins, and where the student takes over.
        skip_only: the control for ``diversity``: the student takes over pure noise, and the base is not run at all.
        base_tells_guidance: whether the base's network embeds guidance.

    Raises:
        CannotDraw: ``diversity`` leaves the student no step of its own.
    """
    student, start = own_schedule(schedule, diversity), schedule.timesteps[0]
    leg: tuple[TrajectoryStep, ...] = ()
    if diversity is not None:
        times = base_leg_times(schedule, diversity)
        start = times[-1] if skip_only else times[0]
        if not skip_only:
            # Scale 0 means no prompt at all; without this flag, such a step would still see a negative prompt.
            leg = _ddim_steps(
                "base", diffusion, times, base_leg_scales(diversity), base_tells_guidance, unprompted=True
            )
    x_t, x0, eps = _UNIT
    own = tuple(
        TrajectoryStep(
            leg="student",
            t=t,
            guidance_scale=guidance_scale,
            tells_guidance=tells_guidance,
            **_weights(*few_step_update(x_t, x0, index, student, diffusion, eps)),
        )
        for index, t in enumerate(student.network_times)
    )
    skipped = 0 if diversity is None else sum(needs_noise(schedule, index) for index in range(diversity.skip))
    return Trajectory(start=_start(diffusion, start), steps=(*leg, *own), skipped_draws=skipped)


def advance(x_t: Tensor, x0: Tensor, steps: Sequence[TrajectoryStep], noise: Tensor | None = None) -> Tensor:
    """Every image's next state, each by its own step.

    Args:
        x_t: ``(B, ...)``.
        x0: the networks' guided estimates, ``(B, ...)``.
        steps: one per image.
        noise: ``(B, ...)`` unit normal if any step has ``fresh``; other steps' rows have no effect, but must be finite.

    Returns:
        ``(B, ...)`` float32, computed in float64. A row depends neither on the other rows nor on their number.
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
"""x_t, x_0 and eps, each ``(3, 1)``: the three unit vectors, at which a linear map gives its coefficients."""


class _Weights(TypedDict):
    keep: float
    estimate: float
    fresh: float


def _weights(keep: Tensor, estimate: Tensor, fresh: Tensor) -> _Weights:
    """An update's values at the unit vectors, as named coefficients."""
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
    """DDIM steps through falling times, each with its own guidance scale.

    At time 0 the image is the last x_0 itself, even if the schedule keeps some noise there. With ``unprompted``, steps
    at scale 0 are conditioned on the empty prompt, for a network that embeds guidance at scale 1 (off).
    """
    steps = []
    for (t, s), guidance_scale in zip(pairwise(times), scales, strict=True):
        now, then = (torch.full((3,), time, dtype=torch.float64) for time in (t, s))
        left_out = unprompted and guidance_scale == 0
        weights = (0.0, 1.0, 0.0) if s == 0 else ddim_step(_UNIT[0], _UNIT[1], now, then, diffusion)
        steps.append(
            TrajectoryStep(
                leg=leg,
                t=t,
                guidance_scale=1.0 if left_out and tells_guidance else guidance_scale,
                tells_guidance=tells_guidance,
                unprompted=left_out,
                **_weights(*(torch.as_tensor(weight) for weight in weights)),
            )
        )
    return tuple(steps)
