"""Rollouts: the states that a few-step student encounters at inference, and the times at which losses are computed.

Backward simulation (DMD2, https://arxiv.org/abs/2405.14867, section 4.5): in training, the state that step k denoises
is produced as at inference, by running the student's own steps 0..k-1 from fresh noise, without gradient. Noised real
images instead are a mismatch: the student never sees such states at inference. Nor does it have dropout then.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from weights.contracts import StepSchedule
from weights.denoiser import Cond, Denoiser
from weights.diffusion.samplers import few_step_update, initial_state, needs_noise
from weights.diffusion.schedules import Schedule, add_noise

TIME_GRID = 1000
"""Times are drawn as n / 1000: exactly the native timesteps of discrete teachers, and fine enough for all others."""


def draw_noise(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Unit normal noise, drawn on the generator's device: a CPU seed gives the same noise on every device."""
    return torch.randn(shape, generator=generator, device=generator.device).to(device)


def draw_times(count: int, interval: tuple[float, float], generator: torch.Generator, device: torch.device) -> Tensor:
    """Uniform times on the grid of 1000 in the closed ``interval``: ``(count,)`` float32."""
    low, high = (round(end * TIME_GRID) for end in interval)
    return (torch.randint(low, high + 1, (count,), generator=generator, device=generator.device) / TIME_GRID).to(device)


def draw_lognormal_times(
    count: int, mean: float, std: float, schedule: Schedule, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Times at which ``ln(sigma_t / alpha_t)`` is normal (EDM's distribution of training noise): ``(count,)`` float32.

    Noise levels outside the schedule are clamped to its ends. https://arxiv.org/abs/2206.00364, section 5.
    """
    normal = torch.randn(count, generator=generator, dtype=torch.float64, device=generator.device)
    log_snr = -(mean + std * normal)
    return schedule.time_of_log_snr(log_snr).float().to(device)


def draw_step(
    schedules: dict[int, StepSchedule], weights: dict[int, float] | None, generator: torch.Generator
) -> tuple[StepSchedule, int]:
    """Draws a step count, in proportion to ``weights`` (uniformly when left out), and one of its steps."""
    counts = sorted(schedules)
    probabilities = torch.tensor([1.0 if weights is None else weights.get(count, 0.0) for count in counts])
    schedule = schedules[counts[int(torch.multinomial(probabilities, 1, generator=generator))]]
    return schedule, int(torch.randint(len(schedule.timesteps), (1,), generator=generator))


def at_time(value: float, x: Tensor) -> Tensor:
    """``value`` for each row of x, ``(B,)`` float32."""
    return torch.full((len(x),), value, device=x.device)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Context in which the network computes as at inference, without dropout; each module's mode is restored.

    Only for passes without a graph: with gradient checkpointing, a backward pass would compute the network again in the
    mode that it has by then.
    """
    training = [module for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def simulate(
    student: Denoiser, noise: Tensor, schedule: StepSchedule, step: int, cond: Cond, generator: torch.Generator
) -> Tensor:
    """The state that ``step`` denoises at inference, generated from fresh noise with ``step`` network evaluations.

    Args:
        student: used without gradient and without dropout.
        noise: ``(B, ...)``, unit normal.
        schedule: the step schedule being trained.
        step: from 0.
        cond: B rows.
        generator: draws the noise added between steps.
    """
    diffusion = student.schedule
    x_t = initial_state(noise, diffusion, schedule.timesteps[0])
    if step == 0:
        return x_t
    with evaluating(student):
        for earlier in range(step):
            x0 = student(x_t, at_time(schedule.network_times[earlier], x_t), cond)
            fresh = None
            if needs_noise(schedule, earlier):
                fresh = draw_noise(tuple(noise.shape), generator, noise.device)
            x_t = few_step_update(x_t, x0, earlier, schedule, diffusion, fresh)
    return x_t


def noised_real(student: Denoiser, real: Tensor, noise: Tensor, schedule: StepSchedule, step: int) -> Tensor:
    """The replacement of the simulated state without backward simulation: real images noised to the step's time.

    The first step gets pure noise, as at inference.
    """
    if step == 0:
        return initial_state(noise, student.schedule, schedule.timesteps[0])
    return add_noise(student.schedule, real, noise, at_time(schedule.timesteps[step], real))
