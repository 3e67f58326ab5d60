"""Image generation: from conditions and seeds to latents, in the base's many steps or a student's few.

The evaluation and the samples of training are generated here. The server follows the same trajectories, so what is
measured is what is served. A student can start from its base's first step, which restores the diversity that
distillation loses ("Distilling Diversity and Control in Diffusion Models", Gandikota & Bau, arXiv 2503.10637, section
4): the base runs DDIM over its own times from t = 1 down to t*, the time of the student's step ``skip``, and the
student finishes from there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weights.contracts import Diversity, StepSchedule
from weights.denoiser import Cond, Denoiser, cond_repeat
from weights.diffusion.guidance import EmbeddedGuidance, Guided
from weights.diffusion.samplers import ImageNoise, OnStep
from weights.families.base import TextToImage
from weights.trajectory import (
    CannotDraw,
    Leg,
    Trajectory,
    advance,
    base_trajectory,
    student_trajectory,
)

__all__ = ["CannotDraw", "Drawing", "draw", "draw_base", "guided"]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The result of a generation, and its cost."""

    latents: Tensor
    """``(B, C, h, w)`` float32, clean and of about unit variance: ready for `TextToImage.decode`."""
    evaluations: int
    """Network evaluations per image, including the base leg's; a guided step counts as two."""


def guided(
    denoiser: Denoiser, uncond: Cond | None, guidance_scale: float, interval: tuple[float, float] | None = None
) -> Denoiser:
    """The denoiser under classifier-free guidance, only where ``low <= t <= high`` if there is an interval.

    Raises:
        CannotDraw: guidance was requested without the unconditional (or negative) condition that it needs.
    """
    if denoiser.embeds_guidance:
        return EmbeddedGuidance(denoiser, guidance_scale, interval)
    if guidance_scale == 1:
        return denoiser
    if uncond is None:
        raise CannotDraw(f"guidance_scale {guidance_scale} needs an unconditional condition; 1.0 turns guidance off")
    return Guided(denoiser, uncond, guidance_scale, interval)


def draw_base(
    base: TextToImage,
    cond: Cond,
    uncond: Cond | None,
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
    on_step: OnStep | None = None,
) -> Drawing:
    """Generate with the base model: DDIM (eta 0) over ``steps`` trailing times.

    Args:
        base: the model.
        cond: conditions, one row per image.
        uncond: a single row, for the empty or the negative prompt; needed with guidance.
        seeds: one per image; a seed gives the same noise in every batch and on every device.
        steps: at least 1.
        guidance_scale: 1.0 is off.
        on_step: called after each step with its index and the estimate of x_0.

    Raises:
        CannotDraw: guidance was requested without ``uncond``.
    """
    denoiser = base.denoiser
    trajectory = base_trajectory(denoiser.schedule, steps, guidance_scale, tells_guidance=denoiser.embeds_guidance)
    return _follow(trajectory, {"base": denoiser}, base, cond, uncond, seeds, on_step)


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
    empty: Cond | None = None,
    on_step: OnStep | None = None,
) -> Drawing:
    """Generate with a student, in the steps of its schedule; optionally, the base begins.

    Args:
        student: the student.
        cond: conditions, one row per image.
        uncond: a single row, for the empty or the negative prompt; needed if either leg is guided.
        seeds: one per image; a seed gives the same noise in every batch and on every device.
        schedule: the student's step schedule for this number of steps.
        guidance_scale: the student's guidance; 1.0 is off, except for a student that embeds guidance, which takes one
            of the scales it was trained for. The base leg's guidance is in ``diversity``.
        base: the student's base, with the same noise schedule; runs the base leg if ``diversity`` is given.
        diversity: how the base begins, and where the student takes over.
        skip_only: the control for ``diversity``: the student takes over pure noise, and the base is not run at all.
        empty: a single row, for the empty prompt, used where ``diversity`` leaves the prompt out; by default
            ``uncond``, which is the same unless it is a negative prompt.
        on_step: called after each step, including the base leg's, with its index from 0 and the estimate of x_0.

    Raises:
        CannotDraw: ``diversity`` leaves the student no step of its own, or has no base; or guidance has no ``uncond``.
    """
    if diversity is not None and base is None and not skip_only:
        raise CannotDraw("diversity runs the base model's first step, but no base was given")
    denoisers: dict[Leg, Denoiser] = {"student": student.denoiser}
    if base is not None:
        denoisers["base"] = base.denoiser
    trajectory = student_trajectory(
        student.denoiser.schedule,
        schedule,
        guidance_scale,
        tells_guidance=student.denoiser.embeds_guidance,
        diversity=diversity,
        skip_only=skip_only,
        base_tells_guidance=base is not None and base.denoiser.embeds_guidance,
    )
    return _follow(trajectory, denoisers, student, cond, uncond, seeds, on_step, empty)


def _follow(
    trajectory: Trajectory,
    denoisers: Mapping[Leg, Denoiser],
    model: TextToImage,
    cond: Cond,
    uncond: Cond | None,
    seeds: Sequence[int],
    on_step: OnStep | None,
    empty: Cond | None = None,
) -> Drawing:
    """Take all images along one trajectory, from their seeds' noise to clean latents."""
    device = next(iter(cond.values())).device
    noise = ImageNoise(seeds, model.latent_shape(), device, model.step_noise)
    x = trajectory.first_state(noise())
    for _ in range(trajectory.skipped_draws):
        noise()
    for index, step in enumerate(trajectory.steps):
        without = empty if step.unprompted and empty is not None else uncond
        denoiser = guided(denoisers[step.leg], without, step.guidance_scale)
        told = cond
        if step.unprompted and step.tells_guidance:
            if without is None:
                raise CannotDraw("a step without the prompt needs the empty prompt's condition; give uncond or empty")
            told = cond_repeat(without, len(x))
        x0 = denoiser(x, torch.full((len(x),), step.t, device=device), told)
        x = advance(x, x0, [step] * len(x), noise() if step.fresh else None)
        if on_step is not None:
            on_step(index, x0)
    return Drawing(latents=x, evaluations=trajectory.evaluations)
