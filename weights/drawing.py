"""Drawing: from conditions and seeds to latents, in the base's many steps or a student's few.

The server, the evaluation and the demo all draw through here, so that what is measured is what is served. A student can
be given its base's first step, which brings back the diversity that distillation loses ("Distilling Diversity and
Control in Diffusion Models", Gandikota & Bau, arXiv 2503.10637, section 4): the base runs DDIM over its own times from
t = 1 down to t*, the time of the student's step ``skip``; the student takes the latent over there and finishes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from weights.contracts import Diversity, StepSchedule
from weights.denoiser import Cond, Denoiser
from weights.diffusion.guidance import EmbeddedGuidance, Guided
from weights.diffusion.samplers import (
    ImageNoise,
    OnStep,
    ddim_step,
    few_step,
    initial_state,
    needs_noise,
    sample_ode,
    trailing_times,
)
from weights.families.base import TextToImage


class CannotDraw(ValueError):
    """These settings cannot be drawn with this student; the message says why and what can."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What was drawn, and what it cost."""

    latents: Tensor
    """``(B, C, h, w)`` float32, clean and of unit variance: ready for `TextToImage.decode`."""
    evaluations: int
    """Network evaluations per picture, the base leg's included; a guided step counts two."""


def base_leg_times(schedule: StepSchedule, diversity: Diversity) -> list[float]:
    """The base leg's falling times: 1 first, the student's time at step ``skip`` last, ``base_steps`` steps between.

    Raises:
        CannotDraw: the student has no step ``skip``.
    """
    steps = len(schedule.timesteps)
    if diversity.skip >= steps:
        raise CannotDraw(
            f"the base's first step replaces the student's first {diversity.skip} of {steps} step(s), which leaves "
            f"it none: draw with at least {diversity.skip + 1} steps, or turn diversity off"
        )
    target = schedule.timesteps[diversity.skip]
    return [1 + (target - 1) * step / diversity.base_steps for step in range(diversity.base_steps)] + [target]


def evaluations_per_call(guidance_scale: float) -> int:
    """Network evaluations of one guided call: one at 1.0 (off) and 0.0 (the unconditional estimate alone), else two."""
    return 1 if guidance_scale in (0, 1) else 2


def guided(denoiser: Denoiser, uncond: Cond | None, guidance_scale: float) -> tuple[Denoiser, int]:
    """The denoiser under classifier-free guidance, and its `evaluations_per_call`; one that embeds guidance needs one.

    Raises:
        CannotDraw: guidance was asked for, without the unconditional (or negative) condition it needs.
    """
    if denoiser.embeds_guidance:
        return EmbeddedGuidance(denoiser, guidance_scale), 1
    cost = evaluations_per_call(guidance_scale)
    if guidance_scale == 1:
        return denoiser, cost
    if uncond is None:
        raise CannotDraw(f"guidance_scale {guidance_scale} needs an unconditional condition; 1.0 turns guidance off")
    return Guided(denoiser, uncond, guidance_scale), cost


def draw_base(
    base: TextToImage,
    cond: Cond,
    uncond: Cond | None,
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
    on_step: OnStep | None = None,
) -> Drawing:
    """Draw with the base model: DDIM (eta 0) over ``steps`` trailing times.

    Args:
        base: the model.
        cond: conditions, one row a picture.
        uncond: a single row, of the empty or the negative prompt; needed when guided.
        seeds: one a picture; a seed gives the same noise in every batch and on every device.
        steps: at least 1.
        guidance_scale: 1.0 is off.
        on_step: called after each step with its index and the x_0 that the model sees there.
    """
    denoiser, cost = guided(base.denoiser, uncond, guidance_scale)
    times = trailing_times(steps)
    noise = ImageNoise(seeds, base.latent_shape(), _device(cond))
    x_t = initial_state(noise(), base.denoiser.schedule, times[0])
    latents = sample_ode(denoiser, x_t, times, cond, solver="ddim", on_step=on_step)
    return Drawing(latents=latents, evaluations=steps * cost)


def draw(
    student: TextToImage,
    cond: Cond,
    uncond: Cond | None,
    seeds: Sequence[int],
    schedule: StepSchedule,
    *,
    guidance_scale: float = 1.0,
    base: TextToImage | None = None,
    diversity: Diversity | None = None,
    skip_only: bool = False,
    on_step: OnStep | None = None,
) -> Drawing:
    """Draw with a student, in the steps of its schedule; optionally with the base's first step in place of its own.

    Args:
        student: the student.
        cond: conditions, one row a picture.
        uncond: a single row, of the empty or the negative prompt; needed when either leg is guided.
        seeds: one a picture; a seed gives the same noise in every batch and on every device.
        schedule: the student's times at this number of steps.
        guidance_scale: the student's guidance; 1.0 is off, but for a student that embeds guidance, whose scale is one of
            those it was trained for. The base leg has its own, in ``diversity``.
        base: the student's base, of the same noise schedule; it draws the first step when ``diversity`` is given.
        diversity: which steps the base replaces, and how.
        skip_only: the control for ``diversity``: pure noise enters at step ``skip`` and the base is not run at all.
        on_step: called after each step, the base leg's first, with its index from 0 and the x_0 seen there.

    Raises:
        CannotDraw: ``diversity`` leaves the student no step of its own, or has no base.
    """
    denoiser, cost = guided(student.denoiser, uncond, guidance_scale)
    noise = ImageNoise(seeds, student.latent_shape(), _device(cond))
    if diversity is None:
        x_t = initial_state(noise(), denoiser.schedule, schedule.timesteps[0])
        latents = few_step(denoiser, x_t, schedule, cond, noise, on_step=on_step)
        return Drawing(latents=latents, evaluations=len(schedule.timesteps) * cost)

    times = base_leg_times(schedule, diversity)
    evaluations = (len(schedule.timesteps) - diversity.skip) * cost
    first = 0
    if skip_only:
        x_t = initial_state(noise(), denoiser.schedule, times[-1])
    elif base is None:
        raise CannotDraw("diversity runs the base model's first step, but no base was given")
    else:
        leg, leg_cost = guided(base.denoiser, uncond, diversity.base_guidance)
        x_t = _base_leg(leg, initial_state(noise(), leg.schedule, times[0]), times, cond, on_step)
        first = diversity.base_steps
        evaluations += first * leg_cost
    for step in range(diversity.skip):
        if needs_noise(schedule, step):
            noise()  # the skipped step's draw, so that the steps that are left get the noise they always get
    latents = few_step(
        denoiser, x_t, schedule, cond, noise, diversity.skip, _numbered_from(on_step, first - diversity.skip)
    )
    return Drawing(latents=latents, evaluations=evaluations)


def _device(cond: Cond) -> torch.device:
    return next(iter(cond.values())).device


def _base_leg(denoiser: Denoiser, x_t: Tensor, times: list[float], cond: Cond, on_step: OnStep | None) -> Tensor:
    """The latent ``(B, ...)`` at the last of ``times``, which is above 0, by DDIM from the first."""
    for step, (t, s) in enumerate(pairwise(times)):
        now, then = (torch.full((len(x_t),), time, dtype=torch.float64, device=x_t.device) for time in (t, s))
        x0 = denoiser(x_t, now.float(), cond)
        x_t = ddim_step(x_t, x0, now, then, denoiser.schedule)
        if on_step is not None:
            on_step(step, x0)
    return x_t


def _numbered_from(on_step: OnStep | None, offset: int) -> OnStep | None:
    if on_step is None:
        return None
    return lambda step, x0: on_step(step + offset, x0)
