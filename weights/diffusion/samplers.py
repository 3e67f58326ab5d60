r"""Samplers: many steps along the probability-flow ODE, and a student's few.

They need only ``D(x_t, t, cond) -> x_0`` and the schedule, so they work with every family.

DDIM (Song et al. 2020, https://arxiv.org/abs/2010.02502, equation 12) holds x_0 and eps fixed over a step, which is
exact if the data are a single point. Heun (Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 1) corrects
the step with a second evaluation at its end. A student's "consistency" sampler (Song et al. 2023,
https://arxiv.org/abs/2303.01469, algorithm 1; diffusers' LCMScheduler) predicts x_0 and adds fresh noise for the next
level.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from weights.contracts import StepSchedule
from weights.denoiser import Cond, Denoiser
from weights.diffusion.schedules import Schedule, add_noise, check_times, expand, trailing_times

__all__ = [
    "ImageNoise",
    "OnStep",
    "ddim_step",
    "few_step",
    "few_step_update",
    "initial_state",
    "needs_noise",
    "sample_ode",
    "trailing_times",
]

OnStep = Callable[[int, Tensor], None]
"""Called after each step with its index and the denoiser's estimate of x_0 at the step's start, ``(B, ...)``."""


class ImageNoise:
    """Unit normal noise from one CPU generator per image: the same on every device and in every batch.

    The first draw is an image's initial latent; the later ones are the noise that its steps add, in step order.
    Diffusers' pipelines with LCMScheduler draw the same from ``torch.Generator("cpu").manual_seed(seed)`` at batch size
    1.

    Args:
        seeds: one per image, each in 0..2^64-1.
        shape: shape of one image's latent, without the batch.
        device: where the noise is returned; it is always drawn on the CPU.
        later: puts every draw ``(B, *shape)`` but the first in the order wanted (`TextToImage.step_noise`).
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        later: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.shape = tuple(shape)
        self.device = torch.device(device)
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._later = later
        self._first = True

    def __call__(self) -> Tensor:
        """The next draw for every image, ``(B, *shape)`` float32."""
        draws = [torch.randn(self.shape, generator=generator) for generator in self._generators]
        noise = torch.stack(draws)
        if self._later is not None and not self._first:
            noise = self._later(noise)
        self._first = False
        return noise.to(self.device)


def initial_state(noise: Tensor, schedule: Schedule, t: float = 1.0) -> Tensor:
    """Scale unit noise to a state at time t: by 1 in variance-preserving schedules, by about sigma_max in EDM.

    Args:
        noise: ``(B, ...)``, unit variance.
        t: the sampler's first time.
    """
    time = torch.full((1,), t, dtype=torch.float64, device=noise.device)  # created there, so no transfer to wait for
    norm = torch.hypot(schedule.alpha(time), schedule.sigma(time))
    return (noise.double() * expand(norm, noise)).to(noise.dtype)


def ddim_step(
    x_t: Tensor,
    x0: Tensor,
    t: Tensor,
    s: Tensor,
    schedule: Schedule,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """Step from time t to the cleaner time s, given the x_0 estimated at t (DDIM's equations 12 and 16).

    Args:
        x_t: ``(B, ...)``.
        x0: ``(B, ...)``, the denoiser's estimate for ``x_t``.
        t: ``(B,)`` or a scalar, where sigma is above 0.
        s: as t, below it.
        schedule: any; the equations are generalised to arbitrary alpha and sigma.
        eta: 0 is deterministic, 1 is ancestral sampling.
        noise: ``(B, ...)``, unit normal; needed if eta > 0.

    Returns:
        x_s ``(B, ...)``, float64 if ``x_t`` is, else float32.

    Raises:
        ValueError: eta > 0 without noise.
    """
    alpha_t, sigma_t = (expand(f(t.double()), x_t) for f in (schedule.alpha, schedule.sigma))
    alpha_s, sigma_s = (expand(f(s.double()), x_t) for f in (schedule.alpha, schedule.sigma))
    eps = (x_t.double() - alpha_t * x0.double()) / sigma_t
    if eta == 0:
        x_s = alpha_s * x0.double() + sigma_s * eps
    else:
        if noise is None:
            raise ValueError(f"ddim_step with eta={eta} needs noise; eta=0 does not")
        added = eta * sigma_s / sigma_t * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp(min=0).sqrt()
        kept = (sigma_s**2 - added**2).clamp(min=0).sqrt()
        x_s = alpha_s * x0.double() + kept * eps + added * noise.double()
    return x_s if x_t.dtype == torch.float64 else x_s.float()


def sample_ode(
    denoiser: Denoiser,
    x: Tensor,
    times: Sequence[float],
    cond: Cond,
    solver: Literal["ddim", "heun"] = "ddim",
    on_step: OnStep | None = None,
) -> Tensor:
    """Integrate the probability-flow ODE from ``times[0]`` to the clean image.

    Args:
        denoiser: also provides the schedule.
        x: the state at ``times[0]``, ``(B, ...)``; see `initial_state`.
        times: falling, the last 0, e.g. `trailing_times`.
        cond: conditions with B rows.
        solver: ``ddim`` takes one evaluation per step and is first-order. ``heun`` takes two (one in the last step) and
            is second-order if sigma is smooth in t down to 0. A DDPM's sigma at evenly spaced times is not (it starts
            like a square root); there the last step, which is a DDIM step in both solvers, has the largest error.
        on_step: called after every step.

    Returns:
        The image ``(B, ...)``: at t = 0 the last x_0 itself, even if the schedule keeps some noise there.

    Raises:
        ValueError: the times do not fall to 0, or the solver is unknown.
    """
    check_times(times)
    if solver not in ("ddim", "heun"):
        raise ValueError(f"{solver!r} is not a solver: use 'ddim' or 'heun'")
    for step, (t, s) in enumerate(pairwise(times)):
        x0 = _denoise(denoiser, x, t, cond)
        if s == 0:
            x = x0
        else:
            x_s = ddim_step(x, x0, _time(t, x), _time(s, x), denoiser.schedule)
            x = x_s if solver == "ddim" else _heun_correct(denoiser, x, x0, x_s, t, s, cond)
        if on_step is not None:
            on_step(step, x0)
    return x


def _heun_correct(denoiser: Denoiser, x_t: Tensor, x0: Tensor, x_s: Tensor, t: float, s: float, cond: Cond) -> Tensor:
    """Repeat the step from t to s by the trapezoidal rule, with the estimate at the predicted ``x_s``.

    The ODE can be written as d(x/alpha)/d(sigma/alpha) = eps or as d(x/sigma)/d(alpha/sigma) = x_0. The first is
    singular at alpha = 0, the second at sigma = 0. So x_0 is averaged in the noisy half, and eps in the clean half
    (where this is EDM's own rule).
    """
    end = _denoise(denoiser, x_s, s, cond)
    time, target, schedule = _time(t, x_t), _time(s, x_t), denoiser.schedule
    if schedule.alpha(time)[0] < schedule.sigma(time)[0]:
        return ddim_step(x_t, (x0 + end) / 2, time, target, schedule)
    alpha_t, sigma_t, alpha_s, sigma_s = (
        expand(value, x_t)
        for value in (schedule.alpha(time), schedule.sigma(time), schedule.alpha(target), schedule.sigma(target))
    )
    start_eps = (x_t.double() - alpha_t * x0.double()) / sigma_t
    end_eps = (x_s.double() - alpha_s * end.double()) / sigma_s
    slope = (sigma_s - alpha_s / alpha_t * sigma_t) / 2
    corrected = alpha_s / alpha_t * x_t.double() + slope * (start_eps + end_eps)
    return corrected if x_t.dtype == torch.float64 else corrected.float()


def needs_noise(schedule: StepSchedule, step: int) -> bool:
    """Whether the update after this step draws noise: not after the last step, and not in deterministic DDIM."""
    return step + 1 < len(schedule.timesteps) and (schedule.sampler == "consistency" or schedule.eta > 0)


def few_step_update(
    x: Tensor,
    x0: Tensor,
    step: int,
    schedule: StepSchedule,
    diffusion: Schedule,
    noise: Tensor | None = None,
) -> Tensor:
    """The update of a student's step, after the network evaluation: returns the state that the next step denoises.

    A pure function, shared by the server's batches and by backward simulation in training.

    Args:
        x: the state at ``schedule.timesteps[step]``, ``(B, ...)``.
        x0: the denoiser's estimate for it (at ``schedule.network_times[step]``), ``(B, ...)``.
        step: index of the step, from 0.
        schedule: the student's step schedule.
        diffusion: the base's noise schedule.
        noise: ``(B, ...)`` unit normal, if `needs_noise`.

    Returns:
        The state at ``timesteps[step + 1]``, or ``x0`` itself after the last step.

    Raises:
        IndexError: there is no such step.
        ValueError: noise is needed and missing.
    """
    if not 0 <= step < len(schedule.timesteps):
        raise IndexError(f"step {step} of a schedule with {len(schedule.timesteps)} steps")
    if step + 1 == len(schedule.timesteps):
        return x0
    if noise is None and needs_noise(schedule, step):
        raise ValueError(f"the update after step {step} ({schedule.sampler}, eta={schedule.eta}) needs noise")
    level, following = _time(schedule.timesteps[step], x), _time(schedule.timesteps[step + 1], x)
    if schedule.sampler == "ddim" or noise is None:
        return ddim_step(x, x0, level, following, diffusion, schedule.eta, noise)
    noised = add_noise(diffusion, x0, noise, following)
    return noised if x0.dtype == torch.float64 else noised.float()


def few_step(
    denoiser: Denoiser,
    x: Tensor,
    schedule: StepSchedule,
    cond: Cond,
    noise: Callable[[], Tensor],
    start: int = 0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample from a student, with one network evaluation per step.

    Args:
        denoiser: the student's; also provides the noise schedule.
        x: the state at ``schedule.timesteps[start]``, ``(B, ...)``.
        schedule: times, sampler and eta.
        cond: conditions with B rows.
        noise: returns the next ``(B, ...)`` unit normal draw, e.g. `ImageNoise` (whose first draw was ``x``); called
            only if `needs_noise`.
        start: index of the first step to run; above 0 if another model produced ``x``.
        on_step: called after every step.

    Returns:
        The image's x_0, ``(B, ...)`` float32.

    Raises:
        IndexError: start is beyond the last step.
    """
    if not 0 <= start < len(schedule.timesteps):
        raise IndexError(f"start={start} must lie in 0..{len(schedule.timesteps) - 1}")
    for step in range(start, len(schedule.timesteps)):
        x0 = _denoise(denoiser, x, schedule.network_times[step], cond)
        x = few_step_update(x, x0, step, schedule, denoiser.schedule, noise() if needs_noise(schedule, step) else None)
        if on_step is not None:
            on_step(step, x0)
    return x


def _time(t: float, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), t, dtype=torch.float64, device=x.device)


def _denoise(denoiser: Denoiser, x: Tensor, t: float, cond: Cond) -> Tensor:
    x0: Tensor = denoiser(x, _time(t, x).float(), cond)
    return x0
